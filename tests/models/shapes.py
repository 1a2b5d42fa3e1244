"""The tensors and metadata that llama.cpp expects of an architecture, from a handful of numbers.

One generator for every architecture the tests use; names and shapes follow llama.cpp's ``load_arch_tensors``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Named = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (DeepSeek)."""

    q_lora: int
    kv_lora: int
    nope: int  # head dimensions without position
    rope: int
    value: int


@dataclass(frozen=True)
class DeltaNet:
    """Gated linear attention (Qwen3-Next): every layer but each ``interval``-th."""

    interval: int
    conv: int
    state: int
    k_heads: int
    v_heads: int


@dataclass(frozen=True)
class Shape:
    """All of an architecture's numbers. Dimensions in elements."""

    arch: str
    name: str
    n_layers: int
    n_embd: int
    n_vocab: int
    n_head: int
    n_head_kv: int
    n_ff: int
    head_dim: int = 0  # 0: n_embd / n_head
    n_ctx: int = 4096
    tied: bool = False  # no output.weight: the embedding serves
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norm: bool = False  # norms after attention and feed-forward (Gemma)
    n_expert: int = 0
    n_used: int = 0
    n_ff_exp: int = 0  # 0: n_ff
    n_ff_shared: int = 0  # 0: no shared expert
    shared_gate: bool = False
    expert_bias: bool = False  # biases on router, experts and attention output, attention sinks (gpt-oss)
    merged: bool = False  # gate and up of the experts in one tensor
    dense_lead: int = 0
    rope_freqs: bool = False
    mla: Mla | None = None
    delta: DeltaNet | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # further keys, without the architecture's prefix

    @property
    def d_head(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def d_ff_exp(self) -> int:
        return self.n_ff_exp or self.n_ff


def metadata(s: Shape) -> dict[str, Any]:
    """The keys llama.cpp reads, but for the vocabulary."""
    keys: dict[str, Any] = {
        "block_count": s.n_layers,
        "context_length": s.n_ctx,
        "embedding_length": s.n_embd,
        "feed_forward_length": s.n_ff,
        "attention.head_count": s.n_head,
        "attention.head_count_kv": s.n_head_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": s.n_vocab,
        "rope.dimension_count": s.d_head,
    }
    if s.head_dim:
        keys |= {"attention.key_length": s.head_dim, "attention.value_length": s.head_dim}
    if s.n_expert:
        keys |= {"expert_count": s.n_expert, "expert_used_count": s.n_used}
        if s.n_ff_exp:
            keys["expert_feed_forward_length"] = s.n_ff_exp
        if s.n_ff_shared:
            keys["expert_shared_feed_forward_length"] = s.n_ff_shared
    if s.dense_lead:
        keys["leading_dense_block_count"] = s.dense_lead
    if s.mla:
        keys |= {
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": s.mla.q_lora,
            "attention.kv_lora_rank": s.mla.kv_lora,
            "attention.key_length": s.mla.kv_lora + s.mla.rope,
            "attention.value_length": s.mla.kv_lora,
            "attention.key_length_mla": s.mla.nope + s.mla.rope,
            "attention.value_length_mla": s.mla.value,
            "rope.dimension_count": s.mla.rope,
        }
    if s.delta:
        keys |= {
            "full_attention_interval": s.delta.interval,
            "ssm.conv_kernel": s.delta.conv,
            "ssm.inner_size": s.delta.state * s.delta.v_heads,
            "ssm.state_size": s.delta.state,
            "ssm.time_step_rank": s.delta.v_heads,
            "ssm.group_count": s.delta.k_heads,
        }
    keys |= s.extra
    return {"general.name": s.name} | {f"{s.arch}.{key}": value for key, value in keys.items()}


def tensors(s: Shape) -> Iterator[Named]:
    """``(name, shape in ggml's order)`` of every tensor, by layer."""
    yield "token_embd.weight", (s.n_embd, s.n_vocab)
    if not s.tied:
        yield "output.weight", (s.n_embd, s.n_vocab)
    yield "output_norm.weight", (s.n_embd,)
    if s.rope_freqs:
        yield "rope_freqs.weight", (s.d_head // 2,)
    for layer in range(s.n_layers):
        for name, shape in _block(s, layer):
            yield f"blk.{layer}.{name}", shape


def _block(s: Shape, layer: int) -> Iterator[Named]:
    yield "attn_norm.weight", (s.n_embd,)
    if s.delta and (layer + 1) % s.delta.interval:
        yield from _delta_net(s, s.delta)
    elif s.mla:
        yield from _latent_attention(s, s.mla)
    else:
        yield from _attention(s)
    # Qwen3-Next and gpt-oss call the norm before the feed-forward by this name
    if s.arch in ("qwen3next", "gpt-oss"):
        yield "post_attention_norm.weight", (s.n_embd,)
    else:
        yield "ffn_norm.weight", (s.n_embd,)
    if s.post_norm:
        yield "post_attention_norm.weight", (s.n_embd,)
        yield "post_ffw_norm.weight", (s.n_embd,)
    if s.n_expert and layer >= s.dense_lead:
        yield from _experts(s)
    else:
        yield from _ffn("", s.n_embd, s.n_ff)


def _attention(s: Shape) -> Iterator[Named]:
    q, kv = s.n_head * s.d_head, s.n_head_kv * s.d_head
    # Qwen3-Next's query projection carries the output gate as well
    yield "attn_q.weight", (s.n_embd, 2 * q if s.delta else q)
    yield "attn_k.weight", (s.n_embd, kv)
    yield "attn_v.weight", (s.n_embd, kv)
    yield "attn_output.weight", (q, s.n_embd)
    if s.qkv_bias:
        yield from (("attn_q.bias", (q,)), ("attn_k.bias", (kv,)), ("attn_v.bias", (kv,)))
    if s.qk_norm:
        yield from (("attn_q_norm.weight", (s.d_head,)), ("attn_k_norm.weight", (s.d_head,)))
    if s.expert_bias:
        yield from (("attn_output.bias", (s.n_embd,)), ("attn_sinks.weight", (s.n_head,)))


def _latent_attention(s: Shape, m: Mla) -> Iterator[Named]:
    yield "attn_q_a_norm.weight", (m.q_lora,)
    yield "attn_kv_a_norm.weight", (m.kv_lora,)
    yield "attn_q_a.weight", (s.n_embd, m.q_lora)
    yield "attn_q_b.weight", (m.q_lora, s.n_head * (m.nope + m.rope))
    yield "attn_kv_a_mqa.weight", (s.n_embd, m.kv_lora + m.rope)
    yield "attn_k_b.weight", (m.nope, m.kv_lora, s.n_head)
    yield "attn_v_b.weight", (m.kv_lora, m.value, s.n_head)
    yield "attn_output.weight", (s.n_head * m.value, s.n_embd)


def _delta_net(s: Shape, d: DeltaNet) -> Iterator[Named]:
    key, value = d.state * d.k_heads, d.state * d.v_heads
    yield "attn_qkv.weight", (s.n_embd, 2 * key + value)
    yield "attn_gate.weight", (s.n_embd, value)
    yield "ssm_conv1d.weight", (d.conv, 2 * key + value)
    yield "ssm_dt.bias", (d.v_heads,)
    yield "ssm_a", (d.v_heads,)
    yield "ssm_ba.weight", (s.n_embd, 2 * d.v_heads)
    yield "ssm_norm.weight", (d.state,)
    yield "ssm_out.weight", (value, s.n_embd)


def _experts(s: Shape) -> Iterator[Named]:
    n, ff = s.n_expert, s.d_ff_exp
    yield "ffn_gate_inp.weight", (s.n_embd, n)
    if s.merged:
        yield "ffn_gate_up_exps.weight", (s.n_embd, 2 * ff, n)
    else:
        yield "ffn_gate_exps.weight", (s.n_embd, ff, n)
        yield "ffn_up_exps.weight", (s.n_embd, ff, n)
    yield "ffn_down_exps.weight", (ff, s.n_embd, n)
    if s.expert_bias:
        yield "ffn_gate_inp.bias", (n,)
        yield from (("ffn_gate_exps.bias", (ff, n)), ("ffn_up_exps.bias", (ff, n)))
        yield "ffn_down_exps.bias", (s.n_embd, n)
    if s.arch == "deepseek2":
        yield "exp_probs_b.bias", (n,)
    if s.n_ff_shared:
        if s.shared_gate:
            yield "ffn_gate_inp_shexp.weight", (s.n_embd,)
        yield from _ffn("_shexp", s.n_embd, s.n_ff_shared)


def _ffn(suffix: str, n_embd: int, n_ff: int) -> Iterator[Named]:
    yield f"ffn_gate{suffix}.weight", (n_embd, n_ff)
    yield f"ffn_up{suffix}.weight", (n_embd, n_ff)
    yield f"ffn_down{suffix}.weight", (n_ff, n_embd)
