"""Where every tensor of a model lives and why, small enough to send for each position of the slider."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tensortier import paging, placement
from tensortier.pageable import DEVICE
from tensortier.types import ModelInfo, Placement, Plan, Role, Tensor, Tier

CPU = "CPU"
# one character for each place; more places than this have never been seen in one plan
_CODES = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SMALL = (Role.NORM, Role.ROUTER, Role.OTHER)


@dataclasses.dataclass(frozen=True)
class Place:
    device: str  # "TIER" is the drive
    reason: str  # one sentence


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """``codes`` has one character for each tensor of the model, in the file's order: the index of its place in base 62
    (0 to 9, a to z, A to Z)."""

    places: tuple[Place, ...]
    codes: str


def tensor_map(
    model: ModelInfo, place: Placement, tier: Tier | None, free: Mapping[str, int], gpus: Sequence[str]
) -> TensorMap:
    """``free``: bytes per device, by which layers are shared out where the placement gives no shares. ``gpus``: that
    layers could have been offloaded to."""
    where = placement.resolve(model, place, free)
    layers = placement.layer_devices(model, place, free)
    shares = _kept(model, place, tier, free)
    numbers: dict[Place, int] = {}
    codes = []
    for tensor in model.tensors:
        device = where[tensor.name]
        home = layers[-1] if tensor.layer is None else layers[min(tensor.layer, len(layers) - 1)]
        reason = (
            _drive(model, tensor, shares) if device == DEVICE else _reason(model, tensor, device, home, gpus)
        )
        codes.append(_CODES[numbers.setdefault(Place(device, reason), len(numbers))])
    return TensorMap(tuple(numbers), "".join(codes))


def _kept(
    model: ModelInfo, place: Placement, tier: Tier | None, free: Mapping[str, int]
) -> tuple[float, float]:
    """Shares of the experts and of the other weights on the drive that RAM holds."""
    if tier is None:
        return 0.0, 0.0
    experts, dense = paging.paged_bytes(model, Plan(model.path, place, tier=tier), free)
    return tier.expert_bytes / max(1, experts), tier.dense_bytes / max(1, dense)


def _drive(model: ModelInfo, tensor: Tensor, shares: tuple[float, float]) -> str:
    experts, dense = shares
    if tensor.role.is_routed_expert:
        return (
            f"On the drive: a token uses {model.n_expert_used} of {model.n_expert} experts, and RAM holds "
            f"{_percent(experts)} of all experts at a time."
        )
    return (
        f"On the drive: RAM keeps {_percent(dense)} of such weights, the rest is read again for every token."
    )


def _percent(share: float) -> str:
    share = min(1.0, share)
    return f"{share:.0%}" if share >= 0.01 or not share else "less than 1%"


def _reason(model: ModelInfo, tensor: Tensor, device: str, home: str, gpus: Sequence[str]) -> str:
    if tensor.role is Role.EMBEDDING and tensor.layer is None:
        told = "One row is looked up for each token: the embedding stays in RAM."
        if model.tied_output and home != CPU and tensor.name == "token_embd.weight":
            told += f" It makes the answer's probabilities too, for which {home} holds a copy."
        return told
    if not gpus:
        return "There is no GPU here: computed by the CPU, from RAM."
    if tensor.layer is None:
        if device == home:
            return f"Belongs to the output layer, which is {_on(home)}."
        return f"The output layer is {_on(home)}, but this did not fit beside it."
    if device == home == CPU:
        return (
            f"There is no room for this layer on {_either(gpus)}: it is in RAM with its part of the KV cache."
        )
    if device == home:
        if tensor.role is Role.ATTENTION:
            return f"Attention is computed where its KV cache is: on {home}."
        if tensor.role in _SMALL:
            return f"Small: it goes with its layer, on {home}."
        return f"Fits on {home}, beside the attention and KV cache of its layer."
    if device == CPU:
        if tensor.role.is_routed_expert:
            return (
                f"Experts are used in part only, so they are the first to leave {home}: these are in RAM, where the "
                "CPU computes them."
            )
        return (
            f"Attention and KV cache of this layer are worth more on {home}; this did not fit beside them and is "
            "computed by the CPU, from RAM."
        )
    return f"{device} has room for it, though its layer is {_on(home)}: computing it there is faster."


def _on(device: str) -> str:
    return "in RAM" if device == CPU else f"on {device}"


def _either(names: Sequence[str]) -> str:
    return " or ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
