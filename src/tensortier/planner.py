"""From a model and a machine to a plan: where every tensor goes, proved by llama.cpp before anything is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from tensortier import candidates, memory, paging, placement, reasons
from tensortier.budget import DEVICE_MARGIN as DEVICE_MARGIN
from tensortier.budget import PROCESS, Budget, budget_of
from tensortier.candidates import Question, excess
from tensortier.candidates import to_cpu as to_cpu
from tensortier.errors import PlanError, UsageError
from tensortier.rates import Rates, read_ahead
from tensortier.search import Option, Search
from tensortier.types import (
    Candidate,
    DeviceMemory,
    Hardware,
    ModelInfo,
    Placement,
    Plan,
    Settings,
    Workload,
)

SHORTEST_CONTEXT = 4096  # that the planner chooses by itself
_CONTEXT_STEP = 1024
_UBATCHES = (512, 1024, 2048, 4096)
_SMALL_UBATCHES = (256, 128, 64)  # where RAM is short and computing takes a part of it that matters
_ROUNDS = 6  # of asking llama.cpp and planning again with what it says


@dataclasses.dataclass(frozen=True)
class Open:
    """Settings that nobody asked for, and the planner may choose."""

    context: bool = False
    kv_type: bool = False
    ubatch: bool = False
    op_offload: bool = False
    repack: bool = False


def plan(
    model: ModelInfo,
    hardware: Hardware,
    settings: Settings,
    *,
    workload: Workload | None = None,
    rates: Rates | None = None,
    open: Open | None = None,
    rpc: Sequence[str] = (),
    answers: memory.Answers | None = None,
    hits: paging.HitRates | None = None,
) -> Plan:
    """The placement, and the settings left ``open``, that finish ``workload`` soonest within memory.

    All placements of ``candidates`` and the optimum are compared by ``cost.estimate``; the fastest wins, and of those
    within a hundredth of it the simplest, but none that is slower than llama.cpp's own ``--fit`` would be. What wins
    is proved by ``answers``: llama.cpp itself (``memory.Probe``) where that is None, ``memory.Formulas`` for a machine
    or model that is not here. Without ``rates`` nothing is compared: see ``simple_plan``. ``hits`` tell how often
    experts are found in RAM where the rest is on the drive (``simulate.HitCurve``); without them even use is assumed.

    Raises:
        UsageError: the model cannot run in this memory; the message says what would help.
        LoadError, ModelFileError: llama.cpp would not load this model at all.
    """
    settings = _with_threads(settings, hardware)
    load = workload or Workload()
    wishes = open or Open()
    if wishes.context:
        settings = dataclasses.replace(settings, n_ctx=context_for(model, load))
    start = Plan(model.path, settings=settings, rpc=tuple(rpc), workload=load)
    if rates is None:
        made = simple_plan(model, hardware, settings, rpc=rpc, answers=answers, hits=hits)
        return dataclasses.replace(made, workload=load)
    budget = budget_of(hardware, rates, model, settings)
    choices = _choices(
        settings, load, _that_matter(wishes, budget, rates), not budget.room and model.nbytes > budget.ram
    )
    search = Search(model, budget, start, load, rates, tuple(choices))
    if isinstance(answers, memory.Formulas):  # with what is known of the devices here
        answers = memory.Formulas(model, budget.free, budget.helpers)
    paged = None
    with _asked(answers) as exact:
        winner, options, rows = _proved(search, exact)
        if settings.load_mode == "auto" and winner.paged:
            paged = _best_on_the_drive(search, options, exact, hits)
    made = dataclasses.replace(
        start, placement=winner.placement, settings=winner.settings, estimate=winner.estimate
    )
    told = reasons.why(search.question(winner.settings), winner, rows, settings, options)
    if wishes.context:
        told.append(reasons.context(winner.settings.n_ctx, load))
    made = _finish(made, hardware, rows, told, model, budget)
    ladder = _ladder(winner, options, made, budget)
    made = dataclasses.replace(made, candidates=ladder)
    if paged is None or paged.estimate is None or paged.estimate.seconds > winner.seconds:
        return made
    told = reasons.settings(paged.settings, settings)
    if wishes.context:
        told.append(reasons.context(settings.n_ctx, load))
    return _preferred(paged, made, hardware, model, budget, told)


def manual_plan(
    model: ModelInfo,
    hardware: Hardware,
    settings: Settings,
    place: Placement,
    *,
    workload: Workload | None = None,
    rates: Rates | None = None,
    rpc: Sequence[str] = (),
    warnings: Sequence[str] = (),
    answers: memory.Answers | None = None,
) -> Plan:
    """The plan for a placement that somebody chose: its memory is predicted, and what does not fit is said. Its speed
    is predicted where ``rates`` are given. ``answers`` as for ``plan``.

    Raises:
        LoadError, ModelFileError: llama.cpp would refuse to load it so.
    """
    start = Plan(model.path, place, _with_threads(settings, hardware), rpc=tuple(rpc), workload=workload)
    rows = memory.predict(start) if answers is None else answers.ask(start)
    budget = budget_of(hardware, rates, model, start.settings)
    made = _finish(start, hardware, rows, ["placed by hand"], model, budget)
    if rates is not None:
        search = Search(model, budget, start, workload or Workload(), rates, (made.settings,))
        option = search.option("placed by hand", made.settings, place, rows)
        made = dataclasses.replace(made, estimate=option.estimate, workload=workload or Workload())
    return dataclasses.replace(made, warnings=(*warnings, *made.warnings))


def simple_plan(
    model: ModelInfo,
    hardware: Hardware,
    settings: Settings,
    *,
    rpc: Sequence[str] = (),
    answers: memory.Answers | None = None,
    hits: paging.HitRates | None = None,
) -> Plan:
    """Without a prediction of speed: everything on the GPUs if it fits; else attention and KV cache there first and as
    many feed-forward tensors as fit beside them; else as many layers without those as fit; else all in RAM.

    "Fits" is llama.cpp's own answer (``memory.Probe``) against free memory less ``DEVICE_MARGIN``. For a machine or
    a model that is not here, ``answers`` (``memory.Formulas``) is asked instead.

    Raises:
        LoadError, ModelFileError: llama.cpp would not load this model at all.
    """
    start = Plan(model.path, settings=_with_threads(settings, hardware), rpc=tuple(rpc))
    budget = budget_of(hardware, None, model, start.settings)
    with _asked(answers) as exact:
        question = Question(start, model, budget.free, budget.room, exact)
        names = " and ".join(budget.room)
        if not budget.room:
            place, told = Placement(), "no GPU here: all weights and the KV cache in RAM"
        elif found := candidates.everything(question, question.devices):
            place, told = found, f"everything fits on {names}"
        elif found := candidates.attention_first(question):
            place, told = found, reasons.attention_first(question, found)
        else:
            place, told = Placement(), f"nothing useful fits on {names}: all in RAM"
        placed = dataclasses.replace(start, placement=place)
        rows = exact.ask(placed)
        made = _finish(placed, hardware, rows, [told], model, budget)
        if settings.load_mode == "auto" and budget.paged(rows, pageable=True):
            paged = paging.on_the_drive(model, placed, rows, budget.ram_beside(rows), budget.free, hits)
            if paged is not None:
                return _preferred(paged, made, hardware, model, budget)
        return made


def context_for(model: ModelInfo, workload: Workload) -> int:
    """Tokens of context where nobody asked for a number: what the workload needs, in whole steps, at least
    ``SHORTEST_CONTEXT`` and no more than the model was trained for."""
    wanted = max(SHORTEST_CONTEXT, -(-workload.context // _CONTEXT_STEP) * _CONTEXT_STEP)
    return min(wanted, model.context_length) if model.context_length else wanted


def _choices(settings: Settings, workload: Workload, wishes: Open, short: bool) -> Iterator[Settings]:
    """What the settings may be; as they are first. ``short``: there is more to compute with than RAM holds, and nothing
    else that computes."""
    ubatches = [settings.n_ubatch]
    if wishes.ubatch and short:
        ubatches += [u for u in _SMALL_UBATCHES if u < settings.n_ubatch]
    if wishes.ubatch:
        # a micro-batch that is twice the prompt only takes memory
        ubatches += [u for u in _UBATCHES if u != settings.n_ubatch and u < 2 * workload.prompt]
    kv_types = [(settings.type_k, settings.type_v)]
    if wishes.kv_type and kv_types == [("f16", "f16")] and settings.flash_attention != "off":
        kv_types.append(("q8_0", "q8_0"))  # llama.cpp takes a quantized V only with flash attention
    offloads = [settings.op_offload, not settings.op_offload] if wishes.op_offload else [settings.op_offload]
    repacks = [settings.repack, not settings.repack] if wishes.repack else [settings.repack]
    for (type_k, type_v), op_offload, repack, n_ubatch in itertools.product(
        kv_types, offloads, repacks, ubatches
    ):
        yield dataclasses.replace(
            settings,
            n_ubatch=n_ubatch,
            n_batch=max(settings.n_batch, n_ubatch),
            type_k=type_k,
            type_v=type_v,
            op_offload=op_offload,
            repack=repack,
        )


def _that_matter(wishes: Open, budget: Budget, rates: Rates) -> Open:
    """Without choices that make no difference here: kernels of which only one kind was measured, or that compute
    beside a GPU, which takes the wide products of prompts for which plain ones may be faster."""
    return dataclasses.replace(wishes, repack=wishes.repack and rates.plain is not None and not budget.room)


def _proved(
    search: Search, exact: memory.Answers
) -> tuple[Option, tuple[Option, ...], tuple[DeviceMemory, ...]]:
    """The best option whose bytes fit by exact answers, all options it was chosen from, and those bytes."""
    exact = _Remembered(exact)
    search.compare_with(exact)
    for _ in range(_ROUNDS):
        options = search.options()
        winner = search.best(options)
        if winner is None:
            raise UsageError(reasons.what_would_help(search, options))
        rows = exact.ask(search.plan_of(winner))
        over = excess(rows, search.budget.room)
        if not over:
            return winner, options, rows
        search.learn(over)
    raise PlanError(f"no placement was found that llama.cpp agrees with, in {_ROUNDS} rounds: {over}")


def _ladder(winner: Option, options: Sequence[Option], made: Plan, budget: Budget) -> tuple[Candidate, ...]:
    """The chosen one first, then the best of each other kind, the fastest first, then what does not fit."""
    chosen = Candidate(winner.name, True, made.placement, made.settings, made.memory, made.estimate, "chosen")
    best: dict[str, Option] = {}
    for option in sorted(options, key=lambda o: (not o.fits, o.seconds)):
        if option.name != winner.name:
            best.setdefault(option.name, option)
    return (
        chosen,
        *(
            Candidate(
                o.name,
                o.fits,
                o.placement,
                o.settings,
                (*o.rows, _process(budget)),
                o.estimate,
                reasons.why_not(o, winner),
            )
            for o in best.values()
        ),
    )


def _best_on_the_drive(
    search: Search, options: Sequence[Option], exact: memory.Answers, hits: paging.HitRates | None
) -> Plan | None:
    """Of the options whose weights RAM does not hold, the one that is fastest when our own backend reads them."""
    model, budget = search.model, search.budget

    def paged(option: Option, rows: Sequence[DeviceMemory]) -> Plan | None:
        spread = paging.OnDrive(model, search.plan_of(option), rows, budget.free, hits)
        made = spread.within(budget.ram_beside(rows))
        if made is None:
            return None
        made = paging.read_as_measured(made, search.rates)
        return dataclasses.replace(made, estimate=spread.timing(search.rates, search.workload).estimate(made))

    found: list[tuple[float, Option]] = []
    for option in options:
        if option.fits and option.paged and (made := paged(option, option.rows)) and made.estimate:
            found.append((made.estimate.seconds * search.handicap(option.settings), option))
    for _, chosen in sorted(found, key=lambda f: f[0])[:_ROUNDS]:
        if made := paged(chosen, exact.ask(search.plan_of(chosen))):  # formulas may be a little off
            return made
    return None


def _preferred(
    paged: Plan,
    mapped: Plan,
    hardware: Hardware,
    model: ModelInfo,
    budget: Budget,
    told: Sequence[str] = (),
) -> Plan:
    """A plan with weights on the drive, where ``mapped`` would leave them to the kernel's paging. ``told``: what else
    there is to say of it."""
    left = paging.paged_bytes(model, paged, budget.free)
    stays = paging.dense_stays(model, paged, budget.free)
    where = reasons.on_the_drive(paged, left, stays, mapped, budget, read_ahead(hardware))
    made = dataclasses.replace(paged, reasons=(where, *told), workload=mapped.workload)
    made = dataclasses.replace(made, memory=(*made.memory, _process(budget)))
    made = dataclasses.replace(made, warnings=tuple(reasons.warnings(made, model, hardware, budget)))
    if not mapped.candidates:
        return made
    chosen = Candidate(
        "weights on the drive", True, made.placement, made.settings, made.memory, made.estimate, "chosen"
    )
    rest = [dataclasses.replace(c, note=reasons.mapped(c, made, budget)) for c in mapped.candidates]
    return dataclasses.replace(made, candidates=(chosen, *rest))


def _process(budget: Budget) -> DeviceMemory:
    return DeviceMemory(PROCESS, 0, 0, budget.process)


class _Remembered:
    """Asks nothing twice."""

    def __init__(self, answers: memory.Answers) -> None:
        self._answers = answers
        self._told: dict[tuple[Placement, Settings], tuple[DeviceMemory, ...]] = {}

    def ask(self, plan: Plan) -> tuple[DeviceMemory, ...]:
        key = (plan.placement, plan.settings)
        if key not in self._told:
            self._told[key] = self._answers.ask(plan)
        return self._told[key]


@contextlib.contextmanager
def _asked(answers: memory.Answers | None) -> Iterator[memory.Answers]:
    if answers is not None:
        yield answers
        return
    with memory.Probe() as probe:
        yield probe


def _with_threads(settings: Settings, hardware: Hardware) -> Settings:
    """A number of threads where none was asked for: the performance cores this process may use. Slower cores
    would hold the others up, and a second thread on a core adds nothing to work that waits for memory."""
    if settings.threads:
        return settings
    return dataclasses.replace(
        settings, threads=max(1, min(hardware.performance_cores, hardware.usable_cpus))
    )


def _finish(
    plan: Plan,
    hardware: Hardware,
    rows: tuple[DeviceMemory, ...],
    told: Sequence[str],
    model: ModelInfo,
    budget: Budget,
) -> Plan:
    settings = plan.settings
    mode = placement.load_mode(plan)
    paged = budget.paged(rows, pageable=True)
    said = list(told)
    if settings.load_mode == "auto" and paged:
        mode = "mmap"  # what does not fit in RAM cannot be read into it
    if mode == "mmap" and paged and settings.repack:
        settings = dataclasses.replace(settings, repack=False)
        said.append("weights on the CPU stay as they are in the file, because reordered ones cannot be paged")
    settings = dataclasses.replace(settings, load_mode=mode)
    plan = dataclasses.replace(plan, settings=settings, memory=(*rows, _process(budget)), reasons=tuple(said))
    return dataclasses.replace(plan, warnings=tuple(reasons.warnings(plan, model, hardware, budget)))
