"""From a model and a machine to a plan: where every tensor goes, proved by llama.cpp before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tensortier import memory, placement
from tensortier.overrides import compact
from tensortier.types import DeviceMemory, Hardware, ModelInfo, Override, Placement, Plan, Settings, Tensor

GIB = 1 << 30
# Kept free on every GPU, as llama.cpp's own --fit does: its breakdown leaves out the driver's context and pools.
DEVICE_MARGIN = 1 * GIB


def manual_plan(
    model: ModelInfo,
    hardware: Hardware,
    settings: Settings,
    place: Placement,
    *,
    rpc: Sequence[str] = (),
    warnings: Sequence[str] = (),
    answers: memory.Answers | None = None,
) -> Plan:
    """The plan for a placement that somebody chose: its memory is predicted, and what does not fit is said.
    ``answers`` as for ``simple_plan``.

    Raises:
        LoadError, ModelFileError: llama.cpp would refuse to load it so.
    """
    plan = Plan(model.path, place, _with_threads(settings, hardware), rpc=tuple(rpc))
    rows = memory.predict(plan) if answers is None else answers.ask(plan)
    plan = _finish(plan, hardware, rows, ["placed by hand"], model)
    return dataclasses.replace(plan, warnings=(*warnings, *plan.warnings))


def simple_plan(
    model: ModelInfo,
    hardware: Hardware,
    settings: Settings,
    *,
    rpc: Sequence[str] = (),
    answers: memory.Answers | None = None,
) -> Plan:
    """Everything on the GPUs if it fits; else attention and KV cache there first and as many feed-forward
    tensors as fit beside them; else as many whole layers as fit; else all in RAM.

    "Fits" is llama.cpp's own answer (``memory.Probe``) against free memory less ``DEVICE_MARGIN``. For a machine or
    a model that is not here, ``answers`` (``memory.Formulas``) is asked instead.

    Raises:
        LoadError, ModelFileError: llama.cpp would not load this model at all.
    """
    plan = Plan(model=model.path, settings=_with_threads(settings, hardware), rpc=tuple(rpc))
    if answers is not None:
        return _fit(answers, plan, model, hardware)
    with memory.Probe() as probe:
        return _fit(probe, plan, model, hardware)


def _fit(answers: memory.Answers, plan: Plan, model: ModelInfo, hardware: Hardware) -> Plan:
    gpus = placement.gpus(hardware)
    room = {d.name: _room(d.memory_free, d.memory_total) for d in gpus}
    if not gpus:
        return _finish(
            plan, hardware, answers.ask(plan), ["no GPU here: all weights and the KV cache in RAM"], model
        )
    names = tuple(room)
    # Shares are written down, so that the layers are where they were planned whatever is free at the load.
    shares = tuple(float(r) for r in room.values()) if len(names) > 1 and any(room.values()) else ()
    plan = dataclasses.replace(plan, placement=Placement(names, n_gpu_layers=-1, tensor_split=shares))
    rows = answers.ask(plan)
    if not _excess(rows, room):
        return _finish(plan, hardware, rows, ["everything fits on " + " and ".join(names)], model)
    spilled = _spill(answers, plan, model, room)
    if spilled is not None:
        plan, rows, moved = spilled
        reason = (
            f"attention and KV cache on {' and '.join(names)}; {_gib(moved)} of feed-forward weights do not fit "
            "beside them and are computed by the CPU"
        )
        return _finish(plan, hardware, rows, [reason], model)
    plan, rows = _whole_layers(answers, plan, model, room)
    layers = plan.placement.n_gpu_layers
    if layers:
        reason = (
            f"not even all attention and KV cache fit on {' and '.join(names)}: "
            f"{layers} of {model.n_layers + 1} layers there without their feed-forward weights, the rest in RAM"
        )
    else:
        reason = f"nothing useful fits on {' and '.join(names)}: all in RAM"
    return _finish(plan, hardware, rows, [reason], model)


def _room(free: int, total: int) -> int:
    """Bytes we may fill of a device: free memory less the margin, which on a tiny device is a tenth of it."""
    return max(0, free - min(DEVICE_MARGIN, total // 10))


def _excess(rows: Sequence[DeviceMemory], room: Mapping[str, int]) -> dict[str, int]:
    """Bytes over the room of each device that is too full."""
    return {
        r.device: r.total_bytes - room[r.device]
        for r in rows
        if r.device in room and r.total_bytes > room[r.device]
    }


def _spill(
    answers: memory.Answers, plan: Plan, model: ModelInfo, room: Mapping[str, int]
) -> tuple[Plan, tuple[DeviceMemory, ...], int] | None:
    """All layers offloaded, and just enough feed-forward tensors moved to the CPU, last layers first and routed
    experts before dense ones. None when that is not enough. The bytes of what was moved come third."""
    where = placement.resolve(model, plan.placement, room)
    queue: dict[str, list[Tensor]] = {name: [] for name in room}
    candidates = [t for t in model.tensors if t.role.is_routed_expert or t.role.is_dense_ffn]
    for tensor in sorted(candidates, key=lambda t: (t.role.is_routed_expert, t.layer or 0, t.nbytes)):
        if where[tensor.name] in queue:
            queue[where[tensor.name]].append(tensor)
    moved: list[Tensor] = []
    # Moving weights changes the compute buffers too, so ask again until it fits; every round moves something.
    while excess := _excess(rows := answers.ask(plan), room):
        for device, over in excess.items():
            while over > 0 and queue[device]:
                moved.append(tensor := queue[device].pop())
                over -= tensor.nbytes
            if over > 0:
                return None
        overrides = to_cpu(moved)
        plan = dataclasses.replace(plan, placement=dataclasses.replace(plan.placement, overrides=overrides))
    return plan, rows, sum(t.nbytes for t in moved)


def _whole_layers(
    answers: memory.Answers, plan: Plan, model: ModelInfo, room: Mapping[str, int]
) -> tuple[Plan, tuple[DeviceMemory, ...]]:
    """The most layers that fit while all feed-forward weights stay on the CPU, found by bisection."""
    spill_all = to_cpu([t for t in model.tensors if t.role.is_routed_expert or t.role.is_dense_ffn])

    def at(n: int) -> Plan:
        place = dataclasses.replace(plan.placement, n_gpu_layers=n, overrides=spill_all) if n else Placement()
        return dataclasses.replace(plan, placement=place)

    low, high = 0, model.n_layers + 1  # low fits (on no device at all), high does not
    while high - low > 1:
        middle = (low + high) // 2
        if _excess(answers.ask(at(middle)), room):
            high = middle
        else:
            low = middle
    return at(low), answers.ask(at(low))


def to_cpu(tensors: Sequence[Tensor]) -> tuple[Override, ...]:
    """Anchored overrides that send exactly these tensors to the CPU."""
    return compact({"CPU": [t.name for t in tensors]})


def _beyond_training(model: ModelInfo, settings: Settings) -> list[str]:
    if not 0 < model.context_length < settings.n_ctx:
        return []
    return [
        f"the context of {settings.n_ctx} tokens is longer than the {model.context_length} that this model was "
        "trained for: what it writes beyond them is likely to be nonsense"
    ]


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
    reasons: Sequence[str],
    model: ModelInfo,
) -> Plan:
    ram = sum(row.total_bytes for row in rows if row.device == "CPU")
    mode = placement.load_mode(plan)
    if plan.settings.load_mode == "auto" and ram > hardware.ram_available:
        mode = "mmap"  # what does not fit in RAM cannot be read into it
    settings = dataclasses.replace(plan.settings, load_mode=mode)
    warnings = (*_beyond_training(model, plan.settings), *_shortages(hardware, rows))
    return dataclasses.replace(
        plan, settings=settings, memory=rows, reasons=tuple(reasons), warnings=warnings
    )


def _shortages(hardware: Hardware, rows: Sequence[DeviceMemory]) -> list[str]:
    """A warning for each memory that the plan overfills."""
    free = {d.name: d.memory_free for d in hardware.devices}
    free["CPU"] = hardware.ram_available
    return [
        f"{r.device} has {_gib(free[r.device])} free and the plan needs {_gib(r.total_bytes)}"
        for r in rows
        if r.device in free and r.total_bytes > free[r.device]
    ]


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"
