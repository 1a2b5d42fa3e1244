"""How many experts a budget of RAM holds: the rule of native/sharing.cpp once more, for planning, which loads no native
library. The tests hold the two against each other.

The store shares its memory out among slots for experts that stay, of each layer as many as of any other, and a few
places for parts of those that pass through. What an expert takes depends on where it lies in the file, because whole
sectors are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensortier.errors import UsageError
from tensortier.pageable import EXPERT_WEIGHT
from tensortier.types import ModelInfo, Tensor

# A drive may do with less, 512 bytes: then slots are a little smaller, and there may be some more of them.
SECTOR = 4096
_LINE = 64  # of the processor's cache: the least that parts of a slot are aligned to
_PASSING_BYTES, _PASSING_SHARE = 24 << 20, 8  # as in sharing.cpp


@dataclass(frozen=True)
class Layer:
    """One layer's routed experts."""

    number: int  # as the model counts them
    experts: int
    nbytes: int  # of all of them
    parts: tuple[int, ...]  # bytes that one expert takes in RAM, of each of its matrices

    @property
    def slot_bytes(self) -> int:
        """That one expert takes in RAM."""
        return sum(self.parts)


def layers_of(model: ModelInfo, paged: Sequence[Tensor], sector: int = SECTOR) -> tuple[Layer, ...]:
    """The layers with routed experts on the drive, in the order in which the store and its traces count them.

    Args:
        paged: the weights on the drive in the order of use (``tier.paged_tensors``).
        sector: bytes that the drive reads at least.
    """
    parts: dict[tuple[int, str], list[Tensor]] = {}
    for tensor in paged:
        found = EXPERT_WEIGHT.fullmatch(tensor.name)
        if found and found[2] == "weight" and tensor.layer is not None:
            parts.setdefault((tensor.layer, found[1]), []).append(tensor)
    return tuple(
        Layer(number, tensors[0].shape[2], sum(t.nbytes for t in tensors), _areas(tensors, sector))
        for (number, _), tensors in parts.items()
    )


def _areas(tensors: Sequence[Tensor], sector: int) -> tuple[int, ...]:
    """Bytes that one expert's part takes in RAM, of each tensor: the most that whole sectors make of it."""
    alignment = max(sector, _LINE)
    areas = []
    for tensor in tensors:
        one = tensor.nbytes // tensor.shape[2]
        area = tensor.offset % sector + one
        for expert in range(tensor.shape[2]):
            begin = tensor.offset + expert * one
            area = max(area, -(-(begin + one) // sector) * sector - begin // sector * sector)
        areas.append(-(-area // alignment) * alignment)
    return tuple(areas)


def capacities(layers: Sequence[Layer], used: int, policy: str, nbytes: int) -> tuple[int, ...]:
    """Experts that stay of each layer, or for "global-lru" one number for all layers together.

    Args:
        used: experts that a token uses in a layer.
        nbytes: the budget for experts (``types.Tier.expert_bytes``).

    Raises:
        UsageError: not even one layer's experts of one token fit.
    """
    largest = max(layer.slot_bytes for layer in layers)
    most = max(layer.experts for layer in layers)
    used = min(used, most)
    if nbytes < largest * used:
        raise UsageError(
            f"{nbytes} bytes for experts are too few: those of one token in one layer take {largest * used}"
        )
    shared = policy == "global-lru"
    if nbytes >= sum(layer.slot_bytes * layer.experts for layer in layers) and not shared:
        return tuple(layer.experts for layer in layers)
    part = max(max(layer.parts) for layer in layers)
    passing = max(min(_PASSING_BYTES, nbytes // _PASSING_SHARE) // part, 2)
    if policy != "lru":  # where what a token misses may not stay
        of_a_token = used * max(len(layer.parts) for layer in layers)
        passing = max(passing, min(of_a_token, nbytes // 2 // part))
    left = nbytes - min(passing, nbytes // part) * part
    if shared:
        return (min(left // largest, sum(layer.experts for layer in layers)),)
    each = min(left // sum(layer.slot_bytes for layer in layers), most)
    counts = [min(each, layer.experts) for layer in layers]
    left -= sum(count * layer.slot_bytes for count, layer in zip(counts, layers, strict=True))
    for i, layer in enumerate(layers):
        if counts[i] < layer.experts and left >= layer.slot_bytes:
            counts[i] += 1
            left -= layer.slot_bytes
    return tuple(counts)
