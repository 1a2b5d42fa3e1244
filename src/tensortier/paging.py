"""Which weights stay on the drive when main memory is too small for all, and how fast that will be.

Routed experts go first: a token uses few of them. A plan that has none, or whose other weights are still too many,
leaves whole layers' matrices on the drive, of which the store keeps as many in RAM as fit and reads the rest in turn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

from tensortier import cost, placement, slots
from tensortier.overrides import compact
from tensortier.pageable import DEVICE, can_page
from tensortier.rates import Rates, Speed
from tensortier.scratch import scratch_bytes
from tensortier.types import DeviceMemory, Estimate, ModelInfo, Placement, Plan, Role, Tensor, Tier, Workload

CPU = "CPU"
# Reading and computing overlap, but not wholly: what is left of the shorter one.
OVERLAP_LOSS = 0.25
DRIVE_SHARE = 0.95  # of the drive's measured speed that the reads of a running model reach


class HitRates(Protocol):
    """What is known of a model's routing."""

    @property
    def source(self) -> str:
        """For a reader: what it is known by."""
        ...

    @property
    def profile(self) -> str | None:
        """A routing trace that policy "static" may go by."""
        ...

    @property
    def policies(self) -> Sequence[str]:
        """Of which it can tell, the one to prefer among equals first."""
        ...

    def rate(self, policy: str, capacity: Sequence[int], layers: Sequence[int]) -> float:
        """Share of uses in ``layers`` that find their expert in RAM, 0 to 1, where ``capacity`` experts stay of each
        (``slots.capacities``)."""
        ...


WORTH = 0.01  # of hits, by which another policy has to be better than the preferred one


class OnDrive:
    """What can be left on the drive of a plan whose part in RAM is too large, worked out once for any size of RAM.

    Args:
        rows: what ``plan`` takes of each device with everything in memory.
        free: bytes per device, by which layers are shared out where the plan gives no shares.
        hits: what is known of the routing; None: experts are taken to be used evenly.
    """

    def __init__(
        self,
        model: ModelInfo,
        plan: Plan,
        rows: Sequence[DeviceMemory],
        free: Mapping[str, int],
        hits: HitRates | None = None,
    ) -> None:
        self.model = model
        self.plan = plan
        self.free = free
        self.hits = hits
        self._rows = tuple(rows)
        self._where = placement.resolve(model, plan.placement, free)
        here = [t for t in model.tensors if self._where[t.name] == CPU and can_page(t)]
        experts = [t for t in here if t.role.is_routed_expert]
        # As little as has to be: experts alone, or with them the other weights. Of those the output last: it is the
        # largest by far, and what passes through a ring for two of the largest stays nowhere.
        inner = [t for t in here if t.role is not Role.OUTPUT]
        sets = [found for found in (experts, inner, here) if found]
        self._sets = [_Paged(self, found) for i, found in enumerate(sets) if found not in sets[:i]]

    @property
    def least(self) -> int | None:
        """Bytes of RAM that the model runs in at least; None where nothing of it can stay on the drive."""
        return min((paged.firm + paged.least for paged in self._sets), default=None)

    def within(self, ram: int) -> Plan | None:
        """The plan with as little as possible on the drive that takes no more than ``ram`` bytes of main memory
        beside the process itself. None where even that is too much.

        The answer's memory has a row "TIER": the RAM that holds weights from the drive, and what computing with
        them takes.
        """
        for paged in self._sets:
            if ram - paged.firm >= paged.least:
                return paged.plan(ram - paged.firm)
        return None

    def timing(self, rates: Rates, workload: Workload) -> Timing:
        """Of the plans that ``within`` gives."""
        return Timing(self, rates, workload)


