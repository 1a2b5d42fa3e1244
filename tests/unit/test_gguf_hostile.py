"""Crafted and mutated files: one clear error, in bounded time and memory."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortier import gguf
from tensortier.errors import ModelFileError, ModelNotFound
from tensortier.gguf import _read_bytes
from tests.unit.gguf_samples import (
    ARR,
    BOOL,
    F32,
    STR,
    U8,
    U16,
    U32,
    U64,
    blob,
    small_model,
    tensor,
    text,
    value,
    write_split,
)

ARCH = ("general.architecture", value(STR, "llama"))
HUGE = 2**64 - 1
# Parent directories of a nested array, 10,000 deep.
NESTED = struct.pack("<I", ARR) + struct.pack("<IQ", ARR, 1) * 10_000 + struct.pack("<IQ", U8, 0)

HOSTILE = {
    "empty": (b"", "is empty"),
    "short": (b"GG", "fewer than 4 bytes"),
    "not gguf": (b"PK\3\4" + b"\0" * 100, "not a GGUF file"),
    "magic only": (b"GGUF", "cut short"),
    "version 0": (blob([ARCH], version=0), "version 0 is unknown"),
    "version 1": (blob([ARCH], version=1), "version 1 is no longer"),
    "version 4": (blob([ARCH], version=4), "version 4 is unknown"),
    "big endian": (blob([ARCH], version=0x03000000), "big-endian"),
    "many keys": (blob([ARCH], n_keys=HUGE), "number of metadata keys"),
    "more keys than bytes": (blob([ARCH], n_keys=50), "number of metadata keys"),
    "many tensors": (blob([ARCH], n_tensors=1 << 63), "number of tensors"),
    "negative count": (blob([ARCH], n_tensors=HUGE), "number of tensors"),
    "4 GB key": (
        blob([(ARCH[0], struct.pack("<I", STR) + struct.pack("<Q", 1 << 32))]),
        "length of 4294967296",
    ),
    "4 GB string in array": (
        blob([("a", struct.pack("<IIQ", ARR, STR, 1) + struct.pack("<Q", 1 << 32) + b"x")]),
        "corrupt",
    ),
    "string length overflow": (
        blob([("a", struct.pack("<IIQ", ARR, STR, 2) + struct.pack("<QQ", HUGE, HUGE))]),
        "corrupt",
    ),
    "huge array": (
        blob([("a", struct.pack("<IIQ", ARR, U64, 1 << 61))]),
        "claims 2305843009213693952 elements",
    ),
    "huge string array": (blob([("a", struct.pack("<IIQ", ARR, STR, HUGE))]), "claims"),
    "nested arrays": (blob([("a", NESTED)]), "array of arrays"),
    "unknown value type": (blob([("a", struct.pack("<IQ", 99, 0))]), "unknown type 99"),
    "unknown element type": (blob([("a", struct.pack("<IIQ", ARR, 13, 1) + b"12345678")]), "unknown type 13"),
    "empty key": (blob([("", value(U64, 1))]), "is empty"),
    "key twice": (blob([ARCH, ARCH]), "'general.architecture' is there twice"),
    "key not utf-8": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"\xff\xfe") + value(U8, 0) + b"pad",
        "UTF-8",
    ),
    "value not utf-8": (blob([("a", value(STR, b"\xc3\x28"))]), "UTF-8"),
    "tensor not utf-8": (blob([ARCH], [tensor(b"\xff", (1,), 0, 0)], 32), "UTF-8"),
    "long tensor name": (blob([ARCH], [tensor("x" * 64, (1,), 0, 0)], 32), "length of 64"),
    "alignment 0": (blob([ARCH, ("general.alignment", value(U32, 0))]), "general.alignment is 0"),
    "alignment 48": (blob([ARCH, ("general.alignment", value(U32, 48))]), "general.alignment is 48"),
    "alignment of another type": (blob([ARCH, ("general.alignment", value(U64, 32))]), "general.alignment"),
    "5 dimensions": (blob([ARCH], [tensor("x", (1, 1, 1, 1, 1), 0, 0)], 32), "5 dimensions"),
    "4e9 dimensions": (blob([ARCH], [text("x") + b"\xff" * 64], 32), "4294967295 dimensions"),
    "unknown tensor type": (blob([ARCH], [tensor("x", (32,), 99, 0)], 32), "type 99"),
    "removed tensor type": (blob([ARCH], [tensor("x", (32,), 4, 0)], 32), "type 4"),
    "half a block": (blob([ARCH], [tensor("x", (33,), 2, 0)], 64), "rows of 33"),
    "dimensions overflow": (blob([ARCH], [tensor("x", (1 << 32, 1 << 32), 0, 0)], 32), "impossible shape"),
    "overflow hidden by zero": (blob([ARCH], [tensor("x", (HUGE, 0), 0, 0)], 32), "impossible shape"),
    "tensor twice": (blob([ARCH], [tensor("x", (1,), 0, 0), tensor("x", (1,), 0, 32)], 64), "there twice"),
    "overlap": (blob([ARCH], [tensor("x", (16,), 0, 0), tensor("y", (16,), 0, 32)], 128), "overlaps"),
    "gap": (blob([ARCH], [tensor("x", (8,), 0, 0), tensor("y", (8,), 0, 64)], 128), "leaves a gap"),
    "offset overflow": (blob([ARCH], [tensor("x", (8,), 0, HUGE)], 128), "leaves a gap"),
    "data past the end": (blob([ARCH], [tensor("x", (8, 8), 0, 0)], 255), "goes 1 bytes past the end"),
    "no architecture": (blob([("a", value(U8, 1))]), "no 'general.architecture'"),
    "architecture not a string": (blob([(ARCH[0], value(U8, 1))]), "must be a string"),
    "4e9 layers": (blob([ARCH, ("llama.block_count", value(U32, 2**32 - 1))]), "512 layers"),
    "fractional layers": (blob([ARCH, ("llama.block_count", value(F32, 1.5))]), "is 1.5"),
    "negative width": (blob([ARCH, ("llama.embedding_length", struct.pack("<Ii", 5, -1))]), "is -1"),
    "heads of another count": (
        blob(
            [
                ARCH,
                ("llama.block_count", value(U32, 2)),
                ("llama.attention.head_count", value(ARR, (U32, [1]))),
            ]
        ),
        "has 1 elements",
    ),
    "interval 0": (
        blob([(ARCH[0], value(STR, "qwen3next")), ("qwen3next.full_attention_interval", value(U32, 0))]),
        "must be at least 1",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_crafted(case: str, tmp_path: Path) -> None:
    data, problem = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFileError) as caught:
        gguf.read(path)
    message = str(caught.value)
    assert problem in message and str(path) in message
    assert "\n" not in message and len(message) < 500


def test_truncated_anywhere() -> None:
    whole = small_model()
    assert _read_bytes(whole).n_layers == 2
    for n in range(len(whole)):
        if n > 4096 and n % 997:
            continue  # inside the weights every length is alike
        with pytest.raises(ModelFileError):
            _read_bytes(whole[:n])


def test_other_things_than_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="a directory"):
        gguf.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="not a regular file"):
        gguf.read(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="not a regular file"):
        gguf.read("/dev/zero")
    for missing in (tmp_path / "no", tmp_path / "pipe" / "no", "a\0b"):
        with pytest.raises(ModelNotFound):
            gguf.read(missing)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ModelFileError, match="cannot be opened"):
        gguf.read(tmp_path / "loop")


def test_strings_in_a_sparse_file_cost_bounded_time(tmp_path: Path) -> None:
    """A hole of 8 GB reads as a billion empty strings."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(blob([("a", struct.pack("<IIQ", ARR, STR, 1 << 30))]))
    os.truncate(path, 9 << 30)
    start = time.thread_time()
    with pytest.raises(ModelFileError, match="more than any model"):
        gguf.read(path)
    assert time.thread_time() - start < 2


