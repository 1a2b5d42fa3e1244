"""Curves and plans for the page: made one after the other in a thread, and kept for the next question."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tensortier import calibrate, deciding, formulas, gguf, measuring, memory, planfile, system
from tensortier.budget import PROCESS
from tensortier.deciding import Wish
from tensortier.errors import LoadError, TensortierError, UsageError
from tensortier.library import LibraryModel
from tensortier.server import forecast, slider, tensormap
from tensortier.server.slider import Base, Curve, Side
from tensortier.server.threads import in_thread
from tensortier.types import DeviceMemory, Estimate, Hardware, ModelInfo, Plan, Workload

_CURVES = 16  # that are kept
_PLANS = 64
_HEADERS = 32
_READING = 2  # headers that are fetched from the hub at a time
_WAITING = 16  # questions, beyond which new ones are refused

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Busy(TensortierError):
    """More questions than can be answered soon."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the page asks about. None: as the server was told, or as the planner finds best."""

    model: LibraryModel
    context: int | None = None
    kv: str | None = None  # type of keys and values
    workload: Workload | None = None


@dataclasses.dataclass(frozen=True)
class Kept:
    """A plan that was made here, with what it is for."""

    id: str
    model: ModelInfo
    name: str  # in the library
    plan: Plan


class Plans:
    """Answers for the page, as JSON.

    Args:
        wish: what the options of the server say for every model. A placement by hand does not hold for the slider.
        machine: before any model was loaded.
    """

    def __init__(self, wish: Wish, machine: Hardware) -> None:
        self.wish = dataclasses.replace(wish, manual=deciding.Manual())
        self.machine = machine
        self._thread = ThreadPoolExecutor(1, "plans")
        self._waiting = 0
        self._going_on = asyncio.Event()
        self._going_on.set()
        self._probe: memory.Probe | None = None
        self._curves: OrderedDict[tuple[object, ...], tuple[Base, bytes]] = OrderedDict()
        self._plans: OrderedDict[str, Kept] = OrderedDict()
        self._headers: OrderedDict[str, ModelInfo] = OrderedDict()  # of files of the hub
        self._reading = asyncio.Semaphore(_READING)
        self._ids: deque[tuple[Plan, str]] = deque(maxlen=16)  # of plans that others hold

    async def curve(self, choice: Choice, loaded: Sequence[Plan] = ()) -> bytes:
        """JSON of the whole slider; see ``_curve_json``. ``loaded``: plans of the models that are loaded now and make
        room for this one. Raises as ``slider.base``; Busy."""
        _, told = await self._call(functools.partial(self._curve, choice, loaded))
        return told

    async def plan(self, choice: Choice, budget: int | None, loaded: Sequence[Plan] = ()) -> bytes:
        """JSON of the plan for a position of the slider; None: the best with all that is free. Raises as
        ``slider.plan_at``; Busy."""
        return await self._call(functools.partial(self._plan, choice, budget, loaded))

    async def forecast(self, choice: Choice, loaded: Sequence[Plan] = ()) -> bytes:
        """JSON of what a file of the hub would do here; the path of ``choice.model`` is its hf:// address. Of the file
        no more than its header is read. Raises as ``forecast.forecast``; ModelFileError where there is no such file or
        it is no model; Busy."""
        source = choice.model.path
        async with self._reading:
            if source not in self._headers:
                self._headers[source] = await in_thread(gguf.read, source)
        self._headers.move_to_end(source)
        model = self._headers[source]
        while len(self._headers) > _HEADERS:
            self._headers.popitem(last=False)
        return await self._call(functools.partial(self._forecast, choice, model, loaded))

    def kept(self, id: str) -> Kept:
        """Raises UsageError for a plan that was not made here, or so long ago that it was forgotten."""
        if id not in self._plans:
            raise UsageError("this plan is not known any more: make it again")
        return self._plans[id]

    def id_of(self, plan: Plan) -> str:
        """The id that this plan has or would have here."""
        for known, id in self._ids:
            if known is plan:
                return id
        id = _id(plan)
        self._ids.append((plan, id))
        return id

    def measured(self) -> bool:
        """Whether a measurement of this machine is kept."""
        return calibrate.load(self.machine) is not None

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Nothing is worked out while inside: what was asked before is answered first, and later questions wait."""
        self._going_on.clear()
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, lambda: None)
            yield
        finally:
            self._going_on.set()

    async def close(self) -> None:
        """Ends the helper process once the question under way is answered."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._thread.shutdown)
        self._drop_probe()

    # --- in the thread

    async def _call(self, work: Callable[[], T]) -> T:
        if self._waiting >= _WAITING:
            raise Busy("too many plans are being made at once: try again in a moment")
        self._waiting += 1
        try:
            await self._going_on.wait()
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._waiting -= 1

    def _answers(self, path: str) -> memory.Answers:
        """Who tells what a plan takes: llama.cpp, but formulas where there are RPC servers. Such a server has one
        client at a time, which is the engine."""
        if not self.wish.rpc:
            return self
        return memory.Formulas(gguf.read(path), {d.name: d.memory_free for d in self.machine.devices})

    def ask(self, plan: Plan) -> tuple[DeviceMemory, ...]:
        """llama.cpp's answer (``memory.Answers``), from a process that stays between questions."""
        if self._probe is None:
            self._probe = memory.Probe()
        try:
            return self._probe.ask(plan)
        except LoadError:
            self._drop_probe()  # it may have ended
            raise

    def _drop_probe(self) -> None:
        probe, self._probe = self._probe, None
        if probe is not None:
            probe.close()

    def _curve(self, choice: Choice, loaded: Sequence[Plan]) -> tuple[Base, bytes]:
        stamps = (_stamp(choice.model.path), _stamp(calibrate.path(self.machine)))
        machine = without(self.machine, loaded)
        key = (*dataclasses.astuple(choice), *stamps, machine.ram_available)
        if key not in self._curves:
            wish = _wished(self.wish, choice)
            rates = measuring.kept(self.machine, wish.settings, _log.warning)
            answers = self._answers(choice.model.path)
            base = slider.base(wish, machine, rates, answers)
            curve = slider.curve(base, answers)
            told = json.dumps(_curve_json(choice, base, curve), separators=(",", ":")).encode()
            self._curves[key] = (base, told)
            while len(self._curves) > _CURVES:
                self._curves.popitem(last=False)
        self._curves.move_to_end(key)
        return self._curves[key]

    def _forecast(self, choice: Choice, model: ModelInfo, loaded: Sequence[Plan]) -> bytes:
        wish, machine = _wished(self.wish, choice), without(self.machine, loaded)
        rates = measuring.kept(self.machine, wish.settings, _log.warning)
        found = forecast.forecast(wish, model, machine, rates)
        told = {
            "fits": not found.drive_bytes,
            "drive": found.drive_bytes,
            "memory": _rows_json(found.plan.memory),
            "estimate": None if found.plan.estimate is None else _estimate_json(found.plan.estimate),
            "context": formulas.context_of(model, found.plan.settings),
            "reasons": found.plan.reasons,
            "warnings": found.plan.warnings,
        }
        return json.dumps(told, separators=(",", ":")).encode()

    def _plan(self, choice: Choice, budget: int | None, loaded: Sequence[Plan]) -> bytes:
        base, _ = self._curve(choice, loaded)
        plan = base.plan if budget is None else slider.plan_at(base, budget, self._answers(choice.model.path))
        kept = Kept(_id(plan), base.model, choice.model.name, plan)
        self._plans[kept.id] = kept
        self._plans.move_to_end(kept.id)
        while len(self._plans) > _PLANS:
            self._plans.popitem(last=False)
        return json.dumps(_plan_json(base, kept), separators=(",", ":")).encode()


