"""A plan's decisions in sentences: why it is so, why the others lost, what to be careful about."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tensortier import formulas, placement
from tensortier.budget import PROCESS, Budget
from tensortier.candidates import CPU_ONLY, EVERYTHING, FIT, Question
from tensortier.mapped import DEFAULT_READ_AHEAD
from tensortier.search import PAGEABLE, QUANTIZED_KV_GAIN, Option, Search
from tensortier.types import (
    Candidate,
    DeviceMemory,
    Estimate,
    Hardware,
    ModelInfo,
    Placement,
    Plan,
    Settings,
    Workload,
)

GIB = 1 << 30
MIB = 1 << 20
_LITTLE_RAM = 0.1  # of what there is
_FULL_CARD = 0.95
_PLAIN_KV = ("f32", "f16", "bf16")
_NOT_WORTH_IT = "a quantized KV cache is not worth it"
_CONTEXT_STEP = 1024
_LEAST_UBATCH = 64  # that is advised: less makes prompts slow and saves little
ASSUMED = "assumed"  # provenance of speeds that are enough to choose by and no promise


def listed(names: Sequence[str]) -> str:
    """ "A", "A and B", "A, B and C"."""
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else "".join(names)


def gib(nbytes: float) -> str:
    """ "1.50 GiB", or MiB where that is less than a tenth."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / MIB:.0f} MiB"


def why(
    question: Question,
    chosen: Option,
    rows: Sequence[DeviceMemory],
    asked: Settings,
    options: Sequence[Option],
) -> list[str]:
    """Where things are and what did not fit, then the settings that were chosen, then how far --fit is behind."""
    told = [_where(question, chosen, rows, asked)]
    if chosen.paged:
        told.append(
            f"{gib(chosen.paged)} of the weights on the CPU do not fit in RAM and are read from the drive again "
            "and again"
        )
    told += settings(chosen.settings, asked)
    rivals = [o for o in options if o.name == FIT and o.fits and o.settings.type_k == chosen.settings.type_k]
    if rivals and chosen.name != FIT and known(chosen.estimate):
        rival = min(rivals, key=lambda o: o.seconds)
        told.append(f"llama.cpp's --fit would take {ratio(rival.seconds, chosen.seconds)} for this workload")
    return told


def known(estimate: Estimate) -> bool:
    """Whether it is of speeds that somebody measured or published, so that it can be told."""
    return estimate.provenance.get("CPU") != ASSUMED


def on_the_drive(
    made: Plan,
    paged: tuple[int, int],
    stays: int,
    mapped: Plan,
    budget: Budget,
    read_ahead: int | None = None,
) -> str:
    """What is left on the drive, and what a mapped file would come to.

    Args:
        paged: bytes of experts and of other weights that ``made`` leaves there.
        stays: bytes of these others that are in RAM all the time.
        read_ahead: bytes, which the kernel is set to for the drive; None: not known.
    """
    assert made.tier is not None
    experts, dense = paged
    parts = []
    if experts:
        held = _share(made.tier.expert_bytes, experts)
        parts.append(f"{gib(experts)} of experts, of which RAM holds {held} at a time")
    if dense:
        parts.append(f"{gib(dense)} of other weights, of which {_share(stays, dense)} stay in RAM")
    needed = sum(row.total_bytes for row in mapped.memory if row.device in ("CPU", PROCESS))
    has = budget.ram_beside(mapped.memory) + budget.process
    told = f"{gib(needed)} would be needed in RAM, which has {gib(max(0, has))}: on the drive are "
    told += ", and ".join(parts)
    if made.estimate is not None and mapped.estimate is not None and known(made.estimate):
        longer = about(mapped.estimate.seconds, made.estimate.seconds)
        told += f"; mapping the file instead, as llama.cpp does, would take {longer}, {_window(read_ahead)}"
    return told


def _window(read_ahead: int | None) -> str:
    """What page faults were reckoned with."""
    if read_ahead is None:
        return f"if the drive's read-ahead is {DEFAULT_READ_AHEAD >> 10} KiB (it is not known)"
    size = f"{read_ahead >> 20} MiB" if read_ahead >= MIB else f"{read_ahead >> 10} KiB"
    return f"by this drive's read-ahead of {size}"