def test_text_in_a_sparse_file_costs_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(blob([("a", struct.pack("<IQ", STR, 1 << 30))]))
    os.truncate(path, 2 << 30)
    tracemalloc.start()  # the process' own peak may be far above, from other tests
    try:
        with pytest.raises(ModelFileError, match="allowed"):
            gguf.read(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20


def test_split_errors(tmp_path: Path) -> None:
    parts = write_split(tmp_path / "m.gguf")
    second = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(ModelFileError, match=r"m-00002-of-00003\.gguf: this part of the model is missing"):
        gguf.read(parts[0])
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ModelFileError, match="mixed up"):
        gguf.read(parts[0])
    # As many tensors, but not the right ones.
    assert second.count(b"blk.2.attn_q") == 1
    parts[1].write_bytes(second.replace(b"blk.2.attn_q", b"blk.1.attn_q"))
    with pytest.raises(ModelFileError, match=r"'blk\.1\.attn_q\.weight' is also in"):
        gguf.read(parts[0])
    renamed = tmp_path / "other.gguf"
    renamed.write_bytes(second)
    with pytest.raises(ModelFileError, match="give it back its name"):
        gguf.read(renamed)
    count = [ARCH, ("split.count", value(U16, 65535)), ("split.no", value(U16, 0))]
    many = tmp_path / "n-00001-of-65535.gguf"
    many.write_bytes(blob(count))
    with pytest.raises(ModelFileError, match="missing and 65533 more"):
        gguf.read(many)


