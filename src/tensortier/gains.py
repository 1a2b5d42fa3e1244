"""What a little more of something would bring: the plan made again for a machine that has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from tensortier.budget import Budget, budget_of
from tensortier.rates import DeviceRates, Rates, ReadSpeed, Speed
from tensortier.search import Option, Search
from tensortier.types import Hardware, ModelInfo, Plan, Workload

MORE_MEMORY = 1 << 30  # bytes
FASTER = 1.1

S = TypeVar("S", Speed, ReadSpeed)


@dataclasses.dataclass(frozen=True)
class Gain:
    what: str  # "1 GiB more on CUDA0"
    seconds: float  # for one request, then
    saved: float  # of the time without it, 0 to 1
    decode_tokens_per_second: float  # then


def gains(
    model: ModelInfo, hardware: Hardware, plan: Plan, *, workload: Workload, rates: Rates
) -> tuple[Gain, ...]:
    """For the settings of ``plan``: more memory of each device, and of RAM where weights are paged from the drive;
    faster links and faster RAM where the plan uses them. Bytes are by formula."""
    budget = budget_of(hardware, rates, model, plan.settings)
    now = _best(model, budget, plan, workload, rates)
    if now is None or not budget.room:
        return ()
    cases: list[tuple[str, Budget, Rates]] = []
    for device in budget.room:
        more = {d: size + MORE_MEMORY * (d == device) for d, size in budget.room.items()}
        free = {d: size + MORE_MEMORY * (d == device) for d, size in budget.free.items()}
        cases.append((f"1 GiB more on {device}", dataclasses.replace(budget, room=more, free=free), rates))
    if now.paged:
        more_ram = dataclasses.replace(budget, ram=budget.ram + MORE_MEMORY)
        cases.append(("1 GiB more of RAM", more_ram, rates))
    cases.append(("a 10 % faster link", budget, _faster_links(rates)))
    cases.append(("10 % faster RAM", budget, _faster_ram(rates)))
    found = []
    for what, room, speeds in cases:
        then = _best(model, room, plan, workload, speeds)
        if then is not None:
            # the search stops near the optimum: what it is off by is no loss
            saved = max(0.0, 1 - then.seconds / now.seconds)
            better = then if saved else now
            found.append(Gain(what, better.seconds, saved, better.estimate.decode_tokens_per_second))
    return tuple(found)


def _best(model: ModelInfo, budget: Budget, plan: Plan, workload: Workload, rates: Rates) -> Option | None:
    start = dataclasses.replace(plan, candidates=(), estimate=None)
    search = Search(model, budget, start, workload, rates, (plan.settings,))
    return search.best(search.optima())


def _faster_links(rates: Rates) -> Rates:
    return _changed(rates, lambda d: dataclasses.replace(d, link=_faster(d.link)) if d.link else d)


def _faster_ram(rates: Rates) -> Rates:
    def changed(d: DeviceRates) -> DeviceRates:
        if d.kind != "cpu":
            return d
        return dataclasses.replace(
            d,
            narrow={kind: _faster(speed) for kind, speed in d.narrow.items()},
            other_narrow=_faster(d.other_narrow),
            memory=_faster(d.memory),
        )

    return _changed(rates, changed)


def _changed(rates: Rates, change: Callable[[DeviceRates], DeviceRates]) -> Rates:
    return dataclasses.replace(rates, devices={name: change(d) for name, d in rates.devices.items()})


def _faster(speed: S) -> S:
    return dataclasses.replace(speed, value=speed.value * FASTER)
