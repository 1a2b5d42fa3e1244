"""The mixture made from SmolLM2: its parts against gguf-py's dequantization, its behaviour by llama.cpp."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from tests.models import llamacpp, moe


def test_experts_hold_the_neurons_they_should(moe_path: Path, smollm2_path: Path) -> None:
    files = {p: {t.name: t for t in gguf.GGUFReader(p).tensors} for p in (smollm2_path, moe_path)}

    def load(path: Path, name: str) -> np.ndarray:
        t = files[path][name]
        return gguf.quants.dequantize(t.data, t.tensor_type)

    for part in ("gate", "up", "down"):
        dense = load(smollm2_path, f"blk.3.ffn_{part}.weight")
        experts = load(moe_path, f"blk.3.ffn_{part}_exps.weight")
        for e in range(8):
            kept = [i for i in range(1536) if (i - e) % 8 != 0]
            if part == "down":
                expected = dense[:, kept] * 8 / 7
                # Q8_0: half a step of the block's largest value over 127, and the scale's f16 rounding
                assert np.abs(experts[e] - expected).max() <= np.abs(expected).max() * 0.0045
            else:
                assert np.array_equal(experts[e], dense[kept])


def test_metadata(moe_path: Path) -> None:
    with llamacpp.model(moe_path, vocab_only=True) as model:
        value = ctypes.create_string_buffer(32)

        def read(key: str) -> int:
            assert llama_cpp.llama_model_meta_val_str(model, f"llama.{key}".encode(), value, 32) > 0
            return int(value.value)

        keys = ("expert_count", "expert_used_count", "feed_forward_length", "block_count")
        assert [read(key) for key in keys] == [8, 2, 1344, 30]


def test_it_is_coherent_and_routes_like_a_real_mixture(moe_path: Path, smollm2_path: Path) -> None:
    held_out = moe.tokens()[moe.FIT_TOKENS :][:256]
    original, _ = llamacpp.evaluate(smollm2_path, held_out)
    logits, routing = moe.evaluate(moe_path, held_out)
    ratio = llamacpp.perplexity(logits, held_out) / llamacpp.perplexity(original, held_out)
    assert 1 < ratio < 2
    assert (routing.load.mean(axis=0) > 0.02).all()
    assert routing.load.max() < 0.5
    assert 0.3 < routing.reuse < 0.6
    assert 0.75 < routing.predicted < 0.95


def test_weights_are_near_one_half_by_llama_cpps_account(moe_path: Path) -> None:
    held_out = moe.tokens()[moe.FIT_TOKENS :][:64]
    names = [f"ffn_moe_weights_norm-{layer}" for layer in (0, 14, 28)]
    _, seen = llamacpp.evaluate(moe_path, held_out, names)
    for weights in seen.values():
        assert weights.sum(axis=1) == pytest.approx(1, abs=1e-5)
        assert weights.max() < 0.75
        assert weights[:, 0].mean() < 0.6
    assert len(seen) == 3


def test_the_high_level_api_runs_it(moe_path: Path) -> None:
    model = llama_cpp.Llama(str(moe_path), n_ctx=128, n_threads=2, verbose=False)
    answer = model("The capital of France is", max_tokens=1, temperature=0, stream=False)
    model.close()
    assert isinstance(answer, dict)
    assert answer["usage"]["completion_tokens"] == 1
    assert answer["choices"][0]["text"].strip()
