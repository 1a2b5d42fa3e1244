"""The offload slider as a table: a share of the model on the GPU, by whole layers and by single tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tensortier import cost, optimizer, placement
from tensortier.budget import budget_of
from tensortier.candidates import Question
from tensortier.rates import Rates
from tensortier.search import Option, Search
from tensortier.types import DeviceMemory, Estimate, Hardware, ModelInfo, Placement, Plan, Settings, Workload

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
    budget = budget_of(hardware, rates)
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
