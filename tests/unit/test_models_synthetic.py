"""Synthetic models: llama.cpp computes them, gguf-py reads them, writing is reproducible and a stream."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.models import llamacpp, synthetic
from tests.models.ggufio import Spec
from tests.models.synthetic import Synthetic

SMALL = {"vocab": 500, "layers": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixture": {},
    "dense": {"experts": 0},
    "qwen3moe": {"arch": "qwen3moe", "head_dim": 32},
    "shared expert": {"arch": "qwen2moe", "shared": 256},
    "merged": {"arch": "qwen3next", "shared": 256, "merged": True, "layers": 4},
}


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_logits_are_finite_and_depend_on_the_token(options: dict[str, Any], tmp_path: Path) -> None:
    path = synthetic.build(Synthetic(**(SMALL | options)), tmp_path / "model.gguf")
    logits, _ = llamacpp.evaluate(path, [1, 2, 3, 4])
    assert np.isfinite(logits).all()
    assert 1 < logits.std() < 4
    assert len(set(logits.argmax(axis=1))) > 1


@pytest.mark.parametrize("qtype", synthetic.QTYPES)
def test_weights_have_the_same_size_in_every_type(qtype: str) -> None:
    spec = Spec("blk.0.ffn_up.weight", (1024, 64), qtype)
    raw = b"".join(block.tobytes() for block in synthetic.content(spec, 3))
    assert len(raw) == spec.nbytes
    values = gguf.quants.dequantize(np.frombuffer(raw, np.uint8), gguf.GGMLQuantizationType[qtype])
    assert values.std() == pytest.approx(0.5 / 32, rel=0.1)
    assert abs(values.mean()) < 0.2 * values.std()


def test_bytes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    def digest(**options: Any) -> str:
        path = synthetic.build(Synthetic(**(SMALL | options)), tmp_path / "model.gguf")
        data = gguf.GGUFReader(path).tensors
        return hashlib.sha256(b"".join(t.data.tobytes() for t in data)).hexdigest()

    assert digest() == digest()
    assert digest() != digest(seed=1)


def test_the_tokenizer_is_smollm2s(tiny_path: Path, smollm2_path: Path) -> None:
    text = "The quick brown fox, 12 + 30 = 42."
    assert llamacpp.tokenize(tiny_path, text) == llamacpp.tokenize(smollm2_path, text)


def test_writing_is_a_stream(tmp_path: Path) -> None:
    # 570 MB in a fresh process, whose peak is then that of writing alone (VmHWM; ru_maxrss begins at the parent's)
    script = """
import re, sys
from pathlib import Path
from tests.models import synthetic
path = Path(sys.argv[1])
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
synthetic.build(synthetic.Synthetic(vocab=500, layers=1), path)
before = peak()
model = synthetic.Synthetic(vocab=500, layers=4, n_embd=1024, n_ff=5120, experts=16)
synthetic.build(model, path)
print((peak() - before) * 1024, path.stat().st_size)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "big.gguf")]
    root = Path(__file__).parents[2]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    grown, size = map(int, out.split())
    assert size > 500e6
    assert grown < 4 * synthetic.BLOCK


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"arch": "bert"}, "no synthetic model of architecture"),
        ({"merged": True}, "no merged gate and up"),
        ({"shared": 64}, "has no shared expert"),
        ({"arch": "qwen2moe"}, "needs shared expert"),
        ({"arch": "qwen3moe", "experts": 0}, "needs experts"),
        ({"n_embd": 100}, "no multiple"),
    ],
)
def test_what_an_architecture_cannot_express(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        [t.nbytes for t in synthetic.specs(Synthetic(**(SMALL | options)))]


def test_the_cache_builds_once(synthetic: Callable[..., Path]) -> None:
    first = synthetic(**SMALL)
    stamp = first.stat().st_mtime_ns
    assert synthetic(**SMALL) == first
    assert first.stat().st_mtime_ns == stamp
    assert synthetic(**SMALL, seed=1) != first