def _share(part: int, whole: int) -> str:
    share = min(1.0, part / whole)
    return f"{share:.0%}" if share >= 0.01 else "less than 1%"


def context(n_ctx: int, workload: Workload) -> str:
    return f"context of {n_ctx} tokens: the workload needs {workload.context}"


def attention_first(question: Question, place: Placement) -> str:
    """What ``candidates.attention_first`` came to."""
    names = listed(question.devices)
    if place.n_gpu_layers < 0:
        where = placement.resolve(question.model, place, question.free)
        moved = sum(
            t.nbytes for t in question.model.tensors if t.layer is not None and where[t.name] == "CPU"
        )
        return (
            f"attention and KV cache on {names}; {gib(moved)} of feed-forward weights do not fit beside them and are "
            "computed by the CPU"
        )
    return (
        f"not even all attention and KV cache fit on {names}: {place.n_gpu_layers} of {question.model.n_layers + 1} "
        "layers there without their feed-forward weights, the rest in RAM"
    )


def _where(question: Question, chosen: Option, rows: Sequence[DeviceMemory], asked: Settings) -> str:
    model, names = question.model, listed(question.devices)
    if not question.devices:
        return (
            "no GPU here: all on the CPU"
            if chosen.paged
            else "no GPU here: all weights and the KV cache in RAM"
        )
    if chosen.name.startswith(EVERYTHING):
        told = f"everything fits on {listed(chosen.placement.devices)}"
        return f"{told}: nothing to decide" if chosen.settings.type_k == asked.type_k else told
    if chosen.name == CPU_ONLY and not any(question.room.values()):
        return f"no room on {listed(question.devices)}: all in RAM"
    if chosen.name == CPU_ONLY:
        return f"all in RAM: computing there is faster than with {names}"
    layers = placement.layer_devices(model, chosen.placement, question.free)
    where = placement.resolve(model, chosen.placement, question.free)
    on_cpu = layers[:-1].count("CPU")
    held = {r.device: r for r in rows}
    counts = [f"{layers[:-1].count(d)} on {d}" for d in question.devices if layers[:-1].count(d)]
    told = "attention and KV cache of all layers on " + listed([d for d in question.devices if d in layers])
    if len(counts) > 1:
        told += f" ({', '.join(counts)})"
    if on_cpu == model.n_layers:
        told = "attention and KV cache of all layers in RAM"
    elif on_cpu:
        kv = held["CPU"].kv_bytes if "CPU" in held else 0
        told = (
            f"{model.n_layers - on_cpu} of {model.n_layers} layers offloaded ({', '.join(counts)}), the first "
            f"{on_cpu} in RAM"
        )
        if kv:
            told += f" with {gib(kv)} of the KV cache"
    spilled = [t for t in model.tensors if t.layer is not None and layers[t.layer] != where[t.name]]
    to_ram = sum(t.nbytes for t in spilled if where[t.name] == "CPU")
    experts = sum(t.nbytes for t in spilled if where[t.name] == "CPU" and t.role.is_routed_expert)
    if to_ram:
        what = "expert weights" if experts == to_ram else "feed-forward weights"
        told += f"; {gib(to_ram)} of {what} do not fit beside them and are in RAM"
    for device in question.devices:
        if there := sum(t.nbytes for t in spilled if where[t.name] == device):
            told += f"; {gib(there)} of the feed-forward weights of other layers on {device}"
    return told


def settings(chosen: Settings, asked: Settings) -> list[str]:
    """The settings that are not those that were asked for, and why."""
    told = []
    if chosen.n_ubatch != asked.n_ubatch:
        told.append(
            f"micro-batch {chosen.n_ubatch} instead of {asked.n_ubatch}: "
            + (
                "fewer passes over the weights while the prompt is computed"
                if chosen.n_ubatch > asked.n_ubatch
                else "computing takes less RAM, of which there is little"
            )
        )
    if chosen.type_k != asked.type_k:
        told.append(
            f"KV cache in {chosen.type_k} instead of {asked.type_k}: at least {QUANTIZED_KV_GAIN:.0%} faster here, "
            "and it costs a little quality"
        )
    if chosen.repack != asked.repack:
        told.append(
            "weights are reordered for faster kernels"
            if chosen.repack
            else "weights stay as they are in the file: this processor computes prompts faster so than with reordered "
            "ones"
        )
    if chosen.op_offload != asked.op_offload:
        told.append(
            "large batches are sent to the GPU"
            if chosen.op_offload
            else "large batches stay on the CPU: copying weights over the link would take longer"
        )
    return told