def test_tokens_need_not_be_utf8() -> None:
    m = _read_bytes(blob([ARCH, ("tokenizer.ggml.tokens", value(ARR, (STR, [b"\xff", "ok"])))]))
    assert list(m.metadata["tokenizer.ggml.tokens"]) == ["\\xff", "ok"] and m.n_vocab == 2


def test_any_true_byte_is_true() -> None:
    m = _read_bytes(
        blob([ARCH, ("a", struct.pack("<IB", BOOL, 2)), ("b", value(ARR, (BOOL, [True, False])))])
    )
    assert m.metadata["a"] is True and list(m.metadata["b"]) == [True, False]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_after_the_preamble(data: bytes) -> None:
    for start in (b"", b"GGUF\3\0\0\0", b"GGUF" + struct.pack("<IQQ", 3, 1, 1)):
        try:
            _read_bytes(start + data)
        except ModelFileError as exc:
            assert "\n" not in str(exc)


_keys = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
    lambda k: k != "general.alignment"
)
_numbers = {U8: st.integers(0, 255), U32: st.integers(0, 2**32 - 1), U64: st.integers(0, 2**64 - 1)}
_values = st.one_of(
    *(n.map(lambda v, k=kind: (k, v)) for kind, n in _numbers.items()),
    st.text(st.characters(codec="utf-8"), max_size=30).map(lambda s: (STR, s)),
    *(st.lists(n, max_size=5).map(lambda v, k=kind: (ARR, (k, v))) for kind, n in _numbers.items()),
    st.lists(st.text(st.characters(codec="utf-8"), max_size=9), max_size=5).map(lambda v: (ARR, (STR, v))),
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(_keys, _values, max_size=8))
def test_what_was_written_is_read(pairs: dict[str, tuple[int, object]]) -> None:
    header = gguf.header.parse(blob([(k, value(*v)) for k, v in pairs.items()]), "x")
    assert list(header.metadata) == list(pairs)
    for key, (kind, content) in pairs.items():
        expected = content[1] if kind == ARR else content  # type: ignore[index]
        actual = header.metadata[key]
        assert (list(actual) if kind == ARR else actual) == expected


_FUZZ = """
import pathlib, random, re, struct, sys, time
sys.path.insert(0, sys.argv[1])
from tensortier.errors import ModelFileError
from tensortier.gguf import _read_bytes
from tests.unit.gguf_samples import small_model
whole = small_model()
end = whole.index(b"blk.1.ffn_up.weight") + 60
rng = random.Random(20240607)
extremes = [struct.pack("<Q", v) for v in (0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)]
extremes += [v[:4] for v in extremes]
def mutant():
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(4, end)
        kind = rng.randrange(5)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            new = rng.choice(extremes)
            data[at : at + len(new)] = new
        elif kind == 3:
            other = rng.randrange(4, end)
            n = rng.randrange(1, 40)
            data[at : at + n] = whole[other : other + n]
        else:
            n = rng.randrange(1, 12)
            del data[at : at + n]
    return bytes(data)
whole = whole[: end + 64] + bytes(4096)  # keep only so much of the weights that most tensors miss theirs
full = small_model()
def peak():  # not ru_maxrss, which begins at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
before = peak()
start = time.process_time()
read = refused = 0
slowest = 0.0
for i in range(100_000):
    data = mutant()
    if i % 4 == 0:
        data = data[:-4160] + full[end:]  # a quarter with all of the weights: these get past the tensor table
    one = time.process_time()
    try:
        _read_bytes(data)
        read += 1
    except ModelFileError as exc:
        refused += 1
        assert "\\n" not in str(exc), exc
    slowest = max(slowest, time.process_time() - one)
grown = peak() - before
print(read, refused, grown * 1024, time.process_time() - start, slowest)
"""


@pytest.mark.slow
def test_100_000_mutated_headers() -> None:
    """No crash, no hang, no exception of another kind, and less than 200 MB."""
    root = Path(__file__).parents[2]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

    done = subprocess.run(
        [sys.executable, "-c", _FUZZ, str(root)],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=limit,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read, refused, grown, seconds, slowest = (float(x) for x in done.stdout.split())
    assert read + refused == 100_000
    assert read > 1000 and refused > 10_000, "the mutations must reach both outcomes"
    assert grown < 200e6, f"{grown / 1e6:.0f} MB"
    assert seconds < 60 and slowest < 2, f"{seconds:.0f} s, the slowest {slowest:.3f} s"
