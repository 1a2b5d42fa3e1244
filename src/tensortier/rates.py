"""What each device achieves: from this machine's calibration, or for a machine that is not here from the catalogue.

A figure of the catalogue is a published peak. What programs reach of it is assumed here, in one place, with the
interval that such an assumption deserves; an estimate made of them says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tensortier.calibrate.records import Calibration, Product
from tensortier.gguf.ggml_types import GGML_TYPES
from tensortier.types import Device, Hardware, Settings

# Shares of a published peak that llama.cpp reaches, and how far off they may be.
GPU_BANDWIDTH_SHARE = 0.67
GPU_FLOPS_SHARE = 0.45
CPU_BANDWIDTH_SHARE = 0.70
LINK_SHARE = 0.80  # of PCI Express, from pinned memory
ASSUMED_SPREAD = 0.25
# Multiply-adds per second of one modern core with quantized weights, and cached elements (query heads x width x
# cells) per second of attention.
CORE_MACS = 45e9
CORE_ATTENTION = 6e9
GPU_LAYER_SECONDS = 60e-6  # kernels between the products of one layer
GPU_SPLIT_SECONDS = 60e-6
ASSUMED_LINK = 12e9  # bytes/s, where a card's link is not known
ASSUMED_FLOPS_PER_BYTE = 60.0  # where a card's arithmetic is not known: of its bandwidth


@dataclass(frozen=True, slots=True)
class Speed:
    """Something per second, and its relative uncertainty (0.1 is 10 %)."""

    value: float
    spread: float = 0.0


@dataclass(frozen=True)
class AttentionSpeed:
    """Cached elements per second: query heads x (key width + value width) x cells, for one token or many."""

    type: str  # of keys and values, as ggml names it
    head_dim: int
    cells: int
    many: bool  # a batch of tokens asks at once
    speed: Speed


@dataclass(frozen=True)
class DeviceRates:
    device: str
    kind: str  # as Device.kind
    provenance: str  # "measured", "catalogue"
    narrow: Mapping[str, Speed]  # bytes/s of weights in a product with one column, by type
    wide: Mapping[str, Speed]  # multiply-adds/s in a product with hundreds of columns, by type
    other_narrow: Speed  # for types that are not in the table
    other_wide: Speed
    attention: tuple[AttentionSpeed, ...]
    memory: Speed  # bytes/s that anything can be read with
    layer_seconds: float  # of a layer, besides its products and attention over the cache
    moe_layer_seconds: float  # more for a layer with routed experts
    token_seconds: float  # per token, besides its layers
    wide_layer_seconds: float = 0.0  # as layer_seconds, per token and channel of a wide batch
    link: Speed | None = None  # bytes/s between main memory and the device
    split_seconds: float = 0.0  # for handing a graph over to this device and back once
    offloads: bool = False  # takes products of wide batches with weights in main memory (op offload)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rates:
    """Of a whole machine."""

    devices: Mapping[str, DeviceRates]
    drive: Speed | None = None  # bytes/s of large random reads past the page cache
    notes: tuple[str, ...] = field(default=())

    def of(self, device: str) -> DeviceRates:
        return self.devices[device]


def from_calibration(calibration: Calibration, hardware: Hardware, settings: Settings) -> Rates:
    """Of this machine, for the threads and kernels of ``settings`` (0 threads: as many as were calibrated last).

    A device that was not measured gets the catalogue's figures where its details have them, else it is left out.
    """
    found: dict[str, DeviceRates] = {}
    for device in hardware.devices:
        if any(p.device == device.name for p in calibration.products):
            found[device.name] = _measured(calibration, device, settings)
        elif device.kind in ("gpu", "igpu") and device.details.get("bandwidth_bytes_per_s"):
            found[device.name] = catalogue_gpu(device)
    drive = max((d.bytes_per_second for d in calibration.drives), default=0.0)
    return Rates(found, Speed(drive, 0.1) if drive else None, calibration.notes)


def _measured(calibration: Calibration, device: Device, settings: Settings) -> DeviceRates:
    name, on_cpu = device.name, device.kind == "cpu"
    products = [p for p in calibration.products if p.device == name]
    layers = {row.threads: row for row in calibration.layers if row.device == name}
    counted = sorted({p.threads for p in products})
    threads = settings.threads or counted[-1]
    if not on_cpu or threads not in counted:
        threads = min(counted, key=lambda n: abs(n - threads))
    # what was measured with all cores only is scaled to fewer by what was measured with both
    scale = 1.0
    if on_cpu and settings.threads and settings.threads != threads:
        scale = settings.threads / threads
    narrow = _best(
        (p for p in products if p.batch == 1 and p.threads == threads),
        settings.repack,
        lambda p: p.bytes_per_second,
    )
    wide_threads = max(p.threads for p in products if p.batch > 1)
    attention = [a for a in calibration.attention if a.device == name]
    one_core = [a for a in attention if a.threads == 1 and a.threads != wide_threads]
    many_cores = [a for a in attention if a.threads == wide_threads]
    share = 1.0  # of the speed with all cores, for arithmetic
    if on_cpu and settings.threads and settings.threads < wide_threads:
        share = settings.threads / wide_threads
    if one_core and threads == 1:
        same = [
            a
            for a in many_cores
            if (a.type, a.head_dim, a.cells, a.batch)
            == (one_core[0].type, one_core[0].head_dim, one_core[0].cells, one_core[0].batch)
        ]
        if same:
            share = one_core[0].elements_per_second / same[0].elements_per_second
    wide = _best(
        (p for p in products if p.batch > 1 and p.threads == wide_threads), settings.repack, _macs_per_second
    )
    layer = layers.get(threads) or next(iter(layers.values()), None)
    elementwise = next((e for e in calibration.elementwise if e.device == name), None)
    copies = [c for c in calibration.copies if c.device == name and c.to_device]
    link = max(copies, key=lambda c: c.bytes_per_second, default=None)
    split = next((s for s in calibration.splits if s.device == name), None)
    return DeviceRates(
        name,
        device.kind,
        "measured",
        narrow={k: Speed(v.value * scale, v.spread) for k, v in narrow.items()},
        wide={k: Speed(v.value * share, v.spread) for k, v in wide.items()},
        other_narrow=_typical(narrow.values()),
        other_wide=_typical(wide.values()),
        attention=tuple(
            AttentionSpeed(
                a.type, a.head_dim, a.cells, a.batch > 1, Speed(a.elements_per_second * share, a.spread)
            )
            for a in many_cores
        ),
        memory=max(narrow.values(), key=lambda v: v.value),
        layer_seconds=layer.layer_seconds if layer else 0.0,
        moe_layer_seconds=layer.moe_layer_seconds if layer else 0.0,
        token_seconds=layer.token_seconds if layer else 0.0,
        wide_layer_seconds=elementwise.seconds * _WIDE_OPERATIONS / share if elementwise else 0.0,
        link=Speed(link.bytes_per_second, link.spread) if link else None,
        split_seconds=split.seconds if split else 0.0,
        offloads=device.kind != "cpu" and device.backend not in ("RPC", "MTL"),
    )


# Passes over the hidden state of a wide batch in one layer: norms, rotary embedding, cache writes, activation (over
# the wider feed-forward), sums.
_WIDE_OPERATIONS = 14


def _macs_per_second(product: Product) -> float:
    kind = next(t for t in GGML_TYPES.values() if t.name == product.type)
    return product.bytes_per_second / (kind.type_size / kind.block_size) * product.batch


def _best(rows: Iterable[Product], repack: bool, value: Callable[[Product], float]) -> dict[str, Speed]:
    """By type, the kernel that llama.cpp takes: the repacked one where there is one, unless it is switched off."""
    found: dict[str, Product] = {}
    for row in rows:
        if row.type not in found or row.repacked == repack:
            found[row.type] = row
    return {name: Speed(value(row), row.spread) for name, row in found.items() if repack or not row.repacked}


def _typical(speeds: Iterable[Speed]) -> Speed:
    """For types that were not measured: the middle, and that it may be off by half."""
    values = sorted(s.value for s in speeds)
    return Speed(values[len(values) // 2], 0.5)


def from_catalogue(hardware: Hardware) -> Rates:
    """For a machine that is described, not measured: published peaks times what is usually reached of them."""
    found: dict[str, DeviceRates] = {}
    for device in hardware.devices:
        if device.kind == "cpu":
            found[device.name] = _catalogue_cpu(device, hardware)
        elif device.kind in ("gpu", "igpu"):
            found[device.name] = catalogue_gpu(device)
    drive = None
    for d in hardware.drives:
        if speed := d.details.get("read_bytes_per_s"):
            drive = Speed(float(speed) * 0.8, ASSUMED_SPREAD)
    return Rates(found, drive)


def _catalogue_cpu(device: Device, hardware: Hardware) -> DeviceRates:
    bandwidth = float(device.details["bandwidth_bytes_per_s"])
    cores = max(1, min(hardware.performance_cores, hardware.usable_cpus))
    memory = Speed(bandwidth * CPU_BANDWIDTH_SHARE, ASSUMED_SPREAD)
    return DeviceRates(
        device.name,
        "cpu",
        "catalogue",
        narrow={},
        wide={},
        other_narrow=memory,
        other_wide=Speed(cores * CORE_MACS, 0.5),
        attention=_flat_attention(cores * CORE_ATTENTION, cores * CORE_ATTENTION, 0.5),
        memory=memory,
        layer_seconds=40e-6,
        moe_layer_seconds=40e-6,
        token_seconds=500e-6,
        notes=(
            f"main memory: {CPU_BANDWIDTH_SHARE:.0%} of {bandwidth / 1e9:.0f} GB/s are assumed to be reached",
        ),
    )


def catalogue_gpu(device: Device) -> DeviceRates:
    """Of a card by its published peaks; KeyError where even its memory's bandwidth is not known."""
    details = device.details
    bandwidth = float(details["bandwidth_bytes_per_s"])
    memory = Speed(bandwidth * GPU_BANDWIDTH_SHARE, ASSUMED_SPREAD)
    notes = [
        f"{device.name}: {GPU_BANDWIDTH_SHARE:.0%} of {bandwidth / 1e9:.0f} GB/s are assumed to be reached"
    ]
    flops = details.get("fp16_flops") or details.get("fp32_flops")
    if not flops:
        flops = bandwidth * ASSUMED_FLOPS_PER_BYTE
        notes.append(f"{device.name}: its arithmetic is not known, {flops / 1e12:.0f} TFLOP/s are assumed")
    macs = float(flops) / 2 * GPU_FLOPS_SHARE
    shares = bool(details.get("shares_main_memory"))
    link: float | None = details.get("link_bandwidth_bytes_per_s")
    if link is None and not shares:
        link = ASSUMED_LINK / LINK_SHARE
        notes.append(f"{device.name}: its link is not known, {ASSUMED_LINK / 1e9:.0f} GB/s are assumed")
    return DeviceRates(
        device.name,
        device.kind,
        "catalogue",
        narrow={},
        wide={},
        other_narrow=memory,
        other_wide=Speed(macs, 0.4),
        attention=_flat_attention(macs / 8, macs / 2, ASSUMED_SPREAD),  # reading the cache takes longer
        memory=memory,
        layer_seconds=GPU_LAYER_SECONDS,
        moe_layer_seconds=GPU_LAYER_SECONDS,
        token_seconds=300e-6,
        link=Speed((link or bandwidth) * LINK_SHARE, ASSUMED_SPREAD),
        split_seconds=GPU_SPLIT_SECONDS,
        offloads=device.backend not in ("RPC", "MTL"),
        notes=tuple(notes),
    )


def _flat_attention(one: float, many: float, spread: float) -> tuple[AttentionSpeed, ...]:
    """The same elements per second at every width and length; a quantized cache is unpacked first."""
    return tuple(
        AttentionSpeed(name, 128, 4096, wide, Speed(value * factor, spread))
        for name, factor in (("F16", 1.0), ("Q8_0", 0.8), ("Q4_0", 0.7))
        for value, wide in ((one, False), (many, True))
    )
