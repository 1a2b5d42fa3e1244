"""What each device achieves: from this machine's calibration, or for a machine that is not here from the catalogue.

A figure of the catalogue is a published peak. What programs reach of it is assumed here, in one place, with the
interval that such an assumption deserves; an estimate made of them says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tensortier.types import Device, Hardware

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