class _Paged:
    """One choice of weights that are left on the drive."""

    def __init__(self, of: OnDrive, tensors: Sequence[Tensor]) -> None:
        self._of = of
        self._tensors = tuple(tensors)
        self.experts = tuple(t for t in tensors if t.role.is_routed_expert)
        self._dense = sum(t.nbytes for t in tensors if not t.role.is_routed_expert)
        self._moved = sum(t.nbytes for t in tensors)
        cpu = next((r for r in of._rows if r.device == CPU), DeviceMemory(CPU, 0, 0, 0))
        self.firm = cpu.total_bytes - self._moved
        self._least_experts = _least_expert_room(of.model, self.experts)
        least = self._least_experts + (_least_dense_room(tensors) if self._dense else 0)
        self._scratch = scratch_bytes(of.model, tensors, of.plan.settings)
        self.least = least + self._scratch

    def plan(self, room: int) -> Plan:
        """With ``room`` bytes for weights from the drive and what computing with them takes."""
        of = self._of
        room -= self._scratch
        # experts are used in part, other weights whole: the byte of a dense weight is worth more
        held = min(self._dense, room - self._least_experts) if self._dense else 0
        tier = Tier(min(room - held, self._most_experts), held)
        tier = _with_policy(of.model, self._layers, tier, of.hits)
        memory = [
            dataclasses.replace(r, weights_bytes=max(0, r.weights_bytes - self._moved))
            if r.device == CPU
            else r
            for r in of._rows
        ]
        memory.append(DeviceMemory(DEVICE, tier.expert_bytes + tier.dense_bytes, 0, self._scratch))
        settings = dataclasses.replace(of.plan.settings, load_mode="none")
        return dataclasses.replace(
            of.plan, placement=self._placement, settings=settings, memory=tuple(memory), tier=tier
        )

    @functools.cached_property
    def _layers(self) -> tuple[slots.Layer, ...]:
        return slots.layers_of(self._of.model, sorted(self.experts, key=lambda t: t.layer or 0))

    @functools.cached_property
    def _most_experts(self) -> int:
        """Bytes that hold all of them, in whole sectors, and their biases."""
        small = sum(t.nbytes for t in self.experts) - sum(layer.nbytes for layer in self._layers)
        return small + sum(layer.slot_bytes * layer.experts for layer in self._layers)

    @functools.cached_property
    def _placement(self) -> Placement:
        of = self._of
        names = {t.name for t in self._tensors}
        overrides: dict[str, list[str]] = {DEVICE: sorted(names)}
        bare = dataclasses.replace(of.plan.placement, overrides=())
        layers = placement.resolve(of.model, bare, of.free)
        for tensor in of.model.tensors:
            device = of._where[tensor.name]
            if tensor.name not in names and device != layers[tensor.name]:
                overrides.setdefault(device, []).append(tensor.name)
        everything = [t.name for t in of.model.tensors]
        return dataclasses.replace(of.plan.placement, overrides=compact(overrides, everything))


def on_the_drive(
    model: ModelInfo,
    plan: Plan,
    rows: Sequence[DeviceMemory],
    ram: int,
    free: Mapping[str, int],
    hits: HitRates | None = None,
) -> Plan | None:
    """``OnDrive.within`` for one size of RAM."""
    return OnDrive(model, plan, rows, free, hits).within(ram)


def _least_expert_room(model: ModelInfo, experts: Sequence[Tensor]) -> int:
    """Bytes of the experts that one token uses in one layer, and as many again to read the next ones into."""
    layers: dict[int, int] = {}
    for t in experts:
        layers[t.layer or 0] = layers.get(t.layer or 0, 0) + t.nbytes
    share = model.n_expert_used / max(1, model.n_expert)
    return int(2 * max(layers.values(), default=0) * share)


def _least_dense_room(tensors: Sequence[Tensor]) -> int:
    """Bytes of two of the largest matrices: one is computed while the next is read."""
    return 2 * max((t.nbytes for t in tensors if not t.role.is_routed_expert), default=0)


def _with_policy(model: ModelInfo, layers: Sequence[slots.Layer], tier: Tier, hits: HitRates | None) -> Tier:
    """``tier`` with the policy that finds most."""
    if not layers or hits is None:
        return tier
    best, most = tier.policy, -1.0
    numbers = [layer.number for layer in layers]
    for policy in hits.policies:
        capacity = slots.capacities(layers, model.n_expert_used, policy, tier.expert_bytes)
        rate = hits.rate(policy, capacity, numbers)
        if rate > most + (WORTH if most >= 0 else 0):
            best, most = policy, rate
    profile = hits.profile if best == "static" else None
    return dataclasses.replace(tier, policy=best, profile=profile)


def read_as_measured(plan: Plan, rates: Rates) -> Plan:
    """``plan`` with the size and number of reads that the drive's calibration found best."""
    if plan.tier is None or rates.reads is None:
        return plan
    reads = rates.reads
    tier = dataclasses.replace(plan.tier, queue_depth=reads.queue_depth, read_bytes=reads.read_bytes)
    return dataclasses.replace(plan, tier=tier)


