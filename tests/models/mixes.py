"""Which type each tensor gets in a quantization mix: the rules of llama.cpp's ``llama-quant.cpp``.

Covers the mixes the skeletons need (Q3_K_M, Q4_K_M, IQ4_XS without an importance matrix, MXFP4_MOE) for
architectures without rules of their own, from ``llama_tensor_get_type_impl``, ``tensor_type_fallback`` and
``tensor_allows_quantization``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import gguf

BASE = {"Q3_K_M": "Q3_K", "Q4_K_M": "Q4_K", "IQ4_XS": "IQ4_XS", "MXFP4_MOE": "MXFP4"}
FILE_TYPE = {"Q3_K_M": 12, "Q4_K_M": 15, "IQ4_XS": 30, "MXFP4_MOE": 38}  # enum llama_ftype
FALLBACK = {"IQ4_XS": "IQ4_NL", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# tensor_get_category: the first that is found in the name
CATEGORIES = {
    "attn_qkv.weight": "v",
    "attn_kv_b.weight": "v",
    "attn_v.weight": "v",
    "attn_k.weight": "k",
    "attn_q.weight": "q",
    "attn_output.weight": "attn_output",
    "ffn_up": "up",
    "ffn_gate": "gate",
    "ffn_down": "down",
}


def assign(
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    mix: str,
    *,
    n_layers: int,
    n_head: int,
    n_head_kv: int,
    n_expert: int = 0,
    is_70b: bool = False,
) -> list[str]:
    """The type of each ``(name, ggml shape)``, in the order given, which must be by layer as in a file."""
    tied = all(name != "output.weight" for name, _ in tensors)
    n_v = sum(_category(name) == "v" for name, _ in tensors)
    gqa = n_head // n_head_kv
    i_v = i_down = 0
    types = []
    for name, shape in tensors:
        category = _category(name)
        if not _quantized(name, shape):
            types.append("F32")
            continue
        kind = BASE[mix]
        if category == "output" or (tied and category == "embedding"):
            kind = "Q8_0" if mix == "MXFP4_MOE" else "Q6_K"
        elif mix == "MXFP4_MOE":
            kind = "MXFP4" if len(shape) > 2 else "Q8_0"
        elif category == "v":
            kind = _value(kind, mix, i_v, n_v, gqa, is_70b, n_expert)
            i_v += 1
        elif category == "k" and n_expert == 8:
            kind = "Q8_0"
        elif category == "down":
            # a mixture's layer is read from the name, a dense model's is counted
            layer = int(name.split(".")[1]) if n_expert > 1 else i_down
            kind = _down(kind, mix, layer, n_layers)
            i_down += 1
        elif category == "attn_output":
            if n_expert == 8:
                kind = "Q5_K"
            elif mix == "Q3_K_M":
                kind = "Q4_K"
        types.append(_fitting(kind, shape[0]))
    return types


def _value(kind: str, mix: str, i: int, n: int, gqa: int, is_70b: bool, n_expert: int) -> str:
    if mix == "Q3_K_M":
        kind = "Q5_K" if i < 2 else "Q4_K"
    elif mix == "IQ4_XS" and gqa >= 4:
        kind = "Q5_K"
    elif mix == "Q4_K_M" and _more_bits(i, n):
        kind = "Q6_K"
    if is_70b and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    return "Q8_0" if n_expert == 8 else kind


def _down(kind: str, mix: str, layer: int, n_layers: int) -> str:
    if mix == "Q3_K_M":
        return "Q5_K" if layer < n_layers // 16 else "Q4_K"
    if mix == "Q4_K_M" and _more_bits(layer, n_layers):
        return "Q6_K"
    if mix == "IQ4_XS" and layer < n_layers // 8:
        return "Q5_K"
    return kind


def _more_bits(i: int, n: int) -> bool:
    # C's remainder keeps the sign of the dividend, but then the first condition holds already
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name == "token_embd.weight":
        return "embedding"
    return next((category for part, category in CATEGORIES.items() if part in name), "other")


def _quantized(name: str, shape: tuple[int, ...]) -> bool:
    kept = r"_norm\.weight$|ffn_gate_inp\.weight$|ssm_conv1d"
    return len(shape) > 1 and name.endswith("weight") and not re.search(kept, name)


def _fitting(kind: str, row: int) -> str:
    """``kind``, or its replacement where rows are no multiple of the block."""
    for candidate in (kind, FALLBACK.get(kind, kind)):
        if row % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[candidate]][0] == 0:
            return candidate
    return "F16"
