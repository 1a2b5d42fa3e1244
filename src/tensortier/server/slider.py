"""The slider: what a model would do with every budget of memory, by whole layers and by single tensors.

With a GPU the budget is bytes of VRAM; without one it is bytes of RAM, and the rest is read from the drive. The curve
is made once for a choice of model, context, KV type and workload, so that moving the slider asks nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tensortier import deciding, formulas, memory, paging, planid, planner, workloads
from tensortier.budget import Budget, budget_of
from tensortier.deciding import Wish
from tensortier.errors import UsageError
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

STEPS = 21  # that the slider has
BEYOND = 6  # more points of the curves, up to a GPU that holds everything
VRAM, RAM = "vram", "ram"


@dataclasses.dataclass(frozen=True)
class Base:
    """What a curve and its plans are made from: a model, this machine within the user's budget, and the settings of the
    best plan for all of it."""

    wish: Wish
    model: ModelInfo
    machine: Hardware
    workload: Workload
    rates: Rates | None  # None: this machine was not measured
    plan: Plan  # the best with all that is free

    @property
    def settings(self) -> Settings:
        """As they were decided, but for what the planner adds to a placement."""
        made, asked = self.plan.settings, self.wish.settings
        return dataclasses.replace(made, load_mode=asked.load_mode, repack=asked.repack)

    @property
    def budget(self) -> Budget:
        return budget_of(self.machine, self.rates, self.model, self.settings)


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to use a budget."""

    placement: Placement
    tier: Tier | None
    memory: tuple[DeviceMemory, ...]
    estimate: Estimate
    drive_bytes: int  # of weights that no memory holds
    layers: int  # offloaded whole or in part, the output counted as one


@dataclasses.dataclass(frozen=True)
class Step:
    budget: int  # bytes
    fits: bool  # in what is free here
    by_tensors: Side
    by_layers: Side  # without a GPU: the file mapped, as llama.cpp does


@dataclasses.dataclass(frozen=True)
class Stair:
    """A number of whole layers on the GPUs."""

    budget: int  # bytes of VRAM
    estimate: Estimate


@dataclasses.dataclass(frozen=True)
class Curve:
    kind: str  # VRAM or RAM: what the budget is of
    devices: tuple[str, ...]
    free: int  # bytes that can be given to the model
    needed: int  # bytes with which everything is there
    steps: tuple[Step, ...]
    stairs: tuple[Stair, ...] = ()  # every number of whole layers, from none; none without a GPU


def base(wish: Wish, machine: Hardware, rates: Rates | None, answers: memory.Answers) -> Base:
    """The best plan for ``wish`` on ``machine``, as llama.cpp's ``answers`` prove it.

    Raises:
        UsageError: the wish contradicts itself or the machine, or the model cannot run in this memory.
        ModelFileError, LoadError: the file cannot be read, or llama.cpp would not load it.
    """
    from tensortier import gguf

    model = gguf.read(wish.model)
    load = workload_of(wish, model)
    machine = deciding.within_budget(machine, wish.vram, wish.ram)
    plan = deciding.placed(wish, model, machine, load, rates, answers)
    return Base(wish, model, machine, load, rates, _identified(plan, model, machine))


def workload_of(wish: Wish, model: ModelInfo) -> Workload:
    """As ``deciding.settle``, but a workload with a name is shortened to the context: the page always sends one, and
    the context is what was chosen. Raises UsageError."""
    asked = wish.workload
    if asked is not None and asked.name in workloads.NAMED:
        context = formulas.context_of(model, wish.settings)
        if wish.undecided.context:
            context = model.context_length or workloads.LONGEST
        wish = dataclasses.replace(wish, workload=workloads.fitted(asked, context))
    return deciding.settle(wish, model)


def plan_at(found: Base, budget: int, answers: memory.Answers) -> Plan:
    """The plan for a position of the slider, proved by ``answers``.

    Raises:
        UsageError: the budget is none, or the model cannot run in it.
        PlanError: llama.cpp and the formulas do not come together.
    """
    if found.rates is None:
        return found.plan
    machine = within(found, budget)
    plan = planner.plan(
        found.model,
        machine,
        found.settings,
        workload=found.workload,
        rates=found.rates,
        rpc=found.wish.rpc,
        answers=answers,
    )
    return _identified(plan, found.model, found.machine)


def within(found: Base, budget: int) -> Hardware:
    """The machine with ``budget`` bytes for the model: shared out over its GPUs by what is free there, or of RAM where
    it has none. Raises UsageError for a budget that is none."""
    if budget < 0:
        raise UsageError(f"a budget of {budget} bytes is none")
    whole = found.budget
    if not whole.room:
        return dataclasses.replace(
            found.machine, ram_available=max(1, min(budget, found.machine.ram_available))
        )
    room = _shares(whole, budget)
    devices = tuple(
        # the planner keeps a margin of what is free
        dataclasses.replace(d, memory_free=d.memory_free - whole.room[d.name] + room[d.name])
        if d.name in room
        else d
        for d in found.machine.devices
    )
    return dataclasses.replace(found.machine, devices=devices)