def paged_bytes(model: ModelInfo, plan: Plan, free: Mapping[str, int]) -> tuple[int, int]:
    """(bytes of routed experts, bytes of other weights) that a plan leaves on the drive."""
    where = placement.resolve(model, plan.placement, free)
    paged = [t for t in model.tensors if where[t.name] == DEVICE]
    experts = sum(t.nbytes for t in paged if t.role.is_routed_expert)
    return experts, sum(t.nbytes for t in paged) - experts


def dense_stays(model: ModelInfo, plan: Plan, free: Mapping[str, int]) -> int:
    """Bytes of other weights than experts that stay in RAM of those that a plan leaves on the drive."""
    where = placement.resolve(model, plan.placement, free)
    dense = [t for t in model.tensors if where[t.name] == DEVICE and not t.role.is_routed_expert]
    return 0 if plan.tier is None else slots.dense_stays(in_order(model, dense), plan.tier.dense_bytes)


def in_order(model: ModelInfo, tensors: Sequence[Tensor]) -> list[Tensor]:
    """By layer, with those of no layer at the end: nearly the order in which they are used."""
    return sorted(tensors, key=lambda t: model.n_layers if t.layer is None else t.layer)


@dataclasses.dataclass(frozen=True)
class Share:
    """How much of what is on the drive RAM holds."""

    hit_rate: float  # of experts that a token uses, 0 to 1
    held: float  # of all experts, 0 to 1


class Timing:
    """The speed of plans with weights on the drive that differ only in their ``tier``."""

    def __init__(self, of: OnDrive, rates: Rates, workload: Workload) -> None:
        self._of = of
        self._rates = rates
        self._workload = workload
        self._known: dict[Placement, _Known] = {}

    def estimate(self, plan: Plan) -> Estimate:
        """Of ``plan``, whose placement has weights on the drive."""
        if plan.placement not in self._known:
            self._known[plan.placement] = _Known(
                self._of.model, plan, self._rates, self._workload, self._of.free
            )
        return self._known[plan.placement].estimate(plan, self._of.hits)


def estimate(
    model: ModelInfo,
    plan: Plan,
    rates: Rates,
    workload: Workload,
    free: Mapping[str, int],
    hits: HitRates | None = None,
) -> Estimate:
    """The speed of a plan with weights on the drive. Without ``hits`` experts are taken to be used evenly, the worst
    case for a cache: the share of them in RAM is the share of hits."""
    return _Known(model, plan, rates, workload, free).estimate(plan, hits)


