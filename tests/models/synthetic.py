"""Models with random weights and any shape, written as a stream: memory stays at a few times BLOCK bytes.

Quantized tensors are random bytes with their scales set so that a row's product with normalized activations
has about the activations' own size: logits stay finite at any depth. Every tensor has its own random stream,
seeded by the model's seed and the tensor's name, so its bytes do not depend on the rest of the file.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.models import ggufio, shapes, smollm2
from tests.models.ggufio import Spec

VERSION = "1"  # part of the cache's key: raise it when the bytes change
BLOCK = 8 << 20  # bytes made and written at a time

# Offset and relative size of the f16 fields that scale a block: values must come out around zero, so a
# minimum is given in terms of the scale.
SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 1.0),),
    "Q4_1": ((0, 1.0), (2, -7.5)),
    "Q5_0": ((0, 1.0),),
    "Q8_0": ((0, 1.0),),
    "Q2_K": ((80, 1.0), (82, 1.5)),
    "Q3_K": ((108, 1.0),),
    "Q4_K": ((0, 1.0), (2, 7.5)),
    "Q5_K": ((0, 1.0), (2, 15.5)),
    "Q6_K": ((208, 1.0),),
    "IQ4_NL": ((0, 1.0),),
    "IQ4_XS": ((0, 1.0),),
}
PLAIN = ("F32", "F16")
QTYPES = (*PLAIN, *SCALES)


@dataclass(frozen=True)
class Synthetic:
    """What to make. The default is a small mixture in the llama architecture."""

    arch: str = "llama"  # one of ARCHITECTURES
    layers: int = 4
    n_embd: int = 256
    n_ff: int = 512  # of one expert in a mixture
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 0  # 0: n_embd / heads
    experts: int = 8  # 0: a dense model
    used: int = 2
    vocab: int = 0  # 0: SmolLM2's tokenizer; else no tokenizer and this many tokens
    qtype: str = "Q4_0"  # of all matrices but embedding and output
    embedding: str = "Q8_0"  # of embedding and output
    merged: bool = False  # gate and up of an expert in one tensor: arch "qwen3next" only
    shared: int = 0  # width of the shared expert: archs "qwen2moe" and "qwen3next"
    context: int = 8192
    seed: int = 0

    def key(self) -> str:
        """A short name that differs when anything does."""
        digest = zlib.crc32(f"{VERSION} {self!r}".encode())
        return f"{self.arch}-{self.layers}x{self.n_embd}-e{self.experts}-{self.qtype}-{digest:08x}"


def shape(model: Synthetic) -> shapes.Shape:
    """The architecture's numbers; ValueError where it has no such option."""
    arch = model.arch
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"no synthetic model of architecture {arch!r}: use one of {', '.join(ARCHITECTURES)}"
        )
    own = ARCHITECTURES[arch]
    if model.merged and not own.merged:
        raise ValueError(f"architecture {arch} has no merged gate and up: use qwen3next")
    if bool(model.shared) != own.shared:
        raise ValueError(f"architecture {arch} {'needs' if own.shared else 'has no'} shared expert")
    if not model.experts and not own.dense:
        raise ValueError(f"architecture {arch} needs experts")
    return shapes.Shape(
        arch,
        f"Synthetic {model.key()}",
        model.layers,
        model.n_embd,
        model.vocab or _smollm2_vocab(),
        model.heads,
        model.kv_heads,
        model.n_ff,
        head_dim=model.head_dim or (model.n_embd // model.heads if own.qk_norm else 0),
        n_ctx=model.context,
        qk_norm=own.qk_norm,
        qkv_bias=own.biases,
        expert_bias=own.biases,
        extra={"attention.sliding_window": 128} if own.biases else {},
        n_expert=model.experts,
        n_used=model.used if model.experts else 0,
        n_ff_exp=model.n_ff if model.experts and arch != "llama" else 0,
        n_ff_shared=model.shared,
        shared_gate=own.shared,
        merged=model.merged,
        delta=own.delta,
    )


@dataclass(frozen=True)
class Architecture:
    """What an architecture of llama.cpp can express."""

    dense: bool = False
    merged: bool = False
    shared: bool = False
    qk_norm: bool = False
    biases: bool = False  # of experts, router and attention, and attention sinks
    delta: shapes.DeltaNet | None = None


ARCHITECTURES = {
    "llama": Architecture(dense=True),
    "qwen3moe": Architecture(qk_norm=True),
    "qwen2moe": Architecture(shared=True),
    "gpt-oss": Architecture(biases=True),
    # three of four layers are linear attention
    "qwen3next": Architecture(merged=True, shared=True, qk_norm=True, delta=shapes.DeltaNet(4, 4, 64, 2, 4)),
}


def specs(model: Synthetic) -> list[Spec]:
    """Every tensor with its type: matrices of ``qtype``, the embedding apart, router and vectors F32."""
    result = []
    for name, dims in shapes.tensors(shape(model)):
        vector = len(dims) < 2 or name.endswith(".bias")
        if vector or "ffn_gate_inp" in name or "ssm_conv1d" in name:
            kind = "F32"
        elif name in ("token_embd.weight", "output.weight"):
            kind = model.embedding
        else:
            kind = model.qtype
        result.append(Spec(name, dims, kind))
    return result


def build(model: Synthetic, path: Path, more: Sequence[Spec] = ()) -> Path:
    """Write the model, and tensors that no option stands for, to ``path`` and return that."""
    metadata = shapes.metadata(shape(model))
    if model.vocab:
        metadata["tokenizer.ggml.model"] = "no_vocab"
    else:
        metadata |= ggufio.fields(smollm2.path(), "tokenizer.")
    tensors = [*specs(model), *more]
    with ggufio.published(path) as temporary:
        offsets = ggufio.write_header(temporary, model.arch, metadata, tensors)
        with temporary.open("r+b", buffering=0) as file:
            for offset, spec in zip(offsets, tensors, strict=True):
                file.seek(offset)
                for block in content(spec, model.seed):
                    file.write(block.data)
    return path


def content(spec: Spec, seed: int) -> Iterator[NDArray[Any]]:
    """A tensor's bytes, in pieces of at most BLOCK."""
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(spec.name.encode())]))
    if spec.name.endswith("norm.weight"):
        yield np.ones(spec.shape, np.float32)
        return
    if spec.name.endswith("ssm_a"):
        yield -np.ones(spec.shape, np.float32)  # a decay: must be negative
        return
    # what a row makes of inputs of variance one: routers and the output need values that differ
    size = 2.0 if "ffn_gate_inp" in spec.name or spec.name == "output.weight" else 0.5
    deviation = size / np.sqrt(spec.shape[0]) if len(spec.shape) > 1 else 0.02
    if spec.name == "token_embd.weight":
        deviation = 1.0
    left = spec.nbytes
    if spec.qtype in PLAIN:
        dtype = np.dtype(np.float32 if spec.qtype == "F32" else np.float16)
        while left:
            n = min(left, BLOCK) // dtype.itemsize
            values = rng.random(n, np.float32)
            values -= np.float32(0.5)
            values *= np.float32(deviation * np.sqrt(12))  # a uniform variable's deviation is 1/sqrt(12)
            yield values.astype(dtype, copy=False)
            left -= n * dtype.itemsize
        return
    width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[spec.qtype]][1]
    scale = deviation / _unit_deviation(spec.qtype)
    while left:
        n = min(left, BLOCK // width * width)
        yield _blocks(rng, spec.qtype, n // width, width, scale)
        left -= n


def _blocks(rng: np.random.Generator, qtype: str, n: int, width: int, scale: float) -> NDArray[np.uint8]:
    """``n`` random blocks of ``width`` bytes, with the fields that scale them set."""
    words = rng.integers(0, 1 << 64, -(-n * width // 8), np.uint64)
    blocks = words.view(np.uint8)[: n * width].reshape(n, width)
    for offset, relative in SCALES[qtype]:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(scale * relative).tobytes(), np.uint8)
    return blocks


@cache
def _unit_deviation(qtype: str) -> float:
    """Standard deviation of random blocks with scale 1, by gguf-py's dequantization."""
    kind = gguf.GGMLQuantizationType[qtype]
    width = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = _blocks(np.random.Generator(np.random.SFC64(0)), qtype, 512, width, 1.0)
    return float(np.sqrt(np.mean(gguf.quants.dequantize(blocks, kind).astype(np.float64) ** 2)))


def _smollm2_vocab() -> int:
    return len(ggufio.fields(smollm2.path(), "tokenizer.")["tokenizer.ggml.tokens"].value)


# Options of the model behind the fixture ``tiny_path``.
TINY: dict[str, Any] = {
    "layers": 2,
    "n_embd": 64,
    "n_ff": 128,
    "experts": 0,
    "qtype": "F16",
    "embedding": "F16",
}
