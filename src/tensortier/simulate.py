"""Cache policies on recorded routing: what each of them would have found in RAM, and the most that any could have.

The policies are replayed by the native code that decides while a model runs (``tier.replay``). The bound is Belady's
optimum, computed here: who is used again last leaves, or does not come in. Every expert counts as one, whatever its
bytes, and may pass through without staying.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensortier import tier
from tensortier.routing import Trace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POLICIES = tier.POLICIES
# The optimum with room of each layer's own, as most policies have it, and with room that all layers share.
BOUNDS = ("belady-per-layer", "belady")
SHARED = ("global-lru", "belady")  # those with one number of places for all layers
_NEVER = -1


@dataclass(frozen=True)
class Outcome:
    """One policy at one size."""

    policy: str  # of POLICIES or BOUNDS
    capacity: tuple[int, ...]  # experts that stay of each layer; one number where all layers share
    hits: tuple[int, ...]  # per layer with experts
    uses: tuple[int, ...]  # distinct experts, summed over passes

    @property
    def hit_rate(self) -> float:
        """0 to 1."""
        return sum(self.hits) / sum(self.uses) if sum(self.uses) else 0.0


def token_cycle(trace: Trace) -> int:
    """Experts that one token uses over all layers. With less room a plain LRU over all layers finds hardly
    anything: each expert leaves before its layer's turn comes again."""
    return len(trace.layers) * trace.used


def evenly(trace: Trace, share: float) -> tuple[int, ...]:
    """Places for each layer that together hold ``share`` (0 to 1) of all experts; the first layers get what is left
    over, as in the store."""
    groups, experts = trace.shape
    each, more = divmod(round(share * groups * experts), groups)
    return tuple(each + (group < more) for group in range(groups))


def same_room(per_layer: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The capacity of every policy and bound where all have the same number of places."""
    shared = (sum(per_layer),)
    return {name: shared if name in SHARED else tuple(per_layer) for name in (*POLICIES, *BOUNDS)}


class Simulator:
    """A trace, ready to be replayed at any size.

    Args:
        frequency: ``[layer, expert]`` that policy "static" goes by; None: how often this very trace chose each, which
            nobody can know beforehand.
    """

    def __init__(self, trace: Trace, frequency: NDArray[np.float64] | None = None) -> None:
        self.trace = trace
        self._frequency = tier.frequencies(trace.records, *trace.shape) if frequency is None else frequency
        self._groups, self._passes = _distinct(trace)
        self._next = _next_uses(self._passes)

    def run(self, capacity: Mapping[str, tuple[int, ...]], policies: Sequence[str]) -> tuple[Outcome, ...]:
        """Each of ``policies`` (of POLICIES and BOUNDS) with its capacity.

        Raises:
            UsageError: no such policy, or a capacity that does not fit it.
        """
        return tuple(self._one(policy, capacity[policy]) for policy in policies)

    def _one(self, policy: str, capacity: tuple[int, ...]) -> Outcome:
        if policy in BOUNDS:
            hits, uses = self._optimum(capacity)
            return Outcome(policy, capacity, tuple(hits), tuple(uses))
        counted = tier.replay(self.trace.records, policy, capacity, self.trace.shape, self._frequency)
        return Outcome(policy, capacity, *(tuple(int(n) for n in numbers) for numbers in counted))

    def _optimum(self, capacity: Sequence[int]) -> tuple[list[int], list[int]]:
        """Hits and uses of each layer at their greatest. From one use of an expert to its next is an interval, and a
        hit is one that was kept; at no time more may be kept than there is room. Dropping the one that ends last
        keeps as many as can be (Belady 1966; as interval scheduling on several machines)."""
        groups = len(self.trace.layers)
        shared = len(capacity) == 1
        hits, uses = [0] * groups, [0] * groups
        kept: list[dict[int, int]] = [{} for _ in capacity]  # expert's key -> the pass of its next use
        last: list[list[tuple[int, int]]] = [
            [] for _ in capacity
        ]  # heaps of (-pass, key); some are out of date
        for group, keys, after in zip(self._groups, self._passes, self._next, strict=True):
            domain = 0 if shared else group
            here, heap = kept[domain], last[domain]
            uses[group] += len(keys)
            hits[group] += sum(key in here for key in keys)
            for key, use in zip(keys, after, strict=True):
                if use == _NEVER:
                    here.pop(key, None)
                else:
                    here[key] = use
                    heapq.heappush(heap, (-use, key))
            while len(here) > capacity[domain]:
                use, key = heapq.heappop(heap)
                if here.get(key) == -use:
                    del here[key]
        return hits, uses


def _distinct(trace: Trace) -> tuple[list[int], list[list[int]]]:
    """Of each pass the layer's number and the keys (unique over all layers) of the experts it uses, each once."""
    groups: list[int] = []
    passes: list[list[int]] = []
    for group, ids in trace.passes():
        groups.append(group)
        passes.append([group * trace.experts + expert for expert in dict.fromkeys(ids.tolist())])
    return groups, passes


def _next_uses(passes: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each use of an expert the pass in which it is used again, or _NEVER."""
    coming: dict[int, int] = {}
    found: list[list[int]] = []
    for number in range(len(passes) - 1, -1, -1):
        found.append([coming.get(key, _NEVER) for key in passes[number]])
        coming.update(dict.fromkeys(passes[number], number))
    found.reverse()
    return found