class _Known:
    """What the time of a placement with weights on the drive comes from, whatever RAM holds of them."""

    def __init__(
        self, model: ModelInfo, plan: Plan, rates: Rates, workload: Workload, free: Mapping[str, int]
    ) -> None:
        where = placement.resolve(model, plan.placement, free)
        paged = [t for t in model.tensors if where[t.name] == DEVICE]
        self.model, self.rates, self.workload = model, rates, workload
        self._layers = slots.layers_of(model, sorted(paged, key=lambda t: t.layer or 0))
        self._whole = in_order(model, [t for t in paged if not t.role.is_routed_expert])
        self._dense = sum(t.nbytes for t in self._whole)
        self._slots = sum(layer.slot_bytes * layer.experts for layer in self._layers)
        # weights from the drive are never reordered, and layers that have some of them are computed as if all were
        kernels = rates.kernels(repack=False) if self._dense else rates
        self._base = cost.estimate(model, plan, kernels, workload, free)
        self._batch = max(1, min(workload.prompt, plan.settings.n_ubatch))

    def _share(self, tier: Tier, hits: HitRates | None) -> Share:
        if not self._layers:
            return Share(1.0, 1.0)
        capacity = slots.capacities(self._layers, self.model.n_expert_used, tier.policy, tier.expert_bytes)
        held = min(1.0, sum(capacity) / sum(layer.experts for layer in self._layers))
        if hits is None or tier.policy not in hits.policies:
            return Share(held, held)
        return Share(hits.rate(tier.policy, capacity, [layer.number for layer in self._layers]), held)

    def estimate(self, plan: Plan, hits: HitRates | None) -> Estimate:
        assert plan.tier is not None
        base, workload, model = self._base, self.workload, self.model
        found = self._share(plan.tier, hits)
        drive = self.rates.drive or cost.ASSUMED_DRIVE
        streamed = self._dense - slots.dense_stays(self._whole, plan.tier.dense_bytes)
        used = model.n_expert_used / max(1, model.n_expert)
        touched = 1 - (1 - used) ** self._batch
        steps = -(-workload.prompt // self._batch)
        single = _Reads(
            (1 - found.hit_rate) * used * self._slots,
            streamed,
            len(self._layers) * (1 - found.hit_rate**model.n_expert_used),
        )
        wide = _Reads((1 - found.held) * touched * self._slots, streamed, len(self._layers))
        decode = _timed(base.decode_seconds, 1 / base.decode_tokens_per_second, single, 1, drive, self)
        prefill = _timed(
            base.prefill_seconds,
            workload.prompt / base.prefill_tokens_per_second,
            wide,
            steps,
            drive,
            self,
        )
        n = workload.prompt
        return dataclasses.replace(
            base,
            decode_tokens_per_second=1 / decode.seconds,
            decode_interval=(1 / decode.most, 1 / decode.least),
            decode_seconds=decode.parts,
            prefill_tokens_per_second=n / prefill.seconds,
            prefill_interval=(n / prefill.most, n / prefill.least),
            prefill_seconds=prefill.parts,
            seconds=prefill.seconds + workload.output * decode.seconds,
            provenance=self._provenance(hits),
            notes=(*base.notes, *self._notes(found, hits, drive)),
        )

    def _provenance(self, hits: HitRates | None) -> dict[str, str]:
        found = dict(self._base.provenance)
        found["drive"] = "assumed" if self.rates.drive is None else self._base.provenance[CPU]
        if self._layers:
            found["hit rate"] = "assumed" if hits is None else "trace"
        return found

    def _notes(self, found: Share, hits: HitRates | None, drive: Speed) -> list[str]:
        notes = []
        if self._layers and hits is None:
            notes.append(
                f"experts are assumed to be used evenly, so {found.hit_rate:.0%} are found in RAM; real models repeat "
                "some, and hit more often (tensortier trace records it, --trace uses it)"
            )
        elif self._layers and hits is not None:
            notes.append(f"{found.hit_rate:.0%} of experts are found in RAM, {hits.source}")
        if self.rates.drive is None:
            notes.append(f"the drive's speed is not known: {drive.value / 1e9:.1f} GB/s are assumed")
        return notes

    def of_experts(self, parts: Mapping[str, float]) -> float:
        """Seconds of computing with experts from the drive."""
        return parts.get(f"weights on {DEVICE}", 0.0) if self._layers else 0.0


@dataclasses.dataclass(frozen=True)
class _Reads:
    """Of one pass through the model."""

    experts: float  # bytes
    dense: float
    waves: float  # layers that wait for experts


@dataclasses.dataclass(frozen=True)
class _Timed:
    seconds: float
    least: float
    most: float
    parts: dict[str, float]


def _timed(
    parts: Mapping[str, float], compute: float, reads: _Reads, steps: int, drive: Speed, known: _Known
) -> _Timed:
    """``compute`` seconds in ``steps`` passes while what they miss is read.

    A layer's experts are read once its router has chosen them, so their reads overlap with computing the layer's other
    experts only. Other weights are known beforehand and are read while anything is computed.
    """
    speed = drive.value * DRIVE_SHARE
    experts = steps * (reads.experts / speed + reads.waves * known.rates.drive_latency)
    dense = steps * reads.dense / speed
    beside = min(compute, known.of_experts(parts))
    waiting = compute - beside + max(beside, experts)
    middle = waiting + OVERLAP_LOSS * min(beside, experts)
    middle = max(middle, experts + dense) + OVERLAP_LOSS * min(middle, dense)
    least = max(waiting, experts + dense)
    spread = max(drive.spread, cost.MODEL_ERROR)
    told = {k: v for k, v in parts.items() if k != f"weights on {DEVICE}"}
    on_cpu = f"weights on {CPU}"
    told[on_cpu] = told.get(on_cpu, 0.0) + parts.get(f"weights on {DEVICE}", 0.0)
    told["drive"] = middle - compute
    return _Timed(
        middle,
        max(compute, least / (1 + spread)),
        (compute + experts + dense) * (1 + spread),
        {k: v for k, v in told.items() if v > 0},
    )