def without(machine: Hardware, loaded: Sequence[Plan]) -> Hardware:
    """``machine`` with the RAM that other programs leave to it now, once the models of ``loaded`` are gone. No more
    than it had at first, and in steps of a 32nd of it, so that what was worked out holds for a while."""
    gpus = {d.name for d in machine.devices if d.kind != "cpu"}
    now = system.memory().available
    for plan in loaded:
        # the kernel counts pages of a mapped file as available already
        mapped = plan.settings.load_mode.startswith("mmap") and not plan.settings.repack
        for row in plan.memory:
            if row.device not in gpus:
                now += row.total_bytes - (row.weights_bytes if mapped and row.device == "CPU" else 0)
    step = max(1, machine.ram_available // 32)
    if now >= machine.ram_available - step:
        return machine
    return dataclasses.replace(machine, ram_available=max(step, now // step * step))


def _id(plan: Plan) -> str:
    """The same for the same placement and settings of the same file."""
    what = dataclasses.replace(plan, candidates=(), estimate=None)
    return hashlib.sha256(json.dumps(planfile.to_dict(what)).encode()).hexdigest()[:20]


def _wished(wish: Wish, choice: Choice) -> Wish:
    """The server's wish with what the page chose."""
    settings, undecided = wish.settings, wish.undecided
    if choice.context is not None:
        settings = dataclasses.replace(settings, n_ctx=choice.context)
        undecided = dataclasses.replace(undecided, context=False)
    if choice.kv is not None:
        settings = dataclasses.replace(settings, type_k=choice.kv, type_v=choice.kv)
        undecided = dataclasses.replace(undecided, kv_type=False)
    return dataclasses.replace(
        wish,
        model=choice.model.path,
        settings=settings,
        undecided=undecided,
        workload=choice.workload or wish.workload,
        measure=deciding.Measure.NEVER,
    )


def _stamp(path: str | Path) -> tuple[int, int]:
    """Changes with the file; zeros where there is none."""
    with contextlib.suppress(OSError):
        found = Path(path).stat()
        return found.st_mtime_ns, found.st_size
    return 0, 0


# --- as JSON


def _curve_json(choice: Choice, base: Base, curve: Curve | None) -> dict[str, Any]:
    """The curve with everything the page draws from it. ``tensors``: [name, role, layer, bytes, type] in the order of
    the maps' codes. ``curve`` None: no steps."""
    model, settings, machine = base.model, base.plan.settings, base.machine
    budget = base.budget
    devices = [
        {"name": d.name, "label": d.description, "total": d.memory_total, "free": d.memory_free}
        for d in machine.devices
        if d.name in budget.room
    ]
    devices.append(
        {"name": "CPU", "label": "main memory", "total": machine.ram_limit, "free": machine.ram_available}
    )
    return {
        "model": {
            "id": choice.model.name,
            "name": model.name or choice.model.name,
            "architecture": model.architecture,
            "quantization": model.quantization,
            "bytes": model.nbytes,
            "params": model.n_params,
            "layers": model.n_layers,
            "experts": model.n_expert,
            "experts_used": model.n_expert_used,
            "context_length": model.context_length,
        },
        "workload": dataclasses.asdict(base.workload),
        "settings": dataclasses.asdict(settings),
        "context": formulas.context_of(model, settings),
        "measured": base.rates is not None,
        "devices": devices,
        "kind": None if curve is None else curve.kind,
        "free": 0 if curve is None else curve.free,
        "needed": 0 if curve is None else curve.needed,
        "steps": []
        if curve is None
        else [
            {
                "budget": step.budget,
                "fits": step.fits,
                "tensors": {
                    **_side_json(step.by_tensors, budget.process),
                    **_map_json(base, step.by_tensors),
                },
                "layers": _side_json(step.by_layers, budget.process),
            }
            for step in curve.steps
        ],
        "stairs": []
        if curve is None
        else [{"budget": stair.budget, **_estimate_json(stair.estimate)} for stair in curve.stairs],
        "tensors": [[t.name, t.role.value, t.layer, t.nbytes, t.qtype] for t in model.tensors],
        "reasons": base.plan.reasons,
        "warnings": base.plan.warnings,
    }


def _side_json(side: Side, process: int) -> dict[str, Any]:
    return {
        "memory": _rows_json(side.memory, process),
        "drive": side.drive_bytes,
        "layers": side.layers,
        **_estimate_json(side.estimate),
    }


def _rows_json(rows: tuple[DeviceMemory, ...], process: int = 0) -> list[list[object]]:
    """[device, weights, KV cache, compute] in bytes. What the process itself takes, where ``rows`` do not say it, is
    ``process``."""
    told: list[list[object]] = [[r.device, r.weights_bytes, r.kv_bytes, r.compute_bytes] for r in rows]
    if process and all(r.device != PROCESS for r in rows):
        told.append([PROCESS, process, 0, 0])
    return told


def _estimate_json(found: Estimate) -> dict[str, Any]:
    """Speeds in tokens/s as [middle, low, high]."""
    return {
        "prefill": [_rounded(v) for v in (found.prefill_tokens_per_second, *found.prefill_interval)],
        "decode": [_rounded(v) for v in (found.decode_tokens_per_second, *found.decode_interval)],
        "seconds": _rounded(found.seconds),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _map_json(base: Base, side: Side | Plan) -> dict[str, Any]:
    budget = base.budget
    found = tensormap.tensor_map(base.model, side.placement, side.tier, budget.free, tuple(budget.room))
    return {"places": [[p.device, p.reason] for p in found.places], "map": found.codes}


def _plan_json(base: Base, kept: Kept) -> dict[str, Any]:
    plan = kept.plan
    return {
        "id": kept.id,
        "memory": _rows_json(plan.memory),
        "estimate": None if plan.estimate is None else _estimate_json(plan.estimate),
        "notes": () if plan.estimate is None else plan.estimate.notes,
        "settings": dataclasses.asdict(plan.settings),
        "reasons": plan.reasons,
        "warnings": plan.warnings,
        "candidates": [
            {
                "name": c.name,
                "note": c.note,
                **({} if c.estimate is None else _estimate_json(c.estimate)),
            }
            for c in plan.candidates
        ],
        **_map_json(base, plan),
    }