def ratio(seconds: float, than: float) -> str:
    """ "1.8x as long", "3% longer", "as long"."""
    times = seconds / than
    if times >= 1.2:
        return f"{times:.1f}x as long"
    if times >= 1.005:
        return f"{times - 1:.0%} longer"
    return "as long"


def about(seconds: float, than: float) -> str:
    """ "about 18 times as long", "about as long", of speeds that are not known well."""
    times = seconds / than
    if times >= 10:
        return f"about {times:.0f} times as long"
    return f"about {times:.1f} times as long" if times >= 1.05 else "about as long"


def slower(seconds: float, than: float) -> str:
    """ "1.8x slower", "3.1% slower", "as fast", "0.7% faster"."""
    times = seconds / than
    if times >= 1.2:
        return f"{times:.1f}x slower"
    if times >= 1.005:
        return f"{times - 1:.1%} slower"
    return "as fast" if times >= 0.995 else f"{1 - times:.1%} faster"


def why_not(option: Option, winner: Option) -> str:
    """Why a candidate was not chosen."""
    if option.over:
        return "does not fit: " + listed([f"{gib(n)} too much for {d}" for d, n in option.over.items()])
    if option.paged is None:
        return "does not fit in RAM"
    told = slower(option.seconds, winner.seconds)
    if told.endswith("slower"):
        return told + _cause(option, winner)
    if option.settings.type_k != winner.settings.type_k:
        return _NOT_WORTH_IT
    return f"{told}, but less simple" if told.endswith("faster") else told


def mapped(candidate: Candidate, made: Plan, budget: Budget) -> str:
    """Why a candidate that maps the file was not chosen, where a plan with weights on the drive was."""
    if not candidate.fits or candidate.estimate is None or made.estimate is None:
        return candidate.note
    told = slower(candidate.estimate.seconds, made.estimate.seconds)
    if not told.endswith("slower"):
        return _NOT_WORTH_IT if candidate.settings.type_k != made.settings.type_k else told
    if not budget.paged(candidate.memory, pageable=True):
        return told
    return f"{told}: the file is mapped, and the kernel drops pages that are needed next"


def _cause(option: Option, winner: Option) -> str:
    """What it does worse, where bytes tell."""
    ours, theirs = ({r.device: r for r in o.rows} for o in (winner, option))
    if (option.paged or 0) > (winner.paged or 0):
        return f": {gib(option.paged or 0)} of weights read from the drive"
    found = []
    for kind, what in (("kv_bytes", "KV cache"), ("weights_bytes", "weights")):
        mine = getattr(ours["CPU"], kind) if "CPU" in ours else 0
        its = getattr(theirs["CPU"], kind) if "CPU" in theirs else 0
        if kind == "weights_bytes":
            mine, its = mine - (winner.paged or 0), its - (option.paged or 0)
        if its > mine * 1.02 + 16 * MIB:
            found.append(f"{gib(its)} of {what}")
    return f": {' and '.join(found)} in RAM" if found else ""


def what_would_help(search: Search, options: Sequence[Option]) -> str:
    """One line for a model that cannot run here: how much is missing, and what would change that."""
    asked = search.choices[0]
    lacking = max(MIB, min(_missing(option, search.budget) for option in options if not option.over))
    line = f"this model does not fit in memory: {gib(lacking)} of main memory are missing"
    helps = []
    if context := _longest(search, formulas.context_of(search.model, asked)):
        helps.append(f"a shorter context (--context {context})")
    quantized = dataclasses.replace(asked, type_k="q8_0", type_v="q8_0")
    if asked.type_k == "f16" and asked.flash_attention != "off" and search.possible(quantized):
        helps.append("a KV cache in q8_0 (--cache-type-k q8_0 --cache-type-v q8_0)")
    least = min(_LEAST_UBATCH, asked.n_ubatch)
    if least < asked.n_ubatch and search.possible(dataclasses.replace(asked, n_ubatch=least)):
        helps.append(f"a smaller micro-batch (--ubatch {least})")
    if not search.pageable(asked) and search.possible(dataclasses.replace(asked, load_mode="auto")):
        helps.append("leaving weights on the drive and reading them as they are needed (--load-mode auto)")
    return f"{line}; what would help: {', or '.join(helps)}" if helps else line