def curve(found: Base, answers: memory.Answers) -> Curve | None:
    """All steps; None where this machine was not measured. Bytes on GPUs are by formula, with ``answers`` asked once
    how far that is off."""
    if found.rates is None:
        return None
    budget = found.budget
    start = Plan(
        found.model.path, settings=found.settings, rpc=tuple(found.wish.rpc), workload=found.workload
    )
    search = Search(found.model, budget, start, found.workload, found.rates, (found.settings,))
    if not budget.room:
        return _over_ram(search, answers)
    search.compare_with(answers)
    return _over_vram(search)


def _identified(plan: Plan, model: ModelInfo, machine: Hardware) -> Plan:
    return dataclasses.replace(plan, model_id=planid.of_model(model), machine_id=planid.of_machine(machine))


def _shares(whole: Budget, budget: int) -> dict[str, int]:
    free = sum(whole.room.values())
    share = min(1.0, budget / free) if free else 0.0
    return {d: int(size * share) for d, size in whole.room.items()}


# --- over VRAM


def _over_vram(search: Search) -> Curve:
    whole = search.budget
    (settings,) = search.choices
    question = search.question(settings)
    layers = [
        search.option("whole layers", settings, question.offloaded(question.devices, n) if n else Placement())
        for n in range(search.model.n_layers + 2)
    ]
    free = sum(whole.room.values())
    needed = _on_devices(layers[-1], whole)
    top = min(free, needed)
    budgets = [round(top * i / (STEPS - 1)) for i in range(STEPS)]
    if needed > free:
        budgets += [round(free + (needed - free) * i / BEYOND) for i in range(1, BEYOND + 1)]
    steps = []
    for budget in budgets:
        room = {d: size * budget // max(1, free) for d, size in whole.room.items()}
        if budget == top and needed <= free:
            room = dict(whole.room)  # rounding must not keep out what fits
        left = [o for o in layers if all(_held(o, d) <= room[d] for d in room)]
        by_layers = left[-1] if left else layers[0]
        by_tensors = _best_within(search, room, by_layers)
        steps.append(
            Step(budget, budget <= free, _on_the_drive(search, by_tensors), _side(search, by_layers))
        )
    stairs = tuple(Stair(_on_devices(o, whole), o.estimate) for o in layers)
    return Curve(VRAM, tuple(whole.room), free, needed, tuple(steps), stairs)


def _best_within(search: Search, room: Mapping[str, int], by_layers: Option) -> Option:
    """The fastest in ``room``, or whole layers where nothing is faster."""
    narrower = search.within(room)
    found = narrower.best(narrower.optima())
    return found if found is not None and found.seconds < by_layers.seconds else by_layers


def _held(option: Option, device: str) -> int:
    return next((r.total_bytes for r in option.rows if r.device == device), 0)


def _on_devices(option: Option, budget: Budget) -> int:
    """Bytes of VRAM; where there are several GPUs, scaled to the one that is the fullest."""
    free = sum(budget.room.values())
    fullest = max((_held(option, d) / size for d, size in budget.room.items() if size), default=0.0)
    return max(round(free * fullest), sum(_held(option, d) for d in budget.room))


def _side(search: Search, option: Option) -> Side:
    """With what main memory does not hold paged by the kernel."""
    layers = option.placement.n_gpu_layers if option.placement.devices else 0
    n = search.model.n_layers + 1
    paged = option.paged or 0
    return Side(
        option.placement,
        None,
        tuple(
            dataclasses.replace(r, weights_bytes=r.weights_bytes - paged) if r.device == "CPU" else r
            for r in option.rows
        ),
        option.estimate,
        paged,
        n if layers < 0 else min(layers, n),
    )


def _on_the_drive(search: Search, option: Option) -> Side:
    """With what main memory does not hold read by our own backend, where that is faster."""
    plain = _side(search, option)
    budget = search.budget
    if not option.paged or option.settings.load_mode != "auto":
        return plain
    made = paging.on_the_drive(
        search.model, search.plan_of(option), option.rows, budget.ram_beside(option.rows), budget.free
    )
    if made is None or made.tier is None:
        return plain
    estimate = paging.estimate(search.model, made, search.rates, search.workload, budget.free)
    if estimate.seconds > option.seconds:
        return plain
    left = sum(paging.paged_bytes(search.model, made, budget.free))
    kept = made.tier.expert_bytes + made.tier.dense_bytes
    return dataclasses.replace(
        plain,
        placement=made.placement,
        tier=made.tier,
        memory=made.memory,
        estimate=estimate,
        drive_bytes=max(0, left - kept),
    )


# --- over RAM


def _over_ram(search: Search, answers: memory.Answers) -> Curve:
    """From what is not weights, which has to be in RAM, up to everything."""
    (settings,) = search.choices
    rows = answers.ask(search.plan_at(Placement()))
    cpu = next(r for r in rows if r.device == "CPU")
    process = search.budget.process
    free, needed = search.budget.ram + process, cpu.total_bytes + process
    least = needed - (cpu.weights_bytes if search.pageable(settings) else 0)
    least += cpu.weights_bytes // 100  # so that something is left for weights
    top = max(least, min(free, needed))
    budgets = sorted({round(least + (top - least) * i / (STEPS - 1)) for i in range(STEPS)})
    steps = []
    for budget in budgets:
        narrower = search.within({}, ram=budget - process)
        option = narrower.option("CPU only", settings, Placement(), rows)
        steps.append(Step(budget, budget <= free, _on_the_drive(narrower, option), _side(narrower, option)))
    return Curve(RAM, ("CPU",), free, needed, tuple(steps))
