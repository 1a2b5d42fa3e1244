"""What a tensor is for, from its name.

The names are those of ``LLM_TENSOR_NAMES`` in llama.cpp's ``src/llama-arch.cpp``, which all architectures
share. ``tests/golden/tensor_names.txt`` lists every one of them with the role that these rules give it.
"""

from __future__ import annotations

import re
from functools import lru_cache

from tensortier.types import Role

_BLOCK = re.compile(r"(?:(?:enc|dec)\.)?(?:blk|posnet|convnext)\.([0-9]{1,4})\.(.+)")
_SUFFIX = re.compile(r"\.(?:weight|bias|scale|scales|input_scale|lora_a|lora_b)$")

# The first rule that matches the whole stem (the name without block prefix and suffix) decides.
_RULES: tuple[tuple[re.Pattern[str], Role], ...] = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"ssm_.+|time_mix_.+|shortconv\..+|channel_mix_lerp_.+", Role.RECURRENT),
        (r"(?:.*[._])?(?:e|h|k_|q_)?norm[12]?(?:_(?:[12]|exps|key|query|conv))?", Role.NORM),
        (r"(?:attn|ffn|output)_res_score", Role.OTHER),
        (r"(?:cross_|vis_)?attn_.+|indexer\..+|indexer_compressor_.+", Role.ATTENTION),
        (r"ffn_gate_inp(?:_shexp)?|exp_probs_b(?:_vl)?|ffn_gate_tid2eid", Role.ROUTER),
        (r"ffn_(?:gate|up|down)_shexp", Role.SHARED_EXPERT),
        (r"ffn_gate_up_exps", Role.EXPERT_GATE_UP),
        (r"ffn_up(?:_exps|_chexps|\.[0-9]+)", Role.EXPERT_UP),
        (r"ffn_gate(?:_exps|_chexps|\.[0-9]+)", Role.EXPERT_GATE),
        (r"ffn_down(?:_exps|_chexps|\.[0-9]+)", Role.EXPERT_DOWN),
        # Projections around narrow routed experts (Nemotron 3, Kimi K3) are used by every token: dense.
        (r"ffn_up|vis_up|ffn_(?:latent|routed)_up|channel_mix_key", Role.FFN_UP),
        (r"ffn_gate|vis_gate|channel_mix_receptance", Role.FFN_GATE),
        (r"ffn_down|vis_down|ffn_(?:latent|routed)_down|channel_mix_value", Role.FFN_DOWN),
        (r"token_embd|per_layer_token_embd|position_embd|token_types|nextn\.embed_tokens", Role.EMBEDDING),
        (r"output|cls|cls\.output|dense_[23]|nextn\.shared_head_head", Role.OUTPUT),
    )
)


@lru_cache(maxsize=4096)
def _stem_role(stem: str) -> Role:
    for pattern, role in _RULES:
        if pattern.fullmatch(stem):
            return role
    return Role.OTHER


def role_and_layer(name: str) -> tuple[Role, int | None]:
    """Role of the tensor ``name`` and the block it belongs to (None outside the blocks).

    Biases and scales have the role of the weight they go with. Names that llama.cpp does not know are OTHER.
    """
    block = _BLOCK.fullmatch(name)
    inner = block[2] if block else name.removeprefix("enc.").removeprefix("dec.")
    return _stem_role(_SUFFIX.sub("", inner)), int(block[1]) if block else None
