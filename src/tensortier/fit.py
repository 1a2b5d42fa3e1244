"""What llama.cpp's ``--fit`` would do: the placement it arrives at, by its own steps (common/fit.cpp).

Memory alone decides. In order: nothing to do where everything fits on the devices; a context that was left open
becomes shorter; layers go to the devices from the last one back, as many as fit, and of a mixture of experts
without their experts; then, where all of those found room, layers get their experts back from the first device on, and
each device may take a part of one more. How many fit is found by interpolation between too few and too many, with
llama.cpp's integer arithmetic, because where it stops depends on that.

Left out: drafting models that share the memory, the modes that split single tensors, and options that
``--fit`` refuses to work with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

from tensortier.memory import Answers
from tensortier.overrides import layers
from tensortier.placement import EXPERTS
from tensortier.types import DeviceMemory, ModelInfo, Override, Placement, Plan, Settings

MARGIN = 1 << 30  # bytes that --fit leaves free on every device
SHORTEST_CONTEXT = 4096  # to which it reduces one that was left open
_CONTEXT_STEP = 256


class _Keeps(Enum):
    """What of a layer stays on its device; the value is a pattern for what does not."""

    NO_EXPERTS = EXPERTS
    ATTENTION = r"\.ffn_(gate|up|gate_up|down).*"
    UP = r"\.ffn_(gate|gate_up|down).*"
    UP_AND_GATE = r"\.ffn_down.*"


@dataclasses.dataclass(frozen=True)
class _Share:
    """Of one device: ``n_layers`` layers, of which the first ``n_part`` are not there completely. The first of
    those keeps ``first`` and gives the rest to ``overflow``; the others give their experts to the CPU."""

    n_layers: int = 0
    n_part: int = 0
    first: _Keeps = _Keeps.NO_EXPERTS
    overflow: str = "CPU"

    @property
    def n_full(self) -> int:
        return self.n_layers - self.n_part

    def plus(self, n_layers: int, n_part: int) -> _Share:
        return dataclasses.replace(self, n_layers=self.n_layers + n_layers, n_part=self.n_part + n_part)


def fit(
    plan: Plan,
    model: ModelInfo,
    answers: Answers,
    free: Mapping[str, int],
    margins: Mapping[str, int] | None = None,
) -> Plan:
    """``plan`` with the placement, and the context where its settings have 0, that ``--fit`` would choose.

    ``free``: bytes per device, in llama.cpp's order; ``margins``: bytes it shall leave, ``MARGIN`` by default.
    Main memory is never looked at. The answer may still not fit: as in llama.cpp, no message says so here.
    """
    return _Fitter(plan, model, answers, free, margins or dict.fromkeys(free, MARGIN)).run()


class _Fitter:
    def __init__(
        self,
        plan: Plan,
        model: ModelInfo,
        answers: Answers,
        free: Mapping[str, int],
        margins: Mapping[str, int],
    ) -> None:
        self.model = model
        self.answers = answers
        self.devices = tuple(free)
        self.free = free
        self.targets = [free[d] - margins[d] for d in free]
        # without shares llama.cpp goes by free memory; they are written down, as that may differ at the load
        shares = tuple(float(size) for size in free.values())
        split = shares if len(free) > 1 and any(shares) else ()
        self.full = Placement(self.devices, -1, split) if free else Placement()
        self.plan = dataclasses.replace(plan, placement=self.full)
        # of layers that run: those that only draft are not counted
        self.n_layers = model.n_layers - model.n_layers_nextn

    def run(self) -> Plan:
        open_context = self.plan.settings.n_ctx == 0
        streams = max(1, self.plan.settings.n_seq_max)
        longest = self.model.context_length * streams
        if open_context:
            self._set_context(longest)
        rows = self._rows(self.full)
        if not self.devices:
            return self.plan  # main memory has no margin here
        used = self._totals(rows)
        if all(u <= target for u, target in zip(used, self.targets, strict=True)):
            return self.plan
        surplus = sum(self.targets) - sum(used)
        if surplus < 0 and open_context and longest > SHORTEST_CONTEXT * streams:
            weights = sum(row.weights_bytes for row in rows if row.device in self.free)
            if self._shorten(longest, streams, sum(used), weights):
                return self.plan
        return dataclasses.replace(self.plan, placement=self._place())

    # --- questions

    def _rows(self, place: Placement) -> Sequence[DeviceMemory]:
        return self.answers.ask(dataclasses.replace(self.plan, placement=place))

    def _totals(self, rows: Sequence[DeviceMemory]) -> list[int]:
        found = {row.device: row.total_bytes for row in rows}
        return [found.get(d, 0) for d in self.devices]

    def _memory(self, shares: Sequence[_Share]) -> list[int]:
        return self._totals(self._rows(self._placement(shares)))

    def _placement(self, shares: Sequence[_Share]) -> Placement:
        total = sum(share.n_layers for share in shares)
        begin = self.n_layers + 1 - total
        overrides = []
        without_experts: list[int] = []
        for share in shares:
            begin += share.n_full
            if share.n_part:
                if share.first is _Keeps.NO_EXPERTS:
                    without_experts.append(begin)
                else:
                    overrides.append(Override(rf"blk\.{begin}{share.first.value}", share.overflow))
                without_experts += range(begin + 1, begin + share.n_part)
            begin += share.n_part
        if without_experts:
            overrides.append(Override(rf"blk\.{layers(without_experts)}{EXPERTS}", "CPU"))
        split = tuple(float(share.n_layers) for share in shares)
        return Placement(
            self.devices,
            total,
            split if len(self.devices) > 1 and any(split) else (),
            tuple(overrides),
            self.plan.placement.kv_on_device,
        )

    # --- the steps

    def _set_context(self, n_ctx: int) -> None:
        settings: Settings = dataclasses.replace(self.plan.settings, n_ctx=n_ctx)
        self.plan = dataclasses.replace(self.plan, settings=settings)

    def _shorten(self, longest: int, streams: int, used: int, weights: int) -> bool:
        """Shortens the context by linear interpolation; True where that is all there is to do."""
        n = len(self.devices)
        target = sum(self.targets)
        if n > 1:
            # whole layers, or tensors of a third of a layer, are expected to leave half of one empty per device
            per_layer = weights // self.n_layers
            target -= (n + 1) * per_layer // (6 if self.model.is_moe else 2)
        shortest = SHORTEST_CONTEXT * streams
        self._set_context(shortest)
        least = sum(self._totals(self._rows(self.full)))
        if target <= least:
            return False
        n_ctx = shortest + (longest - shortest) * (target - least) // (used - least)
        self._set_context(max(n_ctx - n_ctx % (_CONTEXT_STEP * streams), shortest))
        return n <= 1

    def _place(self) -> Placement:
        surplus_without_experts = 0
        if self.model.is_moe:
            all_experts = (Override(r"blk\.\d+" + EXPERTS, "CPU"),)
            rows = self._rows(dataclasses.replace(self.full, overrides=all_experts))
            surplus_without_experts = sum(self.targets) - sum(self._totals(rows))
        shares, used = self._dense_layers()
        if self.model.is_moe and surplus_without_experts > 0:
            shares = self._full_layers(shares, used)
        return self._placement(shares)

    def _dense_layers(self) -> tuple[list[_Share], list[int]]:
        """As many layers as fit, from the last device back; of a mixture of experts without the experts. The last
        device's last layer is the output, which has none."""
        last = len(self.devices) - 1
        shares = [_Share() for _ in self.devices]
        used = self._memory(shares)
        for d in range(last, -1, -1):
            rest = self.n_layers + 1 - sum(share.n_layers for share in shares[d + 1 :])

            def with_more(shares: list[_Share], n: int, d: int = d) -> list[_Share]:
                n_part = 0
                if self.model.is_moe:
                    n_part = n - 1 if d == last and shares[d].n_part == 0 else n
                return _changed(shares, d, shares[d].plus(n, n_part))

            if rest == 0:
                continue
            high = with_more(shares, rest)
            used_high = self._memory(high)
            if used_high[d] <= self.targets[d]:
                shares, used = high, used_high
                continue
            shares, used = self._interpolate(d, shares, used, high, used_high, with_more, _n_layers)
        return shares, used

    def _full_layers(self, shares: list[_Share], used: list[int]) -> list[_Share]:
        """Gives layers their experts back, from the first device on. They move to that device from where they
        are without experts, which is from ``begin`` on."""
        last = len(self.devices) - 1
        begin = _first_partial(shares)
        for d in range(len(self.devices)):
            if d > begin:
                break
            high = list(shares)
            for other in range(begin, last + 1):
                n = high[other].n_layers - (other == last)
                high[d] = high[d].plus(n, 0)
                high[other] = dataclasses.replace(high[other], n_layers=high[other].n_layers - n, n_part=0)
            used_high = self._memory(high)

            def with_more(shares: list[_Share], n: int, d: int = d, begin: int = begin) -> list[_Share]:
                return _promoted(shares, d, n, _next_partial(shares, begin))

            if used_high[d] > self.targets[d]:
                before = shares
                shares, used = self._interpolate(d, shares, used, high, used_high, with_more, _n_full)
                if shares is not before:
                    begin = _next_partial(shares, begin)
            else:
                shares, used, begin = high, used_high, last
            if begin <= last and shares[begin].n_layers > (0 if d < last else 1):
                shares, used, begin = self._one_more(d, shares, used, begin)
        return shares

    def _one_more(
        self, d: int, shares: list[_Share], used: list[int], begin: int
    ) -> tuple[list[_Share], list[int], int]:
        """A part of one more layer on device ``d``; what it does not keep goes to the next device, after the last
        one to the CPU."""
        names = self.devices

        def tried(first: _Keeps) -> tuple[list[_Share], list[int], bool]:
            more = _changed(shares, begin, shares[begin].plus(-1, -1))
            overflow = names[d + 1] if d + 1 < len(names) else "CPU"
            share = dataclasses.replace(more[d].plus(1, 1), first=first, overflow=overflow)
            more = _changed(more, d, share)
            memory = self._memory(more)
            fits = all(memory[i] < self.targets[i] for i in (d, d + 1) if i < len(names))
            return more, memory, fits

        for attempts in ((_Keeps.UP, _Keeps.UP_AND_GATE), (_Keeps.ATTENTION,)):
            best = None
            for keeps in attempts:
                more, memory, fits = tried(keeps)
                if not fits:
                    break
                best = more, memory
            if best is not None:
                return best[0], best[1], begin + (best[0][begin].n_part == 0)
        return shares, used, begin

    def _interpolate(
        self,
        d: int,
        low: list[_Share],
        used_low: list[int],
        high: list[_Share],
        used_high: list[int],
        with_more: Callable[[list[_Share], int], list[_Share]],
        count: Callable[[_Share], int],
    ) -> tuple[list[_Share], list[int]]:
        """From ``low``, which fits on device ``d``, towards ``high``, which does not, until they differ by one
        layer: the method of false position, in llama.cpp's integers."""
        delta = count(high[d]) - count(low[d])
        while delta > 1:
            gained, span = delta * (self.targets[d] - used_low[d]), used_high[d] - used_low[d]
            step = abs(gained) // abs(span)
            if step and (gained < 0) != (span < 0):
                step = delta  # a negative step is a huge one in the unsigned integer it is put in
            test = with_more(low, min(max(step, 1), delta - 1))
            used = self._memory(test)
            if used[d] <= self.targets[d]:
                low, used_low = test, used
            else:
                high, used_high = test, used
            delta = count(high[d]) - count(low[d])
        return low, used_low


def _changed(shares: Sequence[_Share], d: int, share: _Share) -> list[_Share]:
    return [share if i == d else other for i, other in enumerate(shares)]


def _n_layers(share: _Share) -> int:
    return share.n_layers


def _n_full(share: _Share) -> int:
    return share.n_full


def _first_partial(shares: Sequence[_Share]) -> int:
    """The first of the devices at the end that all have layers."""
    begin = len(shares)
    while begin and shares[begin - 1].n_layers > 0:
        begin -= 1
    return begin


def _next_partial(shares: Sequence[_Share], begin: int) -> int:
    """The first device from ``begin`` on that has layers without experts; the one after the last where none."""
    return next((d for d in range(begin, len(shares)) if shares[d].n_part > 0), len(shares))


def _promoted(shares: Sequence[_Share], d: int, n: int, begin: int) -> list[_Share]:
    """With ``n`` layers that had no experts, from device ``begin`` on, complete on device ``d``."""
    changed = list(shares)
    for other in range(begin, len(shares)):
        moved = min(n, changed[other].n_part)
        changed[other] = changed[other].plus(-moved, -moved)
        changed[d] = changed[d].plus(moved, 0)
        n -= moved
        if changed[other].n_part:
            break
    return changed
