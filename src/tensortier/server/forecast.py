"""What a model of the hub would do here, told before anybody downloads it."""

from __future__ import annotations

import dataclasses

from tensortier import deciding, memory, paging
from tensortier.budget import budget_of
from tensortier.deciding import Wish
from tensortier.rates import Rates
from tensortier.server.slider import workload_of
from tensortier.types import Hardware, ModelInfo, Plan


@dataclasses.dataclass(frozen=True)
class Forecast:
    plan: Plan  # bytes by formula: llama.cpp is asked once the file is here
    drive_bytes: int  # of weights that no memory holds


def forecast(wish: Wish, model: ModelInfo, machine: Hardware, rates: Rates | None) -> Forecast:
    """The best plan for ``model``, of which only the header need be known.

    Raises:
        UsageError: the wish contradicts itself or the machine, or the model cannot run in this memory.
    """
    load = workload_of(wish, model)
    machine = deciding.within_budget(machine, wish.vram, wish.ram)
    answers = memory.Formulas(model, {d.name: d.memory_free for d in machine.devices})
    plan = deciding.placed(wish, model, machine, load, rates, answers)
    budget = budget_of(machine, rates, model, plan.settings)
    if plan.tier is None:
        return Forecast(plan, budget.paged(plan.memory, pageable=True) or 0)
    kept = plan.tier.expert_bytes + plan.tier.dense_bytes
    return Forecast(plan, max(0, sum(paging.paged_bytes(model, plan, budget.free)) - kept))
