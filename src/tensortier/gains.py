"""What a little more of something would bring: the plan made again for a machine that has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from tensortier import paging
from tensortier.budget import Budget, budget_of
from tensortier.cost import ASSUMED_DRIVE
from tensortier.rates import DeviceRates, Rates, ReadSpeed, Speed
from tensortier.search import Search
from tensortier.types import Estimate, Hardware, ModelInfo, Plan, Workload

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
    model: ModelInfo,
    hardware: Hardware,
    plan: Plan,
    *,
    workload: Workload,
    rates: Rates,
    hits: paging.HitRates | None = None,
) -> tuple[Gain, ...]:
    """For the settings of ``plan``: more memory of each device, and of RAM where weights are read from the drive;
    a faster drive, faster links and faster RAM where the plan uses them. Bytes are by formula. ``hits`` as for
    ``planner.plan``."""
    on_drive = plan.tier is not None
    budget = budget_of(hardware, rates, model, plan.settings)
    if not budget.room and not on_drive:
        return ()

    def best(room: Budget, speeds: Rates) -> _Best | None:
        if on_drive:
            return _best_on_the_drive(model, room, plan, workload, speeds, hits)
        return _best(model, room, plan, workload, speeds)

    now = best(budget, rates)
    if now is None:
        return ()
    cases: list[tuple[str, Budget, Rates]] = []
    for device in budget.room:
        more = {d: size + MORE_MEMORY * (d == device) for d, size in budget.room.items()}
        free = {d: size + MORE_MEMORY * (d == device) for d, size in budget.free.items()}
        cases.append((f"1 GiB more on {device}", dataclasses.replace(budget, room=more, free=free), rates))
    if now.paged:
        more_ram = dataclasses.replace(budget, ram=budget.ram + MORE_MEMORY)
        cases.append(("1 GiB more of RAM", more_ram, rates))
        cases.append(("a drive twice as fast", budget, _faster_drive(rates)))
    if budget.room:
        cases.append(("a 10 % faster link", budget, _faster_links(rates)))
    cases.append(("10 % faster RAM", budget, _faster_ram(rates)))
    found = []
    for what, room, speeds in cases:
        then = best(room, speeds)
        if then is not None:
            # the search stops near the optimum: what it is off by is no loss
            saved = max(0.0, 1 - then.estimate.seconds / now.estimate.seconds)
            better = then if saved else now
            found.append(Gain(what, better.estimate.seconds, saved, better.estimate.decode_tokens_per_second))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class _Best:
    estimate: Estimate
    paged: bool  # weights are read from the drive


def _search(model: ModelInfo, budget: Budget, plan: Plan, workload: Workload, rates: Rates) -> Search:
    start = dataclasses.replace(plan, candidates=(), estimate=None, tier=None)
    settings = plan.settings
    if plan.tier is not None:  # which decided it: before, it was open
        settings = dataclasses.replace(settings, load_mode="auto")
    return Search(model, budget, start, workload, rates, (settings,))


def _best(model: ModelInfo, budget: Budget, plan: Plan, workload: Workload, rates: Rates) -> _Best | None:
    search = _search(model, budget, plan, workload, rates)
    found = search.best(search.optima())
    return None if found is None else _Best(found.estimate, bool(found.paged))


def _best_on_the_drive(
    model: ModelInfo,
    budget: Budget,
    plan: Plan,
    workload: Workload,
    rates: Rates,
    hits: paging.HitRates | None,
) -> _Best | None:
    """With what RAM does not hold read by our own backend."""
    search = _search(model, budget, plan, workload, rates)
    found = []
    for option in search.options():
        if not option.fits:
            continue
        if not option.paged:
            found.append(_Best(option.estimate, False))
            continue
        spread = paging.OnDrive(model, search.plan_of(option), option.rows, budget.free, hits)
        made = spread.within(budget.ram_beside(option.rows))
        if made is not None:
            found.append(_Best(spread.timing(rates, workload).estimate(made), True))
    return min(found, key=lambda b: b.estimate.seconds, default=None)


def _faster_drive(rates: Rates) -> Rates:
    drive = rates.drive or ASSUMED_DRIVE
    return dataclasses.replace(rates, drive=dataclasses.replace(drive, value=2 * drive.value))


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

    faster = _changed(rates, changed)
    return dataclasses.replace(faster, plain=None if rates.plain is None else changed(rates.plain))


def _changed(rates: Rates, change: Callable[[DeviceRates], DeviceRates]) -> Rates:
    return dataclasses.replace(rates, devices={name: change(d) for name, d in rates.devices.items()})


def _faster(speed: S) -> S:
    return dataclasses.replace(speed, value=speed.value * FASTER)
