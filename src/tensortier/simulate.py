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
from tensortier.errors import UsageError
from tensortier.routing import Trace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POLICIES = tier.POLICIES
# The optimum with room of each layer's own, as most policies have it, and with room that all layers share.
BOUNDS = ("belady-per-layer", "belady")
SHARED = ("global-lru", "belady")  # those with one number of places for all layers
_NEVER = -1
_SAMPLE = (
    1024  # tokens that a planner's question is answered by: a second of replays is too long for a slider
)


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


class HitCurve:
    """Hit rates for a planner (``paging.HitRates``), of tokens generated one at a time.

    The tokens of a prompt count as if they had been generated. Policies are judged by the second half of the trace,
    once they have seen the first, by whose frequencies "static" goes: so no policy knows what comes.

    Args:
        path: where the trace is from.
    """

    policies = POLICIES  # the first is preferred among equals

    def __init__(self, trace: Trace, path: str) -> None:
        self.profile = path
        self.source = f"by the {trace.tokens} tokens of {path}"
        self._trace = trace
        self._single = _as_generated(trace)
        self._prepared: dict[tuple[int, ...], _Halves] = {}
        self._known: dict[tuple[object, ...], float] = {}

    def rate(self, policy: str, capacity: Sequence[int], layers: Sequence[int]) -> float:
        """Share of uses in ``layers`` (as the model counts them) that find their expert in RAM, 0 to 1, where
        ``capacity`` experts stay of each (one number for "global-lru").

        Raises:
            UsageError: the trace has no such layers, or the capacity does not fit the policy.
        """
        key = (policy, tuple(capacity), tuple(layers))
        if key not in self._known:
            self._known[key] = self._rate(policy, tuple(capacity), tuple(layers))
        return self._known[key]

    def _rate(self, policy: str, capacity: tuple[int, ...], layers: tuple[int, ...]) -> float:
        if layers not in self._prepared:
            self._prepared[layers] = self._halves(layers)
        found = self._prepared[layers]
        shape = (len(layers), self._trace.experts)
        if policy == "static":
            hits, uses = tier.replay(found.second, policy, capacity, shape, found.frequency)
            return float(hits.sum() / max(1, uses.sum()))
        hits, uses = tier.replay(found.both, policy, capacity, shape)
        before_hits, before_uses = tier.replay(found.first, policy, capacity, shape)
        return float((hits.sum() - before_hits.sum()) / max(1, uses.sum() - before_uses.sum()))

    def _halves(self, layers: tuple[int, ...]) -> _Halves:
        """Of the records of these layers, numbered anew."""
        import numpy as np

        if missing := set(layers) - set(self._trace.layers):
            raise UsageError(f"the trace has no experts of layer {min(missing)}")
        number = np.full(len(self._trace.layers), _NEVER, np.int32)
        number[[self._trace.layers.index(layer) for layer in layers]] = np.arange(len(layers), dtype=np.int32)
        rows = self._single.rows[number[self._single.rows[:, 0]] != _NEVER].copy()
        rows[:, 0] = number[rows[:, 0]]
        tokens = self._single.tokens[number[self._single.rows[:, 0]] != _NEVER]
        last = int(tokens[-1]) + 1
        middle = last - min(last, _SAMPLE) // 2
        earlier = rows[tokens < middle]
        frequency = tier.frequencies(earlier.ravel(), len(layers), self._trace.experts)
        recent = tokens >= last - _SAMPLE
        first, second = rows[recent & (tokens < middle)], rows[tokens >= middle]
        return _Halves(first.ravel(), second.ravel(), np.concatenate((first, second)).ravel(), frequency)


@dataclass(frozen=True, eq=False)
class _Halves:
    """Records as ``tier.replay`` takes them, and how often the first half and what was before it chose each expert."""

    first: NDArray[np.int32]
    second: NDArray[np.int32]
    both: NDArray[np.int32]
    frequency: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Single:
    """Records of one token each, [record, 3 + used], token after token, and the number of each record's token."""

    rows: NDArray[np.int32]
    tokens: NDArray[np.int64]


def _as_generated(trace: Trace) -> _Single:
    """The tokens of each micro-batch one after the other. Of the last layer llama.cpp may leave out the tokens whose
    result nobody asked for, which are the first ones."""
    import numpy as np

    parts: list[NDArray[np.int32]] = []
    tokens: list[NDArray[np.int64]] = []
    begin, before, width = 0, -1, 0  # of the micro-batch
    for group, ids in trace.passes():
        if group <= before:
            begin, width = begin + width, 0
        n = ids.size // trace.used
        if not n:
            continue
        width, before = max(width, n), group
        rows = np.empty((n, 3 + trace.used), np.int32)
        rows[:, :3] = (group, 1, trace.used)
        rows[:, 3:] = ids.reshape(n, trace.used)
        parts.append(rows)
        tokens.append(np.arange(begin + width - n, begin + width))
    rows, numbers = np.concatenate(parts), np.concatenate(tokens)
    order = np.lexsort((rows[:, 0], numbers))
    return _Single(rows[order], numbers[order])


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
