"""The skeletons against published file sizes and against llama.cpp, which loads each without allocating."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import psutil
import pytest

from tests.models import ggufio, llamacpp, mixes, shapes, skeletons, synthetic

# parameters (all, billions), context length and vocabulary, from the models' own cards and configurations
CARDS = {
    "qwq-32b-q3_k_m": (32.76, 131072, 152064),
    "qwq-32b-iq4_xs": (32.76, 131072, 152064),
    "gemma-2-27b-q4_k_m": (27.23, 8192, 256000),
    "gemma-3-12b-q4_k_m": (11.77, 131072, 262208),
    "mixtral-8x7b-q4_k_m": (46.70, 32768, 32000),
    "qwen3-30b-a3b-q4_k_m": (30.53, 40960, 151936),
    "gpt-oss-120b-mxfp4": (116.83, 131072, 201088),
    "llama-3.3-70b-q4_k_m": (70.55, 131072, 128256),
    "deepseek-v3-q4_k_m": (671.03, 163840, 129280),
    "qwen3-next-80b-a3b-q4_k_m": (79.67, 262144, 151936),
}


def test_every_skeleton_has_a_card() -> None:
    assert set(CARDS) == set(skeletons.NAMES)


@pytest.mark.parametrize("name", skeletons.NAMES)
def test_size_is_that_of_a_published_file(name: str, skeleton: Callable[[str], Path]) -> None:
    stat = skeleton(name).stat()
    assert stat.st_size == pytest.approx(skeletons.get(name).published, rel=0.01)
    assert stat.st_blocks * 512 < 1 << 20


def test_mixtral_with_the_rules_of_2023() -> None:
    # published then as 26.44 GB: ffn_down without extra bits
    old = sum(
        (ggufio.Spec(t.name, t.shape, "Q4_K") if "ffn_down" in t.name else t).nbytes
        for t in skeletons.specs("mixtral-8x7b-q4_k_m")
    )
    assert old == pytest.approx(26.44e9, rel=0.01)


@pytest.mark.parametrize("name", skeletons.NAMES)
def test_llama_cpp_loads_it_without_allocating(name: str, skeleton: Callable[[str], Path]) -> None:
    path = skeleton(name)
    billions, trained_for, vocabulary = CARDS[name]
    before = psutil.Process().memory_info().rss
    with llamacpp.no_alloc(path, n_ctx=4096) as (model, context):
        assert llama_cpp.llama_model_n_params(model) / 1e9 == pytest.approx(billions, abs=0.006)
        assert llama_cpp.llama_model_n_ctx_train(model) == trained_for
        assert llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)) == vocabulary
        assert llama_cpp.llama_n_ctx(context) == 4096
        assert llama_cpp.llama_model_size(model) == sum(t.nbytes for t in skeletons.specs(name))
        assert psutil.Process().memory_info().rss - before < 256 << 20


def test_gguf_py_reads_the_same_tensors(skeleton: Callable[[str], Path]) -> None:
    path = skeleton("gpt-oss-120b-mxfp4")
    read = gguf.GGUFReader(path).tensors
    assert [(t.name, tuple(t.shape), t.tensor_type.name, t.n_bytes) for t in read] == [
        (t.name, t.shape, t.qtype, t.nbytes) for t in skeletons.specs("gpt-oss-120b-mxfp4")
    ]
    last = read[-1]
    assert last.data_offset + last.n_bytes <= path.stat().st_size


# model options that reach different rules: grouped heads, 8 experts, rows that 256 does not divide
QUANTIZED: dict[str, dict[str, Any]] = {
    "dense": {"experts": 0, "layers": 17, "heads": 8, "kv_heads": 2},
    "dense, few kv heads shared": {"experts": 0, "layers": 9, "heads": 4, "kv_heads": 2},
    "8 experts": {"experts": 8, "layers": 8},
    "other mixture": {"arch": "qwen3moe", "experts": 2, "layers": 9, "heads": 8, "kv_heads": 2},
    "odd rows": {"experts": 0, "layers": 8, "n_embd": 160, "heads": 5, "kv_heads": 1, "n_ff": 288},
    "hybrid": {"arch": "qwen3next", "experts": 2, "shared": 256, "layers": 8},
}


@pytest.mark.parametrize("options", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("mix", mixes.BASE)
def test_mixes_are_llama_cpps(options: dict[str, Any], mix: str, tmp_path: Path) -> None:
    small: dict[str, Any] = {"vocab": 256, "n_ff": 256, "n_embd": 256, "qtype": "F16", "embedding": "F16"}
    model = synthetic.Synthetic(**(small | options))
    source = synthetic.build(model, tmp_path / "f16.gguf")
    target = tmp_path / "quantized.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = mixes.FILE_TYPE[mix], 1
    assert not llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    actual = {t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors}
    shape = synthetic.shape(model)
    named = list(shapes.tensors(shape))
    types = mixes.assign(
        named,
        mix,
        n_layers=shape.n_layers,
        n_head=shape.n_head,
        n_head_kv=shape.n_head_kv,
        n_expert=shape.n_expert,
    )
    assert dict(zip((n for n, _ in named), types, strict=True)) == actual


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with ggufio.published(tmp_path / "model.gguf") as temporary:
            temporary.write_bytes(np.zeros(8, np.uint8).tobytes())
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert list(tmp_path.iterdir()) == []
