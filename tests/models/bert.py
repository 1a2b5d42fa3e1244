"""A small encoder with random weights, BERT's architecture and tokenizer: it only makes embeddings."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

WORDS = ["the", "sea", "is", "blue", "hello", "world", "a", "##s", "##a", "light", "house", "."]
TOKENS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *(f"\u2581{w}".replace("\u2581##", "") for w in WORDS),
]
WIDTH, HEADS, LAYERS, FEED_FORWARD, CONTEXT = 64, 4, 2, 128, 64


def build(path: Path, pooling: int) -> Path:
    """``pooling``: gguf.PoolingType."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType(pooling))
    writer.add_tokenizer_model("bert")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 5 + [1] * len(WORDS))  # control, normal
    writer.add_token_type_count(2)
    writer.add_bos_token_id(2)
    writer.add_sep_token_id(3)
    writer.add_eos_token_id(3)
    writer.add_unk_token_id(1)
    writer.add_pad_token_id(0)

    def add(name: str, *shape: int) -> None:
        scale = 1.0 if name.startswith(("token_", "position")) else shape[-1] ** -0.5
        writer.add_tensor(name, rng.normal(0, scale, shape).astype(np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(WIDTH, np.float32))

    add("token_embd.weight", len(TOKENS), WIDTH)
    add("token_types.weight", 2, WIDTH)
    add("position_embd.weight", CONTEXT, WIDTH)
    norm("token_embd_norm")
    for i in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{part}.weight", WIDTH, WIDTH)
            add(f"blk.{i}.{part}.bias", WIDTH)
        norm(f"blk.{i}.attn_output_norm")
        add(f"blk.{i}.ffn_up.weight", FEED_FORWARD, WIDTH)
        add(f"blk.{i}.ffn_up.bias", FEED_FORWARD)
        add(f"blk.{i}.ffn_down.weight", WIDTH, FEED_FORWARD)
        add(f"blk.{i}.ffn_down.bias", WIDTH)
        norm(f"blk.{i}.layer_output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
