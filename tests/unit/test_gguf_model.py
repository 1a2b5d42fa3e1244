"""What ``gguf.read`` derives per architecture, against the rules in llama.cpp's src/models/*.cpp.

Expected values are written down from published configurations (which layers slide, recur, or share a cache),
not computed with the code under test.
"""

from __future__ import annotations

from typing import Any

import pytest

from tensortier.gguf import _read_bytes
from tensortier.types import ModelInfo, Role
from tests.unit.gguf_samples import ARR, BOOL, I32, STR, U32, blob, tensor, value


def _model(arch: str, keys: dict[str, Any], names: tuple[str, ...] = ("token_embd.weight",)) -> ModelInfo:
    pairs = [("general.architecture", value(STR, arch))]
    for key, content in keys.items():
        if isinstance(content, list):
            kind = BOOL if isinstance(content[0], bool) else I32
            pairs.append((f"{arch}.{key}", value(ARR, (kind, content))))
        else:
            pairs.append((f"{arch}.{key}", value(U32, content)))
    rows = [tensor(n, (32, 4), 0, i * 512) for i, n in enumerate(names)]
    return _read_bytes(blob(pairs, rows, 512 * len(rows)))


HEADS = {"embedding_length": 256, "attention.head_count": 4, "attention.head_count_kv": 2}
S, F = True, False  # sliding, full
SLIDING = [
    ("gemma2", {"block_count": 5}, 4096, [S, F, S, F, S]),  # even layers slide; window by default
    ("gemma2", {"block_count": 2, "attention.sliding_window": 1024}, 1024, [S, F]),
    ("gemma3", {"block_count": 7, "attention.sliding_window": 512}, 512, [S, S, S, S, S, F, S]),  # 5 to 1
    ("gemma3", {"block_count": 3}, 0, [F, F, F]),
    ("gpt-oss", {"block_count": 4, "attention.sliding_window": 128}, 128, [S, F, S, F]),
    ("cohere2", {"block_count": 5, "attention.sliding_window": 4096}, 4096, [S, S, S, F, S]),
    ("llama4", {"block_count": 5}, 8192, [S, S, S, F, S]),  # chunked, 3 to 1
    ("llama4", {"block_count": 2, "attention.sliding_window": 0}, 0, [F, F]),
    ("smallthinker", {"block_count": 5, "attention.sliding_window": 1}, 4096, [F, S, S, S, F]),
    (
        "gpt-oss",
        {"block_count": 3, "attention.sliding_window": 8, "attention.sliding_window_pattern": 3},
        8,
        [S, S, F],
    ),
    (
        "gpt-oss",
        {"block_count": 3, "attention.sliding_window": 8, "attention.sliding_window_pattern": [F, F, S]},
        8,
        [F, F, S],
    ),
    (
        "gpt-oss",
        {"block_count": 2, "attention.sliding_window": 8, "attention.sliding_window_pattern": 1},
        0,
        [F, F],
    ),
    (
        "gemma4",
        {"block_count": 3, "attention.sliding_window": 64, "attention.sliding_window_pattern": [S, S, F]},
        64,
        [S, S, F],
    ),
    ("phi3", {"block_count": 2, "attention.sliding_window": 2047}, 0, [F, F]),  # switched off in llama.cpp
    ("qwen2", {"block_count": 2, "attention.sliding_window": 32768}, 0, [F, F]),
    ("exaone4", {"block_count": 30, "attention.sliding_window": 4096}, 0, [F] * 30),
    ("exaone4", {"block_count": 64}, 4096, [S, S, S, F] * 16),
]


@pytest.mark.parametrize(("arch", "keys", "window", "layers"), SLIDING)
def test_sliding_window(arch: str, keys: dict[str, Any], window: int, layers: list[bool]) -> None:
    m = _model(arch, {**HEADS, **keys})
    assert (m.sliding_window, m.swa_layers) == (window, tuple(layers))
    assert (m.head_dim_k_swa, m.head_dim_v_swa) == ((64, 64) if window else (0, 0))


