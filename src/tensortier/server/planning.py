"""Where a model goes beside those that are loaded already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tensortier import deciding
from tensortier.budget import PROCESS
from tensortier.deciding import Planned, Wish
from tensortier.errors import OutOfMemory, UsageError
from tensortier.types import Hardware, Plan, Settings

SHARED_CONTEXT = 8192  # tokens, where nobody asked for a number


@dataclass(frozen=True)
class Decision:
    """A plan, and whether more memory would make it better."""

    plan: Plan
    spills: bool = False  # weights are read from the drive while it runs
    cramped: bool = False  # weights are in main memory that a GPU has no room for
    fills: bool = True  # another program that counted the same free memory would find too little of it
    planned: Planned | None = None  # None for a plan that somebody gave


class Planner:
    """Plans for models of this machine by one ``Wish``, in which the model and the budgets are replaced.

    Args:
        wish: settings, placement options and budgets that hold for all models.
        machine: before anything was loaded.
        measured, say: as for ``deciding.make_plan``.
    """

    def __init__(
        self, wish: Wish, machine: Hardware, measured: deciding.Measurer, say: Callable[[str], None]
    ) -> None:
        self._wish = wish
        self._machine = deciding.within_budget(machine, wish.vram, wish.ram)
        self._measured = measured
        self._say = say

    @property
    def settings(self) -> Settings:
        return self._wish.settings

    def decide(self, path: str, held: Mapping[str, int]) -> Decision:
        """The plan for a model where loaded ones hold so many bytes of each device.

        Raises: as ``deciding.make_plan``; UsageError also where nothing is left.
        """
        wish = self._with_context(replace(self._wish, model=path))
        if held:
            wish = self._beside(wish, held)
        return _decision(deciding.make_plan(wish, self._measured, self._say))

    def less(self, decision: Decision, failure: OutOfMemory) -> Decision:
        """``deciding.plan_with_less``."""
        if decision.planned is None or decision.planned.wish.manual.given:
            raise failure
        return _decision(deciding.plan_with_less(decision.planned, failure))

    def fits(self, plan: Plan, held: Mapping[str, int]) -> bool:
        """Whether no device takes more with ``plan`` and ``held`` together than is free of it."""
        from tensortier import placement

        free = {card.name: card.memory_free for card in placement.gpus(self._machine)}
        ram = self._machine.ram_available
        for rows in ({row.device: row.total_bytes for row in plan.memory}, held):
            for device, size in rows.items():
                if device in free:
                    free[device] -= size
                else:
                    ram -= size
        return ram >= 0 and min(free.values(), default=0) >= 0

    def _with_context(self, wish: Wish) -> Wish:
        """Where nobody asked for a number of tokens: several conversations share the context."""
        from tensortier import gguf, planner

        if not wish.undecided.context:
            return wish
        model = gguf.read(wish.model)
        least = min(SHARED_CONTEXT, model.context_length or SHARED_CONTEXT)
        context = max(least, planner.context_for(model, deciding.settle(wish, model)))
        settings = replace(wish.settings, n_ctx=context)
        return replace(wish, settings=settings, undecided=replace(wish.undecided, context=False))

    def _beside(self, wish: Wish, held: Mapping[str, int]) -> Wish:
        from tensortier import placement

        cards = placement.gpus(self._machine)
        names = {card.name for card in cards}
        ram = self._machine.ram_available
        ram -= sum(size for name, size in held.items() if name not in names)
        if ram < 1:
            raise UsageError("the models that are loaded leave no main memory")
        vram = tuple(max(0, card.memory_free - held.get(card.name, 0)) for card in cards)
        return replace(wish, ram=ram, vram=vram)


def _decision(planned: Planned) -> Decision:
    from tensortier import placement

    plan = planned.plan
    in_ram = sum(row.total_bytes for row in plan.memory if row.device in ("CPU", PROCESS))
    mapped = plan.settings.load_mode.startswith("mmap") and in_ram > planned.hardware.ram_available
    on_gpus = plan.placement.n_gpu_layers == -1 and not plan.placement.overrides
    return Decision(
        plan,
        spills=plan.tier is not None or mapped,
        cramped=bool(placement.gpus(planned.hardware)) and not on_gpus,
        fills=_fills(planned),
        planned=planned,
    )


def _fills(planned: Planned) -> bool:
    """Whether a plan takes half or more of what is free of some memory."""
    from tensortier import placement

    plan, machine = planned.plan, planned.hardware
    free = {card.name: card.memory_free for card in placement.gpus(machine)}
    cramped = any(2 * row.total_bytes > free[row.device] for row in plan.memory if row.device in free)
    return plan.tier is not None or cramped or 2 * deciding.ram_of(plan, machine) > machine.ram_available
