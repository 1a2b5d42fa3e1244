"""How many experts a budget of RAM holds, and how much of other weights: the rules of native/sharing.cpp and
native/dense_store.cpp once more, for planning, which loads no native library. The tests hold them against each other.

The store shares its memory out among slots for experts that stay, of each layer as many as of any other, and a few
places for parts of those that pass through. What an expert takes depends on where it lies in the file, because whole
sectors are read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from tensortier.errors import UsageError
from tensortier.pageable import EXPERT_WEIGHT
from tensortier.types import ModelInfo, Tensor

# A drive may do with less, 512 bytes: then slots are a little smaller, and there may be some more of them.
SECTOR = 4096
_LINE = 64  # of the processor's cache: the least that parts of a slot are aligned to
_PASSING_BYTES, _PASSING_SHARE = 24 << 20, 8  # as in sharing.cpp
_RING_WEIGHTS, _RING_BYTES, _RING_SHARE = 2, 32 << 20, 4  # as in dense_store.cpp


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
    """Bytes that one expert's part takes in RAM, of each tensor."""
    return tuple(_part(t.offset, t.nbytes // t.shape[2], t.shape[2], sector) for t in tensors)


@functools.lru_cache(maxsize=1 << 12)  # a planner asks for each choice of settings
def _part(offset: int, one: int, experts: int, sector: int) -> int:
    """Bytes that ``one`` expert's part of a tensor takes in RAM: the most that whole sectors make of it."""
    alignment = max(sector, _LINE)
    area = offset % sector + one
    for begin in range(offset, offset + experts * one, max(one, 1)):
        area = max(area, -(-(begin + one) // sector) * sector - begin // sector * sector)
    return -(-area // alignment) * alignment


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


def dense_stays(tensors: Sequence[Tensor], nbytes: int, sector: int = SECTOR) -> int:
    """Bytes of weights, of those that are used whole, that stay in RAM. The rest of the room is a ring through which
    the others pass: whatever it holds is read again for the next token.

    Args:
        tensors: the weights on the drive that are no experts', in the order of use.
        nbytes: the budget for them (``types.Tier.dense_bytes``).
        sector: bytes that the drive reads at least.
    """
    areas = [_area(tensor, sector) for tensor in tensors]
    total = sum(areas)
    if nbytes >= total:
        return sum(tensor.nbytes for tensor in tensors)
    ring = min(nbytes, max(_RING_WEIGHTS * max(areas), min(_RING_BYTES, nbytes // _RING_SHARE)))
    room = nbytes - ring
    # evenly over the order of use, and then what rounding left over
    stay, taken, due = set[int](), 0, 0.0
    for i, area in enumerate(areas):
        due += room / total * area
        if taken + area <= room and taken + area / 2 <= due:
            stay.add(i)
            taken += area
    for i, area in enumerate(areas):
        if i not in stay and taken + area <= room:
            stay.add(i)
            taken += area
    return sum(tensors[i].nbytes for i in stay)


def _area(tensor: Tensor, sector: int) -> int:
    """Bytes that a whole weight takes in RAM: whole sectors."""
    end = -(-(tensor.offset + tensor.nbytes) // sector) * sector
    return -(-(end - tensor.offset // sector * sector) // SECTOR) * SECTOR
