"""Which weights stay on the drive when main memory is too small for all, and how fast that will be.

Routed experts go first: a token uses few of them. A plan that has none, or whose other weights are still too many,
leaves whole layers' matrices on the drive, of which the store keeps as many in RAM as fit and reads the rest in turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tensortier import cost, placement
from tensortier.overrides import compact
from tensortier.pageable import DEVICE, can_page
from tensortier.rates import Rates, Speed
from tensortier.types import DeviceMemory, Estimate, ModelInfo, Plan, Tensor, Tier, Workload

CPU = "CPU"
# Python, the bindings, llama.cpp's own buffers and the store's bookkeeping
PROCESS_BYTES = 256 << 20
SCRATCH_SHARE = 0.02  # of the room, for alignment of slots and what computing takes beside them
# Reading and computing overlap, but not wholly: what is left of the shorter one.
OVERLAP_LOSS = 0.25
DRIVE_SHARE = 0.9  # of the drive's measured speed that the reads of a running model reach


def on_the_drive(
    model: ModelInfo, plan: Plan, rows: Sequence[DeviceMemory], ram: int, free: Mapping[str, int]
) -> Plan | None:
    """``plan``, whose part in RAM (``rows``) is larger than ``ram`` bytes, with as little as possible of it on the
    drive. None where even that is too much, or a weight is too large to pass through what is left.

    The answer's memory has a row "TIER": the RAM that holds weights from the drive.
    """
    where = placement.resolve(model, plan.placement, free)
    here = [t for t in model.tensors if where[t.name] == CPU and can_page(t)]
    experts = [t for t in here if t.role.is_routed_expert]
    cpu = next((r for r in rows if r.device == CPU), DeviceMemory(CPU, 0, 0, 0))

    def room_without(paged: Sequence[Tensor]) -> int:
        taken = cpu.total_bytes - sum(t.nbytes for t in paged)
        return int((ram - PROCESS_BYTES - taken) * (1 - SCRATCH_SHARE))

    paged = experts
    room = room_without(paged)
    least = _least_expert_room(model, experts)
    if not experts or room < least:
        paged = here
        room = room_without(paged)
        if room < least + _least_dense_room(here):
            return None
    dense = sum(t.nbytes for t in paged if not t.role.is_routed_expert)
    held = 0
    if dense:
        # experts are used in part, other weights whole: the byte of a dense weight is worth more
        held = min(dense, room - least)
    tier = Tier(min(room - held, sum(t.nbytes for t in experts)), held)
    names = {t.name for t in paged}
    overrides: dict[str, list[str]] = {DEVICE: sorted(names)}
    layers = placement.resolve(model, dataclasses.replace(plan.placement, overrides=()), free)
    for tensor in model.tensors:
        device = where[tensor.name]
        if tensor.name not in names and device != layers[tensor.name]:
            overrides.setdefault(device, []).append(tensor.name)
    place = dataclasses.replace(plan.placement, overrides=compact(overrides, [t.name for t in model.tensors]))
    moved = sum(t.nbytes for t in paged)
    memory = [
        dataclasses.replace(r, weights_bytes=max(0, r.weights_bytes - moved)) if r.device == CPU else r
        for r in rows
    ]
    memory.append(DeviceMemory(DEVICE, tier.expert_bytes + tier.dense_bytes, 0, 0))
    settings = dataclasses.replace(plan.settings, load_mode="none")
    return dataclasses.replace(plan, placement=place, settings=settings, memory=tuple(memory), tier=tier)


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


def paged_bytes(model: ModelInfo, plan: Plan, free: Mapping[str, int]) -> tuple[int, int]:
    """(bytes of routed experts, bytes of other weights) that a plan leaves on the drive."""
    where = placement.resolve(model, plan.placement, free)
    paged = [t for t in model.tensors if where[t.name] == DEVICE]
    experts = sum(t.nbytes for t in paged if t.role.is_routed_expert)
    return experts, sum(t.nbytes for t in paged) - experts


def estimate(
    model: ModelInfo, plan: Plan, rates: Rates, workload: Workload, free: Mapping[str, int]
) -> Estimate:
    """The speed of a plan with weights on the drive. Experts are taken to be used evenly, the worst case for a cache:
    the share of them in RAM is the share of hits."""
    assert plan.tier is not None
    place = dataclasses.replace(
        plan.placement,
        overrides=tuple(
            dataclasses.replace(o, device=CPU) if o.device == DEVICE else o for o in plan.placement.overrides
        ),
    )
    base = cost.estimate(model, dataclasses.replace(plan, placement=place, tier=None), rates, workload, free)
    experts, dense = paged_bytes(model, plan, free)
    missed = max(0.0, 1 - plan.tier.expert_bytes / experts) if experts else 0.0
    streamed = max(0, dense - plan.tier.dense_bytes)
    share = model.n_expert_used / max(1, model.n_expert)
    batch = max(1, min(workload.prompt, plan.settings.n_ubatch))
    drive = rates.drive or cost.ASSUMED_DRIVE
    one = missed * share * experts + streamed
    many = missed * (1 - (1 - share) ** batch) * experts + streamed
    decode, decode_low, decode_high = _with_reads(1 / base.decode_tokens_per_second, one, drive)
    steps = -(-workload.prompt // batch)
    prefill, prefill_low, prefill_high = _with_reads(
        workload.prompt / base.prefill_tokens_per_second, many * steps, drive
    )
    notes = list(base.notes)
    if experts:
        notes.append("experts are assumed to be used evenly; real models repeat some, and hit more often")
    if rates.drive is None:
        notes.append(f"the drive's speed is not known: {drive.value / 1e9:.1f} GB/s are assumed")
    return dataclasses.replace(
        base,
        decode_tokens_per_second=1 / decode,
        decode_interval=(1 / decode_high, 1 / decode_low),
        decode_seconds={**base.decode_seconds, "drive": decode - 1 / base.decode_tokens_per_second},
        prefill_tokens_per_second=workload.prompt / prefill,
        prefill_interval=(workload.prompt / prefill_high, workload.prompt / prefill_low),
        prefill_seconds={
            **base.prefill_seconds,
            "drive": prefill - workload.prompt / base.prefill_tokens_per_second,
        },
        seconds=prefill + workload.output * decode,
        notes=tuple(notes),
    )


def _with_reads(compute: float, nbytes: float, drive: Speed) -> tuple[float, float, float]:
    """Seconds of computing while ``nbytes`` are read: the middle, the least and the most."""
    reading = nbytes / (drive.value * DRIVE_SHARE)
    least = max(compute, reading)
    middle = least + OVERLAP_LOSS * min(compute, reading)
    spread = max(drive.spread, cost.MODEL_ERROR)
    return middle, max(compute, least / (1 + spread)), (compute + reading) * (1 + spread)
