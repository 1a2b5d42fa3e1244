"""Which weights can stay on the drive while the model runs."""

from __future__ import annotations

import re

from tensortier.types import Role, Tensor

DEVICE = "TIER"  # what overrides call the drive

# Roles of weights that are used whole, in the order in which llama.cpp computes them.
ORDER = (
    Role.ATTENTION,
    Role.RECURRENT,
    Role.SHARED_EXPERT,
    Role.FFN_UP,
    Role.FFN_GATE,
    Role.FFN_DOWN,
    Role.OUTPUT,
)
EXPERT_WEIGHT = re.compile(r"blk\.\d+\.ffn_(?:gate_up|up|gate|down)_(exps|chexps)\.(weight|bias)")
_DENSE_WEIGHT = re.compile(r"(?:blk\.\d+\.(?:attn|ffn|ssm)_[a-z0-9_]+|output)\.weight")


def can_page(tensor: Tensor) -> bool:
    """Whether a weight can stay on the drive: those that are only ever multiplied with, which are nearly all
    bytes of a model. (Of the embedding single rows are looked up; norms and biases are small.)"""
    if tensor.role.is_routed_expert:
        return bool(EXPERT_WEIGHT.fullmatch(tensor.name)) and len(tensor.shape) in (2, 3)
    return (
        tensor.role in ORDER
        and len(tensor.shape) >= 2
        and tensor.shape[1] > 1
        and bool(_DENSE_WEIGHT.fullmatch(tensor.name))
        and not tensor.name.endswith((".ssm_conv1d.weight", ".ssm_a.weight"))
    )
