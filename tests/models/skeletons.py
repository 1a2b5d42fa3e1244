"""Sparse GGUF files with the true shapes, types and metadata of well-known models, and no data.

They take a few hundred kilobytes of disk and load in llama.cpp with ``no_alloc``, so that questions of memory
are answered exactly for models that no test machine could hold. The vocabulary is left out (``no_vocab`` with
the true size), so they do not tokenize. Types follow today's llama.cpp without an importance matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.models import ggufio, mixes, shapes
from tests.models.shapes import DeltaNet, Mla, Shape


@dataclass(frozen=True)
class Skeleton:
    shape: Shape
    mix: str
    published: float  # bytes of a published file of this model and mix


_QWQ = Shape(
    "qwen2", "QwQ 32B", 64, 5120, 152064, 40, 8, 27648, n_ctx=131072, qkv_bias=True,
    extra={"rope.freq_base": 1e6},
)  # fmt: skip
_YARN = {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 4096}

# Dimensions are those of each model's config.json.
_ALL = {
    "qwq-32b-q3_k_m": Skeleton(_QWQ, "Q3_K_M", 15.94e9),
    "qwq-32b-iq4_xs": Skeleton(_QWQ, "IQ4_XS", 17.9e9),
    "gemma-2-27b-q4_k_m": Skeleton(
        Shape(
            "gemma2", "Gemma 2 27B It", 46, 4608, 256000, 32, 16, 36864, head_dim=128, n_ctx=8192, tied=True,
            post_norm=True,
            extra={
                "attention.sliding_window": 4096,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
        ),
        "Q4_K_M", 16.65e9,
    ),
    "gemma-3-12b-q4_k_m": Skeleton(
        Shape(
            "gemma3", "Gemma 3 12B It", 48, 3840, 262208, 16, 8, 15360, head_dim=256, n_ctx=131072, tied=True,
            post_norm=True, qk_norm=True,
            extra={
                "attention.sliding_window": 1024,
                "rope.freq_base": 1e6,
                "rope.scaling.type": "linear",
                "rope.scaling.factor": 8.0,
            },
        ),
        "Q4_K_M", 7.30e9,
    ),
    # 28.45e9: files made since llama.cpp gives ffn_down of mixtures its extra bits; 26.44e9 before
    "mixtral-8x7b-q4_k_m": Skeleton(
        Shape(
            "llama", "Mixtral 8x7B Instruct v0.1", 32, 4096, 32000, 32, 8, 14336, n_ctx=32768, n_expert=8,
            n_used=2, extra={"rope.freq_base": 1e6},
        ),
        "Q4_K_M", 28.45e9,
    ),
    "qwen3-30b-a3b-q4_k_m": Skeleton(
        Shape(
            "qwen3moe", "Qwen3 30B A3B", 48, 2048, 151936, 32, 4, 6144, head_dim=128, n_ctx=40960,
            qk_norm=True, n_expert=128, n_used=8, n_ff_exp=768, extra={"rope.freq_base": 1e6},
        ),
        "Q4_K_M", 18.56e9,
    ),
    "gpt-oss-120b-mxfp4": Skeleton(
        Shape(
            "gpt-oss", "Gpt Oss 120B", 36, 2880, 201088, 64, 8, 2880, head_dim=64, n_ctx=131072,
            qkv_bias=True, expert_bias=True, n_expert=128, n_used=4, n_ff_exp=2880,
            extra={"attention.sliding_window": 128, "rope.freq_base": 150000.0, "rope.scaling.factor": 32.0}
            | _YARN,
        ),
        "MXFP4_MOE", 63.4e9,
    ),
    "llama-3.3-70b-q4_k_m": Skeleton(
        Shape(
            "llama", "Llama 3.3 70B Instruct", 80, 8192, 128256, 64, 8, 28672, n_ctx=131072, rope_freqs=True,
            extra={"rope.freq_base": 500000.0},
        ),
        "Q4_K_M", 42.52e9,
    ),
    "deepseek-v3-q4_k_m": Skeleton(
        Shape(
            "deepseek2", "DeepSeek V3", 61, 7168, 129280, 128, 1, 18432, n_ctx=163840, n_expert=256, n_used=8,
            n_ff_exp=2048, n_ff_shared=2048, dense_lead=3, mla=Mla(1536, 512, 128, 64, 128),
            extra={
                "expert_shared_count": 1,
                "expert_group_count": 8,
                "expert_group_used_count": 4,
                "expert_weights_scale": 2.5,
                "expert_weights_norm": True,
                "expert_gating_func": 2,  # sigmoid
                "rope.scaling.factor": 40.0,
                "rope.scaling.yarn_log_multiplier": 0.1,
            }
            | _YARN,
        ),
        "Q4_K_M", 404.4e9,
    ),
    "qwen3-next-80b-a3b-q4_k_m": Skeleton(
        Shape(
            "qwen3next", "Qwen3 Next 80B A3B Instruct", 48, 2048, 151936, 16, 2, 5120, head_dim=256,
            n_ctx=262144, qk_norm=True, n_expert=512, n_used=10, n_ff_exp=512, n_ff_shared=512,
            shared_gate=True, delta=DeltaNet(4, 4, 128, 16, 32),
            extra={"rope.freq_base": 1e7, "rope.dimension_count": 64},
        ),
        "Q4_K_M", 48.5e9,
    ),
}  # fmt: skip

NAMES = tuple(_ALL)
VERSION = "1"  # part of the cache's key: raise it when a file's content changes


def get(name: str) -> Skeleton:
    """The description behind a name of :data:`NAMES`; KeyError for any other."""
    return _ALL[name]


def specs(name: str) -> list[ggufio.Spec]:
    """Every tensor of a skeleton, with its type."""
    skeleton = _ALL[name]
    s = skeleton.shape
    named = list(shapes.tensors(s))
    types = mixes.assign(
        named,
        skeleton.mix,
        n_layers=s.n_layers,
        n_head=s.n_head,
        n_head_kv=s.n_head_kv,
        n_expert=s.n_expert,
        is_70b=s.arch == "llama" and s.n_layers == 80,
    )
    return [ggufio.Spec(n, dims, kind) for (n, dims), kind in zip(named, types, strict=True)]


def build(name: str, path: Path) -> Path:
    """Write the skeleton ``name`` to ``path`` and return that."""
    skeleton = _ALL[name]
    keys = shapes.metadata(skeleton.shape) | {
        "general.file_type": mixes.FILE_TYPE[skeleton.mix],
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "no_vocab",
    }
    with ggufio.published(path) as temporary:
        ggufio.write_header(temporary, skeleton.shape.arch, keys, specs(name))
    return path
