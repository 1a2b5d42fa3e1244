"""A mixture of experts with real weights, made from SmolLM2-135M.

In each layer expert e of 8 holds the feed-forward neurons i with (i - e) mod 8 != 0, its down projection
scaled by 8/7 to make up for the missing eighth; two experts are used per token. The router is fitted to the
layer's own inputs, so that routing has the locality and the predictability from layer to layer of a real
model, and the text stays coherent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.models import ggufio, llamacpp, smollm2

VERSION = "1"  # part of the cache's key: raise it when the file's content changes
N_EXPERT, N_USED = 8, 2
FIT_TOKENS = 1000
RIDGE = 300.0  # per thousand fitted tokens, in units of the inputs' mean square
SKEW = 0.2  # share of each cluster's mean score that stays: some experts are used more, none is left out
SPREAD = 0.15  # standard deviation of the router's logits: normalized top-2 weights stay near 1/2
QTYPE_DOWN = "Q8_0"

Floats = NDArray[np.float32]


@lru_cache(maxsize=1)
def tokens() -> tuple[int, ...]:
    """text.txt in SmolLM2's tokens; the first FIT_TOKENS of them fit the routers."""
    text = (Path(__file__).parent / "text.txt").read_text(encoding="utf-8")
    return tuple(llamacpp.tokenize(smollm2.path(), text))


def build(path: Path) -> Path:
    """Write the model to ``path`` (about 440 MB, some seconds) and return that."""
    source = gguf.GGUFReader(smollm2.path())
    n_layers = int(source.fields["llama.block_count"].contents())
    names = [f"ffn_norm-{layer}" for layer in range(n_layers)]
    _, inputs = llamacpp.evaluate(smollm2.path(), tokens()[:FIT_TOKENS], names)
    parts: list[tuple[ggufio.Spec, Any]] = []
    for t in source.tensors:
        layer_name, _, kind = t.name.rpartition(".ffn_")
        if kind in ("gate.weight", "up.weight", "down.weight"):
            parts.append(_experts(t, layer_name, kind.removesuffix(".weight")))
        else:
            shape = tuple(int(d) for d in t.shape)
            parts.append((ggufio.Spec(t.name, shape, t.tensor_type.name), t.data))
        if kind == "norm.weight":
            weights = router(inputs[f"ffn_norm-{layer_name.removeprefix('blk.')}"])
            spec = ggufio.Spec(f"{layer_name}.ffn_gate_inp.weight", weights.shape[::-1], "F32")
            parts.append((spec, weights))
    n_ff = next(s.shape[1] for s, _ in parts if s.name.endswith("ffn_up_exps.weight"))
    metadata = {
        **ggufio.fields(smollm2.path(), "llama."),
        **ggufio.fields(smollm2.path(), "tokenizer."),
        "general.name": "SmolLM2 135M as a mixture of 8 experts",
        "general.file_type": 3,  # mostly Q4_1
        "general.quantization_version": 2,
        "llama.expert_count": N_EXPERT,
        "llama.expert_used_count": N_USED,
        "llama.feed_forward_length": n_ff,
    }
    with ggufio.published(path) as temporary:
        offsets = ggufio.write_header(temporary, "llama", metadata, [spec for spec, _ in parts])
        with temporary.open("r+b") as file:
            for offset, (spec, data) in zip(offsets, parts, strict=True):
                file.seek(offset)
                raw = (data() if callable(data) else data).tobytes()
                if len(raw) != spec.nbytes:
                    raise ValueError(f"{spec.name}: {len(raw)} bytes, the type needs {spec.nbytes}")
                file.write(raw)
    return path


def _experts(t: Any, layer_name: str, part: str) -> tuple[ggufio.Spec, Any]:
    n_in, n_out = (int(d) for d in t.shape)
    n_ff = n_in if part == "down" else n_out
    kept = [np.flatnonzero((np.arange(n_ff) - e) % N_EXPERT) for e in range(N_EXPERT)]
    name = f"{layer_name}.ffn_{part}_exps.weight"
    if part != "down":
        # a neuron is a row, so its quantized bytes are taken as they are
        spec = ggufio.Spec(name, (n_in, len(kept[0]), N_EXPERT), t.tensor_type.name)
        return spec, lambda: np.stack([t.data[rows] for rows in kept])

    def down() -> NDArray[np.uint8]:
        full = gguf.quants.dequantize(t.data, t.tensor_type) * np.float32(N_EXPERT / (N_EXPERT - 1))
        stacked = np.stack([full[:, columns] for columns in kept])
        return gguf.quants.quantize(stacked, gguf.GGMLQuantizationType[QTYPE_DOWN])

    return ggufio.Spec(name, (len(kept[0]), n_out, N_EXPERT), QTYPE_DOWN), down