R, A = True, False  # recurrent, attention
RECURRENT = [
    ("mamba2", {"block_count": 2, "embedding_length": 8}, [R, R], [0, 0]),
    ("jamba", {**HEADS, "block_count": 3, "attention.head_count_kv": [0, 2, 0]}, [R, A, R], [0, 2, 0]),
    ("granitehybrid", {**HEADS, "block_count": 2, "attention.head_count_kv": [0, 8]}, [R, A], [0, 8]),
    ("lfm2", {**HEADS, "block_count": 2, "attention.head_count_kv": [0, 8]}, [R, A], [0, 8]),
    ("qwen3next", {**HEADS, "block_count": 5}, [R, R, R, A, R], [0, 0, 0, 2, 0]),
    ("qwen3next", {**HEADS, "block_count": 3, "full_attention_interval": 2}, [R, A, R], [0, 2, 0]),
    (
        "qwen35",
        {**HEADS, "block_count": 3, "attention.recurrent_layers": [A, R, R], "nextn_predict_layers": 1},
        [A, R, A],
        [2, 0, 0],
    ),
    ("falcon-h1", {**HEADS, "block_count": 2}, [R, R], [2, 2]),  # both side by side
    (
        "nemotron_h",  # recurrent, feed-forward only, attention
        {**HEADS, "block_count": 3, "attention.head_count_kv": [0, 0, 2], "feed_forward_length": [0, 99, 0]},
        [R, A, A],
        [0, 0, 2],
    ),
    ("llama", {**HEADS, "block_count": 2, "attention.head_count_kv": [0, 2]}, [A, A], [0, 2]),
    ("bert", {**HEADS, "block_count": 2}, [A, A], [0, 0]),
    ("glm4moe", {**HEADS, "block_count": 3, "nextn_predict_layers": 1}, [A, A, A], [2, 2, 0]),
    ("gemma3n", {**HEADS, "block_count": 22, "attention.sliding_window": 512}, [A] * 22, [2] * 20 + [0, 0]),
    (
        "gemma4",
        {
            **HEADS,
            "block_count": 3,
            "attention.shared_kv_layers": 1,
            "attention.sliding_window": 4,
            "attention.sliding_window_pattern": [S, S, F],
        },
        [A, A, A],
        [2, 2, 0],
    ),
]


@pytest.mark.parametrize(("arch", "keys", "recurrent", "kv"), RECURRENT)
def test_recurrent_layers_and_caches(
    arch: str, keys: dict[str, Any], recurrent: list[bool], kv: list[int]
) -> None:
    m = _model(arch, keys)
    assert (m.recurrent_layers, m.n_head_kv) == (tuple(recurrent), tuple(kv))


def test_linear_attention_is_recurrent() -> None:
    m = _model("qwen3next", {**HEADS, "block_count": 4}, ("blk.0.attn_qkv.weight", "blk.3.attn_q.weight"))
    assert [t.role for t in m.tensors] == [Role.RECURRENT, Role.ATTENTION]


def test_latent_attention_only_with_absorbed_weights() -> None:
    old = {**HEADS, "block_count": 1, "attention.kv_lora_rank": 512, "attention.key_length": 192}
    assert _model("deepseek2", old).kv_lora_rank == 0
    new = {**old, "attention.key_length_mla": 192, "attention.value_length_mla": 128}
    assert _model("deepseek2", new).kv_lora_rank == 512


def test_defaults() -> None:
    m = _model("llama", {})
    assert (m.n_layers, m.n_embd, m.n_vocab, m.context_length, m.quantization) == (0, 0, 4, 0, "F32")
    assert m.tied_output and m.name == "<memory>" and m.chat_template is None
    assert not _model("llama", {}, ("token_embd.weight", "output.weight")).tied_output
    assert _model("llama", {}, ("blk.7.attn_q.weight",)).n_layers == 8
    assert _model("qwen2moe", {}, ("blk.0.ffn_up_shexp.weight",)).n_expert_shared == 1
    assert _model("llama", {**HEADS, "block_count": 1, "vocab_size": 77}).n_vocab == 77
    assert _model("llama", {**HEADS, "block_count": 1}).n_rot == 64
