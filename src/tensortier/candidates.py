"""Placements that people choose, and that the optimum is compared with. Each is a function of what there is to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from tensortier import fit, placement
from tensortier.memory import Answers
from tensortier.overrides import compact
from tensortier.types import DeviceMemory, ModelInfo, Override, Placement, Plan, Tensor

CPU_ONLY = "CPU only"
EVERYTHING = "everything on "
WHOLE_LAYERS = "whole layers"
FIT = "llama.cpp --fit"
EXPERTS_ON_CPU = "experts on the CPU"
ATTENTION_FIRST = "attention first"
OPTIMAL = "optimal"


def simplicity(name: str) -> int:
    """For ties: the lower, the simpler."""
    order = (CPU_ONLY, WHOLE_LAYERS, FIT, EXPERTS_ON_CPU, ATTENTION_FIRST, OPTIMAL)
    return 0 if name.startswith(EVERYTHING) else order.index(name)


@dataclasses.dataclass(frozen=True)
class Question:
    """What a placement is wanted for.

    ``plan`` has the settings and remote servers. ``free``: free bytes of the devices, in llama.cpp's order;
    ``room``: how many of them may be filled. ``answers`` tells what a placement takes.
    """

    plan: Plan
    model: ModelInfo
    free: Mapping[str, int]
    room: Mapping[str, int]
    answers: Answers

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self.room)

    def rows(self, place: Placement) -> tuple[DeviceMemory, ...]:
        return self.answers.ask(dataclasses.replace(self.plan, placement=place))

    def fits(self, place: Placement) -> bool:
        """On the devices; main memory is not looked at."""
        return not excess(self.rows(place), self.room)

    def offloaded(
        self, devices: Sequence[str], n_gpu_layers: int = -1, overrides: tuple[Override, ...] = ()
    ) -> Placement:
        """Layers shared out by room. The shares are written down, so that the layers are where they were planned
        whatever is free at the load."""
        shares = tuple(float(self.room[d]) for d in devices)
        split = shares if len(devices) > 1 and any(shares) else ()
        kv_on_device = self.plan.placement.kv_on_device
        return Placement(tuple(devices), n_gpu_layers, split, overrides, kv_on_device)


def excess(rows: Sequence[DeviceMemory], room: Mapping[str, int]) -> dict[str, int]:
    """Bytes over the room of each device that is too full."""
    return {
        r.device: r.total_bytes - room[r.device]
        for r in rows
        if r.device in room and r.total_bytes > room[r.device]
    }


def proposals(question: Question) -> Iterator[tuple[str, Placement]]:
    """All of them that are possible, with their names, the simplest first."""
    yield CPU_ONLY, cpu_only(question)
    for device in question.devices:
        if place := everything(question, (device,)):
            yield EVERYTHING + device, place
    if len(question.devices) > 1 and (place := everything(question, question.devices)):
        yield EVERYTHING + "all devices", place
    strategies: tuple[tuple[str, Callable[[Question], Placement | None]], ...] = (
        (WHOLE_LAYERS, whole_layers),
        (FIT, fitted),
        (EXPERTS_ON_CPU, experts_on_cpu),
        (ATTENTION_FIRST, attention_first),
    )
    for name, strategy in strategies:
        found = strategy(question) if question.devices else None
        if found is not None:
            yield name, found


def cpu_only(question: Question) -> Placement:
    """No device is used, not even for wide batches."""
    return Placement()


def everything(question: Question, devices: Sequence[str]) -> Placement | None:
    """All layers on these devices, by their room."""
    place = question.offloaded(devices)
    return place if question.fits(place) else None


def whole_layers(question: Question) -> Placement | None:
    """The most layers that fit completely, as ``--gpu-layers`` offloads them; None where not even the output does."""
    n = _most(question.model.n_layers + 1, lambda n: question.fits(question.offloaded(question.devices, n)))
    return question.offloaded(question.devices, n) if n else None


def fitted(question: Question) -> Placement | None:
    """What ``--fit`` would do; None where that does not fit after all: it never checks its last resort."""
    found = fit.fit(question.plan, question.model, question.answers, question.free).placement
    if not question.fits(found):
        return None
    return _rewritten(question, found)


def experts_on_cpu(question: Question) -> Placement | None:
    """All layers offloaded, and the routed experts of as few of the first layers on the CPU as will do
    (``--n-cpu-moe``). None for a dense model, or where even all of them are too few."""
    model = question.model
    if not model.is_moe:
        return None
    layers = sorted({t.layer for t in model.tensors if t.role.is_routed_expert and t.layer is not None})

    def spilled(kept: int) -> Placement:
        gone = set(layers[: len(layers) - kept])
        tensors = [t for t in model.tensors if t.role.is_routed_expert and t.layer in gone]
        return question.offloaded(question.devices, -1, to_cpu(tensors))

    if not question.fits(spilled(0)):
        return None
    return spilled(_most(len(layers), lambda kept: question.fits(spilled(kept))))


def attention_first(question: Question) -> Placement | None:
    """All attention and KV cache on the devices, and as many feed-forward tensors as fit beside them: those of the
    first layers, and routed experts only after all else. Where not all attention fits, that of as many of the last
    layers as do, without their feed-forward tensors; None where not even one."""
    if place := _spilled(question):
        return place
    spill_all = to_cpu(_feed_forward(question.model))

    def at(n: int) -> Placement:
        return question.offloaded(question.devices, n, spill_all)

    n = _most(question.model.n_layers + 1, lambda n: question.fits(at(n)))
    return at(n) if n else None


def _spilled(question: Question) -> Placement | None:
    """All layers offloaded, and just enough feed-forward tensors moved to the CPU, last layers first and routed
    experts before dense ones. None when that is not enough."""
    place = question.offloaded(question.devices)
    where = placement.resolve(question.model, place, question.room)
    queue: dict[str, list[Tensor]] = {name: [] for name in question.room}
    tensors = _feed_forward(question.model)
    for tensor in sorted(tensors, key=lambda t: (t.role.is_routed_expert, t.layer or 0, t.nbytes)):
        if where[tensor.name] in queue:
            queue[where[tensor.name]].append(tensor)
    moved: list[Tensor] = []
    # Moving weights changes the compute buffers too, so ask again until it fits; every round moves something.
    while over := excess(question.rows(place), question.room):
        for device, nbytes in over.items():
            while nbytes > 0 and queue[device]:
                moved.append(tensor := queue[device].pop())
                nbytes -= tensor.nbytes
            if nbytes > 0:
                return None
        place = dataclasses.replace(place, overrides=to_cpu(moved))
    return place


def _feed_forward(model: ModelInfo) -> list[Tensor]:
    return [t for t in model.tensors if t.role.is_routed_expert or t.role.is_dense_ffn]


def _most(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that fits, by bisection; 0 is not asked."""
    if most and fits(most):
        return most
    low, high = 0, most  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _rewritten(question: Question, place: Placement) -> Placement:
    """The same with few and anchored patterns."""
    model, free = question.model, question.free
    plain = placement.resolve(model, dataclasses.replace(place, overrides=()), free)
    moved: dict[str, list[str]] = {}
    for name, device in placement.resolve(model, place, free).items():
        if device != plain[name]:
            moved.setdefault(device, []).append(name)
    n = -1 if place.n_gpu_layers > model.n_layers else place.n_gpu_layers
    overrides = compact(moved, [t.name for t in model.tensors])
    return dataclasses.replace(place, n_gpu_layers=n, overrides=overrides)


def to_cpu(tensors: Sequence[Tensor]) -> tuple[Override, ...]:
    """Anchored overrides that send exactly these tensors to the CPU."""
    return compact({"CPU": [t.name for t in tensors]})