def router(x: Floats) -> Floats:
    """Weights ``[expert, width]`` fitted to normed inputs ``[token, width]``."""
    x64 = x.astype(np.float64)
    scores = _kmeans_scores(x64)
    scores -= scores.mean(axis=1, keepdims=True)
    scores = (scores - (1 - SKEW) * scores.mean(axis=0)) / scores.std(axis=0)
    gram = x64.T @ x64
    gram[np.diag_indices_from(gram)] += RIDGE * len(x) / 1000 * np.mean(x64**2)
    weights = np.linalg.solve(gram, x64.T @ scores).T
    fitted: Floats = (weights * (SPREAD / np.std(x64 @ weights.T))).astype(np.float32)
    return fitted


def _kmeans_scores(x: NDArray[np.float64], rounds: int = 20) -> NDArray[np.float64]:
    """Negative squared distances ``[token, cluster]`` to the centres that Lloyd's algorithm finds."""
    rng = np.random.default_rng(0)
    centres = x[rng.choice(len(x), N_EXPERT, replace=False)]
    for _ in range(rounds):
        nearest = _closeness(x, centres).argmax(axis=1)
        # an empty cluster keeps its centre
        centres = np.stack(
            [x[nearest == c].mean(axis=0) if (nearest == c).any() else centres[c] for c in range(N_EXPERT)]
        )
    return _closeness(x, centres)


def _closeness(x: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    closeness: NDArray[np.float64] = 2 * x @ centres.T
    closeness -= (centres**2).sum(axis=1) + (x**2).sum(axis=1, keepdims=True)
    return closeness


@dataclass(frozen=True)
class Routing:
    """How a mixture's routers behaved on a text."""

    chosen: NDArray[np.intp]  # [layer, token, used]
    top_weight: float  # mean of the larger normalized weight
    reuse: float  # share of a token's experts that the token before used, mean over layers
    predicted: float  # share of layer l+1's experts that its router names from layer l's hidden state
    load: NDArray[np.float64]  # [layer, expert]: share of all choices


def evaluate(path: Path, text: Sequence[int]) -> tuple[Floats, Routing]:
    """Logits ``[token, vocabulary]`` of the mixture in ``path``, and what its routers did.

    The choices are computed here from the routers' inputs as llama.cpp has them (``ffn_norm-N``); the guess
    for layer l+1 from the hidden state after layer l's attention (``ffn_inp-N``).
    """
    tensors = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    n = sum(name.endswith("ffn_gate_inp.weight") for name in tensors)
    routers = [tensors[f"blk.{i}.ffn_gate_inp.weight"] for i in range(n)]
    nodes = [f"{node}-{i}" for node in ("ffn_norm", "ffn_inp") for i in range(n)]
    output, seen = llamacpp.evaluate(path, text, nodes)
    logits = np.stack([seen[f"ffn_norm-{i}"] @ routers[i].T for i in range(n)])
    chosen = np.argsort(-logits, axis=-1)[..., :N_USED]
    top = np.take_along_axis(logits, chosen, -1)
    guesses = []
    for i in range(n - 1):
        h = seen[f"ffn_inp-{i}"]
        normed = h / np.sqrt((h**2).mean(axis=1, keepdims=True)) * tensors[f"blk.{i + 1}.ffn_norm.weight"]
        guesses.append(np.argsort(-(normed @ routers[i + 1].T), axis=-1)[:, :N_USED])
    load = np.stack([np.bincount(c.ravel(), minlength=N_EXPERT) for c in chosen]) / chosen[0].size
    return output, Routing(
        chosen=chosen,
        top_weight=float((1 / (1 + np.exp(top[..., 1] - top[..., 0]))).mean()),
        reuse=_overlap(chosen[:, 1:], chosen[:, :-1]),
        predicted=_overlap(chosen[1:], np.stack(guesses)),
        load=load,
    )


def _overlap(a: NDArray[np.intp], b: NDArray[np.intp]) -> float:
    """Mean share of a's experts that are among b's; both ``[..., used]``."""
    return float((a[..., :, None] == b[..., None, :]).any(axis=-1).mean())