def _missing(option: Option, budget: Budget) -> int:
    """Bytes of main memory that are missing for what cannot be paged."""
    cpu = next(r for r in option.rows if r.device == "CPU")
    part = sum(r.total_bytes for r in option.rows if r.device in budget.shared)
    weights = cpu.weights_bytes if option.settings.load_mode in PAGEABLE else 0
    return max(0, cpu.total_bytes - weights + part - budget.ram)


def _longest(search: Search, n_ctx: int) -> int:
    """The longest context below ``n_ctx`` that can run, in whole steps; 0 where not even one step can."""
    asked = search.choices[0]
    low, high = 0, -(-n_ctx // _CONTEXT_STEP)
    while high - low > 1:
        middle = (low + high) // 2
        if search.possible(dataclasses.replace(asked, n_ctx=middle * _CONTEXT_STEP)):
            low = middle
        else:
            high = middle
    return low * _CONTEXT_STEP


def warnings(plan: Plan, model: ModelInfo, hardware: Hardware, budget: Budget) -> list[str]:
    """What to be careful about."""
    told = _beyond_training(model, plan.settings) + _shortages(hardware, plan.memory, budget)
    held = {r.device: r for r in plan.memory}
    cpu = held.get("CPU")
    if cpu is not None and plan.placement.devices and plan.placement.n_gpu_layers and cpu.kv_bytes:
        line = f"{gib(cpu.kv_bytes)} of the KV cache are in RAM: long conversations will be slow"
        if plan.placement.kv_on_device:
            line += "; a shorter context"
            line += " or a quantized KV cache" if plan.settings.type_k in _PLAIN_KV else ""
            line += " would bring more of it to the GPU"
        told.append(line)
    if cpu is not None and plan.tier is None:  # with weights on the drive RAM is filled on purpose
        left = budget.ram_beside(plan.memory) - cpu.total_bytes
        if 0 <= left < _LITTLE_RAM * hardware.ram_limit:
            told.append(f"it leaves {gib(left)} of RAM free")
    for device in hardware.devices:
        row = held.get(device.name)
        full = row is not None and row.total_bytes > _FULL_CARD * device.memory_free
        if hardware.os == "Windows" and device.name in budget.room and full:
            told.append(
                f"{device.name} will be almost full: Windows then moves data to shared memory, which is many times "
                "slower, without an error; turn off the driver's fallback to system memory"
            )
    if 0 < hardware.performance_cores < plan.settings.threads:
        told.append(
            f"{plan.settings.threads} threads on {hardware.performance_cores} performance cores: the slowest one "
            "sets the pace"
        )
    for device_name in budget.left_out:
        told.append(f"{device_name} is not used: its speed is not known")
    return told


def _beyond_training(model: ModelInfo, settings: Settings) -> list[str]:
    if not 0 < model.context_length < settings.n_ctx:
        return []
    return [
        f"the context of {settings.n_ctx} tokens is longer than the {model.context_length} that this model was "
        "trained for: what it writes beyond them is likely to be nonsense"
    ]


def _shortages(hardware: Hardware, rows: Sequence[DeviceMemory], budget: Budget) -> list[str]:
    """A warning for each memory that the plan overfills."""
    free = {d.name: d.memory_free for d in hardware.devices}
    free["CPU"] = max(0, budget.ram_beside(rows))
    return [
        f"{r.device} has {_in_gib(free[r.device])} free and the plan needs {_in_gib(r.total_bytes)}"
        for r in rows
        if r.device in free and r.total_bytes > free[r.device]
    ]


def _in_gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"
