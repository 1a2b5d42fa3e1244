"""From a wish to a plan: the model's header, the machine within its budget, its speeds, the planner."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from tensortier.errors import ModelNotFound, OutOfMemory, PlanError, UsageError
from tensortier.explain import readable_size
from tensortier.pageable import DEVICE
from tensortier.types import Device, Hardware, ModelInfo, Plan, Settings, Workload

if TYPE_CHECKING:
    from tensortier.memory import Answers
    from tensortier.paging import HitRates
    from tensortier.rates import Rates


# ggml's buffers in main memory: "CPU", "CPU_REPACK", pinned ones such as "CUDA_Host"
_MAIN_MEMORY = re.compile(r"\bCPU|_Host\b")


CPU = "CPU"


class Measure(Enum):
    """When a machine of which no measurement is kept is measured."""

    ALWAYS = "always"
    IF_IT_DECIDES = "if it decides"  # only where a GPU is there and not everything fits on it
    NEVER = "never"


@dataclass(frozen=True)
class Undecided:
    """What the user left open, and the planner chooses."""

    context: bool = True
    kv_type: bool = True
    ubatch: bool = True
    op_offload: bool = True
    repack: bool = True


@dataclass(frozen=True)
class Manual:
    """Placement as llama.cpp's users give it: the arguments of ``placement.from_flags``. The defaults are
    what nothing given means."""

    n_gpu_layers: int | None = None
    override_tensors: Sequence[str] = ()
    cpu_moe: bool = False
    n_cpu_moe: int | None = None
    n_cpu_ffn: int | None = None
    tensor_split: Sequence[float] | None = None
    devices: Sequence[str] | None = None
    kv_on_device: bool = True

    @property
    def given(self) -> bool:
        return self != Manual()


@dataclass(frozen=True)
class Wish:
    """What a plan is wanted for. ``settings`` with ``undecided``: those that the planner may change."""

    model: str  # a path, a name, or a URL
    settings: Settings = field(default_factory=Settings)
    undecided: Undecided = field(default_factory=Undecided)
    manual: Manual = field(default_factory=Manual)
    rpc: Sequence[str] = ()
    workload: Workload | None = None  # None: not said, a chat is assumed
    measure: Measure = Measure.ALWAYS
    vram: Sequence[int] = ()  # bytes of each GPU, or of all alike where it is one number
    ram: int | None = None  # bytes of main memory
    elsewhere: Hardware | None = None  # a machine to plan for instead of this one
    trace: str | None = None  # a routing trace of the model
    remote: bool = False  # the model may be a file behind hf:// or https://, of which only the header is read


@dataclass(frozen=True)
class Planned:
    """A plan with what it was made from."""

    wish: Wish
    plan: Plan
    model: ModelInfo
    hardware: Hardware  # within the budget
    workload: Workload
    rates: Rates | None  # None: this machine was not measured
    answers: Answers | None  # formulas; None: llama.cpp is asked
    hits: HitRates | None = None  # what is known of the model's routing


Measurer = Callable[[Hardware, Settings, Sequence[str]], "Rates | None"]


def make_plan(wish: Wish, measured: Measurer, say: Callable[[str], None]) -> Planned:
    """Read the model's header and the machine, and place everything.

    For a model or a machine that is not here bytes come from formulas, not from llama.cpp. ``measured`` is called with
    the machine, the settings and the RPC servers where the machine has to be measured first (``measuring.measured``);
    ``say`` with a line for each thing to be warned of.

    Raises:
        UsageError: the wish contradicts itself, the model or the machine. And the exceptions of those parts.
    """
    from tensortier import gguf, hardware, library, memory, planid, rates

    away = gguf.is_remote(wish.model)
    if away and not wish.remote:
        raise UsageError(f"{wish.model} is a remote file: it has to be on this machine, download it first")
    source = wish.model if away else library.find(wish.model)
    model = gguf.read(source)
    load = settle(wish, model)
    machine = wish.elsewhere or hardware.probe(None if away else source, rpc=wish.rpc)
    machine = within_budget(machine, wish.vram, wish.ram)
    if wish.trace is not None and wish.manual.given:
        raise UsageError("--trace decides what stays in RAM: leave the options of manual placement out")
    hits = None if wish.trace is None else recorded(wish.trace, model)
    answers = None
    if away or wish.elsewhere is not None:
        answers = memory.Formulas(model, {d.name: d.memory_free for d in machine.devices})
    if wish.elsewhere is not None:
        speeds: Rates | None = rates.from_catalogue(machine)
    else:
        speeds = _speeds_here(wish, model, machine, load, answers, measured, say)
    plan = placed(wish, model, machine, load, speeds, answers, hits)
    plan = replace(plan, model_id=planid.of_model(model), machine_id=planid.of_machine(machine))
    return Planned(wish, plan, model, machine, load, speeds, answers, hits)


def recorded(trace: str, model: ModelInfo) -> HitRates:
    """What a routing trace of ``model`` says of it.

    Raises:
        UsageError: the file is none, or was recorded with another model.
    """
    from tensortier import routing
    from tensortier.simulate import HitCurve

    found = routing.read(trace)
    routing.check_model(found, model)
    return HitCurve(found, trace)


def given_plan(plan: Plan, name: str) -> Plan:
    """``plan`` for the model that ``name`` finds, after checking that it was made for that model and for this
    machine.

    Raises:
        UsageError: the model is not on this machine.
        PlanError: the plan is for another model or another machine, and the message says what differs; or something
            in it cannot be, such as a pattern that is no regular expression (PatternError).
    """
    from tensortier import gguf, hardware, library, placement, planid

    placement.check(plan.placement)
    planid.check_present(plan)
    if gguf.is_remote(name):
        raise UsageError(
            f"this plan was made for a remote file: download it, and run the plan with it: tensortier run FILE "
            f"--plan PLAN ({name})"
        )
    try:
        source = library.find(name)
    except ModelNotFound as exc:
        if name != plan.model:
            raise
        raise ModelNotFound(
            f"the plan's model is no longer there ({name}): say where it is now: tensortier run MODEL --plan FILE"
        ) from exc
    planid.check_model(plan, gguf.read(source))
    if plan.machine_id or plan.placement.devices or plan.placement.overrides:
        machine = hardware.probe(source, rpc=plan.rpc)
        planid.check_machine(plan, machine)
        placement.check_devices(plan.placement, machine)
        if plan.tier is not None:
            plan = replace(plan, warnings=(*plan.warnings, *_short_of_ram(plan, machine)))
    return replace(plan, model=source)


def _short_of_ram(plan: Plan, machine: Hardware) -> list[str]:
    """What to be warned of where a plan with weights on the drive, which fills RAM on purpose, was made for more RAM
    than is available now.

    Raises:
        PlanError: it takes more than this process may ever use.
    """
    taken = ram_of(plan, machine)
    told = f"this plan takes {readable_size(taken)} of RAM"
    again = "plan again for less (--ram)"
    if 0 < machine.ram_limit < taken:
        raise PlanError(f"{told}, and this process may use {readable_size(machine.ram_limit)}: {again}")
    if machine.ram_available < taken:
        return [f"{told}, of which {readable_size(machine.ram_available)} are free now: {again}"]
    return []


def ram_of(plan: Plan, machine: Hardware) -> int:
    """Bytes of main memory that a plan takes, by its own count: of the CPU, of devices that share it, of what holds
    weights from the drive, and of the process."""
    from tensortier import budget

    shared = budget.budget_of(machine, None).shared
    rows = {CPU, DEVICE, budget.PROCESS} | shared
    return sum(row.total_bytes for row in plan.memory if row.device in rows)


def check_ram(planned: Planned) -> None:
    """That a budget of main memory is kept: a file that is mapped because it does not fit would fill what there is.

    Raises:
        UsageError: it is not, and the message says what would help.
    """
    wish, plan = planned.wish, planned.plan
    if wish.ram is None or wish.elsewhere is not None or plan.tier is not None:
        return
    taken = ram_of(plan, planned.hardware)
    if taken <= wish.ram:
        return
    line = f"--ram {readable_size(wish.ram)} is too little: this takes {readable_size(taken)}"
    if wish.manual.given:
        raise UsageError(
            f"{line}; leave the options of manual placement out, and what RAM does not hold stays on the drive"
        )
    if wish.settings.load_mode != "auto":
        raise UsageError(
            f"{line}; leave --load-mode out, and what RAM does not hold stays on the drive and is read as it is needed"
        )
    raise UsageError(f"{line}{_least_with_the_drive(planned)}")


def _least_with_the_drive(planned: Planned) -> str:
    from tensortier import budget, paging

    model, plan = planned.model, planned.plan
    process = sum(row.total_bytes for row in plan.memory if row.device == budget.PROCESS)
    rows = [row for row in plan.memory if row.device != budget.PROCESS]
    shared = budget.budget_of(planned.hardware, None).shared
    least = paging.OnDrive(model, plan, rows, {}).least
    if least is None:
        return ", and nothing of this model can stay on the drive"
    least += process + sum(row.total_bytes for row in rows if row.device in shared)
    settings = plan.settings
    return (
        f", and with as much as possible on the drive {readable_size(least)}; what would help: fewer tokens of context "
        f"than {settings.n_ctx or model.context_length} (--context), or a smaller micro-batch than "
        f"{settings.n_ubatch} (--ubatch)"
    )


def settle(wish: Wish, model: ModelInfo) -> Workload:
    """The workload, which has to fit in the context: an assumed one is shortened, one that was asked for is not.

    Raises:
        UsageError: more tokens than the context that was asked for, or than the model was trained for.
    """
    from tensortier import formulas, workloads

    context = formulas.context_of(model, wish.settings)
    if wish.undecided.context:
        context = model.context_length or workloads.LONGEST
    asked = wish.workload
    if asked is None:
        return workloads.fitted(Workload(), context)
    if asked.context > context:
        longer = f"the workload {asked.name} needs {asked.context} tokens of context"
        if wish.undecided.context:
            raise UsageError(
                f"{longer}, and this model was trained for {context}: give a shorter one, or say "
                f"--context {formulas.padded(asked.context)} to go beyond that all the same"
            )
        raise UsageError(f"{longer}, and --context gives it {context}: raise the one or shorten the other")
    return asked


def within_budget(machine: Hardware, vram: Sequence[int], ram: int | None) -> Hardware:
    """``machine`` with no more free than ``vram`` and ``ram`` allow: they only ever lower what is there.

    Raises:
        UsageError: a budget for a GPU that is not there, or more than there is at all.
    """
    from tensortier import placement

    cards = placement.gpus(machine)
    if vram and not cards:
        raise UsageError("--vram has nothing to limit: there is no GPU here")
    names = ", ".join(card.name for card in cards)
    if len(vram) > 1 and len(vram) != len(cards):
        some = f"{len(cards)} GPUs" if len(cards) > 1 else "one GPU"
        raise UsageError(f"--vram has {len(vram)} sizes for {some} ({names})")
    if len(vram) == 1:
        # one size is for all alike, and one larger card is enough for it to mean something
        largest = max(cards, key=_memory_of)
        _refuse_more(vram[0], _memory_of(largest), "--vram", largest.name)
        vram = list(vram) * len(cards)
    else:
        for size, card in zip(vram, cards, strict=False):
            _refuse_more(size, _memory_of(card), "--vram", card.name)
    if ram is not None:
        if ram < 1:
            raise UsageError("--ram 0 leaves nothing to run in: give a size, such as 8GiB")
        group = 0 < machine.ram_limit < machine.ram_total
        _refuse_more(
            ram, machine.ram_limit, "--ram", "the control group of this process" if group else "this machine"
        )
    limits = dict(zip((card.name for card in cards), vram, strict=False))
    devices = tuple(
        replace(d, memory_free=min(d.memory_free, limits[d.name])) if d.name in limits else d
        for d in machine.devices
    )
    available = machine.ram_available if ram is None else min(machine.ram_available, ram)
    return replace(machine, devices=devices, ram_available=available)


def plan_with_less(planned: Planned, failure: OutOfMemory) -> Planned:
    """The plan again, where a GPU could not give what ``planned`` asked of it: those that llama.cpp's message names, or
    all where it names nothing, are asked for a twentieth or 256 MiB less than before.

    Raises:
        OutOfMemory: ``failure``, where no GPU is to blame: taking from it would only ask more of main memory.
    """
    from tensortier import placement, planner

    def less(asked: int, total: int) -> int:
        """What has to be free for a plan that takes less than ``asked``: the planner keeps a margin of it."""
        margin = min(planner.DEVICE_MARGIN, total // 10)
        return max(0, asked - max(asked // 20, 256 << 20)) + margin

    gpus = [d.name for d in placement.gpus(planned.hardware)]
    asked = {
        row.device: row.total_bytes for row in planned.plan.memory if row.device in gpus and row.total_bytes
    }
    named = {name: size for name, size in asked.items() if re.search(rf"\b{name}\b", str(failure))}
    if not named and not _MAIN_MEMORY.search(str(failure)):
        named = asked
    if not named:
        raise failure
    devices = tuple(
        replace(d, memory_free=min(d.memory_free, less(named[d.name], d.memory_total)))
        if d.name in named
        else d
        for d in planned.hardware.devices
    )
    machine = replace(planned.hardware, devices=devices)
    plan = placed(
        planned.wish,
        planned.model,
        machine,
        planned.workload,
        planned.rates,
        planned.answers,
        planned.hits,
    )
    plan = replace(plan, model_id=planned.plan.model_id, machine_id=planned.plan.machine_id)
    return replace(planned, plan=plan, hardware=machine)


def _memory_of(device: Device) -> int:
    """All of it, also what driver and error correction keep of a card from the catalogue: as it is sold."""
    return device.memory_total + int(device.details.get("reserve_bytes", 0))


def _refuse_more(size: int, there: int, option: str, where: str) -> None:
    if there and size > there:  # some backends do not tell how much there is
        raise UsageError(
            f"{option} {readable_size(size)} is more than {where} has ({readable_size(there)}): a budget can only "
            "lower it; --gpu and --ram together describe another machine"
        )


def _speeds_here(
    wish: Wish,
    model: ModelInfo,
    machine: Hardware,
    load: Workload,
    answers: Answers | None,
    measured: Measurer,
    say: Callable[[str], None],
) -> Rates | None:
    from tensortier import measuring

    found = measuring.kept(machine, wish.settings, say)
    if found is not None or wish.measure is Measure.NEVER:
        return found
    if wish.measure is Measure.IF_IT_DECIDES and not _has_to_decide(wish, model, machine, load, answers):
        return None
    return measured(machine, wish.settings, wish.rpc)


def _has_to_decide(
    wish: Wish, model: ModelInfo, machine: Hardware, load: Workload, answers: Answers | None
) -> bool:
    """Whether speeds make a difference: with a GPU here, and more than fits on it."""
    from tensortier import placement, planner

    if wish.manual.given or not placement.gpus(machine):
        return False
    settings = wish.settings
    if wish.undecided.context:
        settings = replace(settings, n_ctx=planner.context_for(model, load))
    place = planner.simple_plan(model, machine, settings, rpc=wish.rpc, answers=answers).placement
    return bool(place.n_gpu_layers != -1 or place.overrides)


def placed(
    wish: Wish,
    model: ModelInfo,
    machine: Hardware,
    load: Workload,
    speeds: Rates | None,
    answers: Answers | None,
    hits: HitRates | None = None,
) -> Plan:
    """The plan for a machine as it is described. Without ``speeds`` it promises none. Raises as ``planner.plan``."""
    from tensortier import measuring, placement, planner

    settings, undecided = wish.settings, wish.undecided
    if wish.manual.given:
        if undecided.context:
            settings = replace(settings, n_ctx=planner.context_for(model, load))
        placed, warnings = placement.from_flags(model, machine, **vars(wish.manual))
        return planner.manual_plan(
            model,
            machine,
            settings,
            placed,
            workload=load,
            rates=speeds,
            rpc=wish.rpc,
            warnings=warnings,
            answers=answers,
        )
    known = speeds
    if known is None and (wish.measure is Measure.NEVER or not placement.gpus(machine)):
        known = measuring.assumed(machine)  # what fits, and in which way, need not wait for a measurement
    plan = planner.plan(
        model,
        machine,
        settings,
        workload=load,
        rates=known,
        open=planner.Open(
            undecided.context,
            undecided.kv_type,
            undecided.ubatch,
            undecided.op_offload,
            undecided.repack,
        ),
        rpc=wish.rpc,
        answers=answers,
        hits=hits,
    )
    return plan if speeds is not None else _without_speeds(plan)


def _without_speeds(plan: Plan) -> Plan:
    """What was only assumed to choose a placement by is no prediction."""
    candidates = tuple(replace(candidate, estimate=None) for candidate in plan.candidates)
    return replace(plan, estimate=None, candidates=candidates)
