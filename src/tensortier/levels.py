"""The offload slider as a table: a share of the model on the GPU, by whole layers and by single tensors; or where there
is no GPU, a share of it in RAM while the rest is read from the drive."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tensortier import cost, memory, optimizer, paging, placement
from tensortier.budget import PROCESS, budget_of
from tensortier.candidates import Question
from tensortier.rates import Rates
from tensortier.search import Option, Search
from tensortier.types import (
    DeviceMemory,
    Estimate,
    Hardware,
    ModelInfo,
    Placement,
    Plan,
    Settings,
    Tier,
    Workload,
)

SHARES = tuple(n / 10 for n in range(11))


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to use the memory of a level."""

    placement: Placement
    memory: tuple[DeviceMemory, ...]
    estimate: Estimate
    fits: bool  # in what is free here


@dataclasses.dataclass(frozen=True)
class Level:
    share: float  # of the bytes of weights that can be offloaded: as many layers as do not exceed it
    layers: int  # offloaded by the left side, the output counted as one
    by_layers: Side
    by_tensors: Side  # the fastest placement in the same bytes of each device


@dataclasses.dataclass(frozen=True)
class RamLevel:
    """A budget of main memory, and the best that can be done with it on the CPU."""

    share: float  # of the bytes of weights that the budget has room for, or the least that is possible
    ram: int  # bytes of the whole process, that is of ``memory``
    memory: tuple[DeviceMemory, ...]  # rows "CPU", "TIER" where something is on the drive, and "process"
    drive_bytes: int  # of weights that RAM does not hold
    placement: Placement
    settings: Settings
    tier: Tier | None  # None: everything is in RAM
    estimate: Estimate
    fits: bool  # in what is available here


def ram_levels(
    model: ModelInfo,
    hardware: Hardware,
    settings: Settings,
    *,
    workload: Workload,
    rates: Rates,
    shares: Sequence[float] = SHARES,
    answers: memory.Answers | None = None,
    hits: paging.HitRates | None = None,
) -> tuple[RamLevel, ...]:
    """A level for each of ``shares`` (0 to 1) of the weights in RAM; where that is less than what has to be there, the
    least with which the model runs. Everything is computed by the CPU.

    Args:
        settings: as asked for (load mode "auto"): how the file is read is decided for each level.
        answers: who is asked, once, what the model takes; None: formulas.
        hits: what is known of the model's routing (``simulate.HitCurve``); None: even use is assumed.
    """
    plan = Plan(model.path, settings=settings, workload=workload)
    rows = (memory.Formulas(model, {}) if answers is None else answers).ask(plan)
    budget = budget_of(hardware, rates, model, settings)
    process = DeviceMemory(PROCESS, 0, 0, budget.process)
    spread = paging.OnDrive(model, plan, rows, {}, hits)
    timing = spread.timing(rates, workload)
    whole = sum(r.total_bytes for r in rows)
    weights = sum(r.weights_bytes for r in rows)
    in_ram = cost.estimate(model, plan, rates, workload, {})
    found = []
    for share in shares:
        ram = whole - round((1 - share) * weights)
        made = spread.within(max(ram, spread.least)) if spread.least is not None and ram < whole else None
        if made is None or made.tier is None:
            taken = whole + budget.process
            found.append(
                RamLevel(
                    1.0, taken, (*rows, process), 0, Placement(), settings, None, in_ram, whole <= budget.ram
                )
            )
            continue
        left = max(
            0, sum(paging.paged_bytes(model, made, {})) - made.tier.expert_bytes - made.tier.dense_bytes
        )
        taken = sum(r.total_bytes for r in made.memory)
        found.append(
            RamLevel(
                1 - left / weights,
                taken + budget.process,
                (*made.memory, process),
                left,
                made.placement,
                made.settings,
                made.tier,
                timing.estimate(made),
                taken <= budget.ram,
            )
        )
    return tuple(found)


def levels(
    model: ModelInfo,
    hardware: Hardware,
    settings: Settings,
    *,
    workload: Workload,
    rates: Rates,
    shares: Sequence[float] = SHARES,
) -> tuple[Level, ...]:
    """A level for each of ``shares`` (0 to 1). Bytes are by formula. No levels without a GPU."""
    budget = budget_of(hardware, rates, model, settings)
    if not budget.room:
        return ()
    start = Plan(model.path, settings=settings)
    search = Search(model, budget, start, workload, rates, (settings,))
    question = search.question(settings)
    weights = [_offloaded_weights(model, question, n) for n in range(model.n_layers + 2)]
    found = []
    for share in shares:
        n = max(n for n, nbytes in enumerate(weights) if nbytes <= share * weights[-1])
        place = question.offloaded(question.devices, n)
        layers = search.option("whole layers", settings, place)
        found.append(Level(share, n, _side(layers), _side(_by_tensors(search, settings, layers))))
    return tuple(found)


def _offloaded_weights(model: ModelInfo, question: Question, n: int) -> int:
    """Bytes of weights on devices with ``n`` layers offloaded."""
    if n == 0:
        return 0
    where = placement.resolve(model, question.offloaded(question.devices, n), question.free)
    return sum(t.nbytes for t in model.tensors if where[t.name] != "CPU")


def _by_tensors(search: Search, settings: Settings, layers: Option) -> Option:
    """The fastest in the memory that ``layers`` takes of each device, or that itself where nothing is faster."""
    held = {r.device: r.total_bytes for r in layers.rows}
    # what is taken has been rounded up already
    slack = optimizer.ALIGNMENT * len(search.model.tensors)
    costs = cost.Costs(search.model, search.rates, settings, search.workload, tuple(search.budget.room))
    limits = search.limits(costs)
    room = {d: held.get(d, 0) + slack for d in search.budget.room}
    solution = optimizer.solve(costs, dataclasses.replace(limits, room=room), cutoff=layers.seconds)
    if solution is None:
        return layers
    option = search.option("optimal", settings, solution.placement)
    taken = {r.device: r.total_bytes for r in option.rows}
    if option.seconds >= layers.seconds or any(taken.get(d, 0) > room[d] for d in room):
        return layers
    return option


def _side(option: Option) -> Side:
    return Side(option.placement, option.rows, option.estimate, option.fits)
