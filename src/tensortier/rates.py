"""What each device achieves: from this machine's calibration, or for a machine that is not here from the catalogue.

A figure of the catalogue is a published peak. What programs reach of it is assumed here, in one place, with the
interval that such an assumption deserves; an estimate made of them says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tensortier.calibrate.records import Calibration, DriveRead, LayerCost, Product
from tensortier.gguf.ggml_types import GGML_TYPES, GgmlType
from tensortier.pageable import DEVICE
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
_NEARLY = 0.95  # of a speed
_DRIVE_SPREAD = 0.2  # other work on it, bursts, what is near the end of a disk
# Bytes under way. More than the experts that a token misses in one layer cannot be asked for. Less looks as good where
# something before the drive has the data in memory, as the host of a virtual machine, and is slow where it has not.
_UNDER_WAY = (8 << 20, 16 << 20)
_READ = 1 << 20  # bytes of the largest: the matrices of an expert are seldom larger
GPU_LAYER_SECONDS = 60e-6  # kernels between the products of one layer
GPU_SPLIT_SECONDS = 60e-6
ASSUMED_LINK = 12e9  # bytes/s, where a card's link is not known
ASSUMED_FLOPS_PER_BYTE = 60.0  # where a card's arithmetic is not known: of its bandwidth


@dataclass(frozen=True, slots=True)
class Speed:
    """Something per second, and its relative uncertainty (0.1 is 10 %)."""

    value: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class ReadSpeed:
    """Weights in a product with one column: bytes/s along a row, and seconds more for each row."""

    value: float
    row_seconds: float = 0.0
    spread: float = 0.0

    def seconds(self, nbytes: float, rows: float) -> float:
        return nbytes / self.value + rows * self.row_seconds


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
    narrow: Mapping[str, ReadSpeed]  # of weights in a product with one column, by type
    wide: Mapping[str, Speed]  # multiply-adds/s in a product with hundreds of columns, by type
    wide_experts: Mapping[str, Speed]  # the same where each token has experts of its own
    other_narrow: ReadSpeed  # for types that are not in the table
    other_wide: Speed
    attention: tuple[AttentionSpeed, ...]
    memory: Speed  # bytes/s that anything can be read with
    layer_seconds: float  # of a layer, besides its products and attention over the cache
    moe_layer_seconds: float  # more for a layer with routed experts
    token_seconds: float  # per token, besides its layers
    wide_layer_seconds: float = 0.0  # as layer_seconds, per token and channel of a wide batch
    link: Speed | None = None  # bytes/s between main memory and the device
    split_seconds: float = 0.0  # for handing a graph over to this device and back once
    moe_split_seconds: float = 0.0  # the same around routed experts
    threads: int = 1  # that compute
    offloads: bool = False  # takes products of wide batches with weights in main memory (op offload)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reads:
    """How a drive is read best."""

    queue_depth: int  # reads under way at a time
    read_bytes: int  # of the largest single read


@dataclass(frozen=True)
class Rates:
    """Of a whole machine."""

    devices: Mapping[str, DeviceRates]
    drive: Speed | None = None  # bytes/s of large random reads past the page cache
    notes: tuple[str, ...] = field(default=())
    plain: DeviceRates | None = (
        None  # of the CPU with weights as they are in the file; None: as "CPU" in ``devices``
    )
    drive_latency: float = 0.0  # seconds until the first of several reads begins to arrive
    reads: Reads | None = None  # None: not measured
    read_ahead: int | None = None  # bytes, as the kernel is set for this drive; None: it does not tell

    def of(self, device: str) -> DeviceRates:
        """Of a device, or of the CPU with weights from the drive ("TIER")."""
        if device == DEVICE:
            return self.plain or self.devices["CPU"]
        return self.devices[device]

    def kernels(self, *, repack: bool) -> Rates:
        """These rates where the CPU's weights are reordered, if these are of such weights, or left as they are."""
        if repack or self.plain is None:
            return self
        return replace(self, devices={**self.devices, "CPU": self.plain})


def from_calibration(calibration: Calibration, hardware: Hardware, settings: Settings) -> Rates:
    """Of this machine, for the threads and kernels of ``settings`` (0 threads: as many as were calibrated last).

    A device that was not measured gets the catalogue's figures where its details have them, else it is left out.
    """
    found: dict[str, DeviceRates] = {}
    plain = None
    for device in hardware.devices:
        if any(p.device == device.name for p in calibration.products):
            found[device.name] = _measured(calibration, device, settings)
            if device.kind == "cpu":
                plain = _measured(calibration, device, replace(settings, repack=False))
        elif device.kind in ("gpu", "igpu") and device.details.get("bandwidth_bytes_per_s"):
            found[device.name] = catalogue_gpu(device)
    here = {d.mount_point for d in hardware.drives}
    # of the drive that the model is on, where that is the one that was measured
    drives = [d for d in calibration.drives if d.mount_point in here] or list(calibration.drives)
    if not drives:
        return Rates(found, None, calibration.notes, plain, read_ahead=read_ahead(hardware))
    best = _best_reads(drives)
    single = min((d for d in drives if d.depth == 1), key=lambda d: d.block, default=best)
    latency = max(0.0, single.block / single.bytes_per_second - single.block / best.bytes_per_second)
    return Rates(
        found,
        Speed(best.bytes_per_second, _DRIVE_SPREAD),
        calibration.notes,
        plain,
        latency,
        Reads(best.depth, best.block),
        read_ahead(hardware),
    )


def read_ahead(hardware: Hardware) -> int | None:
    """Bytes that the kernel reads ahead on the model's drive; None where it does not tell."""
    return next(
        (int(d.details["read_ahead_bytes"]) for d in hardware.drives if "read_ahead_bytes" in d.details), None
    )


def _best_reads(drives: Sequence[DriveRead]) -> DriveRead:
    """As little under way as nearly reaches the best speed: the less, the sooner what was asked for first is there. Of
    equals the largest reads, of which there are the fewest."""
    low, high = _UNDER_WAY
    fitting = [d for d in drives if d.block <= _READ and low <= d.block * d.depth <= high] or list(drives)
    most = max(d.bytes_per_second for d in fitting)
    good = [d for d in fitting if d.bytes_per_second >= _NEARLY * most]
    return min(good, key=lambda d: (d.block * d.depth, -d.block))


def _measured(calibration: Calibration, device: Device, settings: Settings) -> DeviceRates:
    name, on_cpu = device.name, device.kind == "cpu"
    kept = _Kept(calibration, name, settings if on_cpu else None)
    layer = kept.layer()
    elementwise = next((e for e in calibration.elementwise if e.device == name), None)
    copies = [c for c in calibration.copies if c.device == name and c.to_device]
    link = max(copies, key=lambda c: c.bytes_per_second, default=None)
    splits = {s.experts: s.seconds for s in calibration.splits if s.device == name}
    narrow, wide = kept.narrow(), kept.wide(experts=False)
    fastest = max(narrow.values(), key=lambda v: v.value)
    return DeviceRates(
        name,
        device.kind,
        "measured",
        narrow=narrow,
        wide=wide,
        wide_experts=kept.wide(experts=True),
        other_narrow=ReadSpeed(_middle(v.value for v in narrow.values()), 0.0, 0.5),
        other_wide=Speed(_middle(v.value for v in wide.values()), 0.5),
        attention=kept.attention(),
        memory=Speed(fastest.value, fastest.spread),
        layer_seconds=layer.layer_seconds if layer else 0.0,
        moe_layer_seconds=layer.moe_layer_seconds if layer else 0.0,
        token_seconds=layer.token_seconds if layer else 0.0,
        wide_layer_seconds=elementwise.seconds * _WIDE_OPERATIONS / kept.share if elementwise else 0.0,
        link=Speed(link.bytes_per_second, link.spread) if link else None,
        split_seconds=splits.get(False, 0.0),
        moe_split_seconds=splits.get(True, 0.0),
        offloads=not on_cpu and device.backend not in ("RPC", "MTL"),
        threads=kept.threads if on_cpu else 1,
    )


class _Kept:
    """Look-ups in a calibration of one device, for a number of threads and a choice of kernels. ``settings`` None: a
    device without threads."""

    def __init__(self, calibration: Calibration, device: str, settings: Settings | None) -> None:
        self._products = [p for p in calibration.products if p.device == device]
        self._attention = [a for a in calibration.attention if a.device == device]
        self._layers = {row.threads: row for row in calibration.layers if row.device == device}
        self._most = max(p.threads for p in self._products)
        self.threads = settings.threads or self._most if settings else self._most
        self._repack = settings.repack if settings else False
        self.share = self._scaling()  # of the speed of arithmetic with all threads

    def _scaling(self) -> float:
        """By attention, which is arithmetic, with one thread and with all."""
        if self.threads == self._most:
            return 1.0
        by_key: dict[tuple[str, int, int, int], dict[int, float]] = {}
        for a in self._attention:
            by_key.setdefault((a.type, a.head_dim, a.cells, a.batch), {})[a.threads] = a.elements_per_second
        both = next(
            (v for v in by_key.values() if 1 in v and self._most in v), {1: 1.0, self._most: self._most}
        )
        return _between(self.threads, 1, both[1] / both[self._most], self._most, 1.0)

    def _chosen(self, batch: bool, experts: bool) -> dict[str, list[Product]]:
        """Products by type, of the kernel that llama.cpp takes: the repacked one where there is one, unless it is
        switched off."""
        rows = [p for p in self._products if (p.batch > 1, p.experts) == (batch, experts)]
        repacked = {p.type for p in rows if p.repacked} if self._repack else set()
        found: dict[str, list[Product]] = {}
        for p in rows:
            if p.repacked == (p.type in repacked):
                found.setdefault(p.type, []).append(p)
        return found

    def narrow(self) -> dict[str, ReadSpeed]:
        return {name: self._reading(rows) for name, rows in self._chosen(False, False).items()}

    def _reading(self, rows: list[Product]) -> ReadSpeed:
        """From long rows and short ones: seconds per byte, and per row. Between one thread and all, what is memory
        for all may be arithmetic for one: the speed lies between the two that were measured."""
        kind = _ggml_type(rows[0].type)
        longest = max(p.columns for p in rows)
        long = {p.threads: p for p in rows if p.columns == longest}
        short = next((p for p in rows if p.columns < longest), None)
        full = long[self._most]
        per_row = 0.0
        if short is not None:
            size = [c * kind.type_size / kind.block_size for c in (short.columns, longest)]
            more = 1 / short.bytes_per_second - 1 / full.bytes_per_second
            per_row = max(0.0, more / (1 / size[0] - 1 / size[1]))
            per_row = min(per_row, 0.9 * size[1] / full.bytes_per_second)
        row_bytes = longest * kind.type_size / kind.block_size

        def streaming(p: Product, row: float) -> float:
            return 1 / (1 / p.bytes_per_second - min(row, 0.9 * row_bytes / p.bytes_per_second) / row_bytes)

        value = streaming(full, per_row)
        per_row /= self.share
        if self.threads != self._most and 1 in long:
            one = streaming(long[1], per_row)
            value = _between(self.threads, 1, one, self._most, value)
        return ReadSpeed(value, per_row, full.spread)

    def wide(self, *, experts: bool) -> dict[str, Speed]:
        return {
            name: Speed(_macs_per_second(rows[0]) * self.share, rows[0].spread)
            for name, rows in self._chosen(True, experts).items()
        }

    def attention(self) -> tuple[AttentionSpeed, ...]:
        return tuple(
            AttentionSpeed(
                a.type, a.head_dim, a.cells, a.batch > 1, Speed(a.elements_per_second * self.share, a.spread)
            )
            for a in self._attention
            if a.threads == self._most
        )

    def layer(self) -> LayerCost | None:
        return self._layers.get(self.threads) or self._layers.get(self._most)


def _between(n: float, low: float, at_low: float, high: float, at_high: float) -> float:
    """Of two measured points, straight in the logarithms, and beyond them too."""
    if low == high:
        return at_high
    t = math.log(n / low) / math.log(high / low)
    return float(at_low ** (1 - t) * at_high**t)


# Passes over the hidden state of a wide batch in one layer: norms, rotary embedding, cache writes, activation (over
# the wider feed-forward), sums.
_WIDE_OPERATIONS = 14


def _ggml_type(name: str) -> GgmlType:
    return next(t for t in GGML_TYPES.values() if t.name == name)


def _macs_per_second(product: Product) -> float:
    kind = _ggml_type(product.type)
    return product.bytes_per_second / (kind.type_size / kind.block_size) * product.batch


def _middle(values: Iterable[float]) -> float:
    """For types that were not measured."""
    found = sorted(values)
    return found[len(found) // 2]


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
    return Rates(found, drive, read_ahead=read_ahead(hardware))


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
        wide_experts={},
        other_narrow=ReadSpeed(memory.value, 0.0, memory.spread),
        other_wide=Speed(cores * CORE_MACS, 0.5),
        attention=_flat_attention(cores * CORE_ATTENTION, cores * CORE_ATTENTION, 0.5),
        memory=memory,
        layer_seconds=40e-6,
        moe_layer_seconds=40e-6,
        token_seconds=500e-6,
        threads=cores,
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
        wide_experts={},
        other_narrow=ReadSpeed(memory.value, 0.0, memory.spread),
        other_wide=Speed(macs, 0.4),
        attention=_flat_attention(macs / 8, macs / 2, ASSUMED_SPREAD),  # reading the cache takes longer
        memory=memory,
        layer_seconds=GPU_LAYER_SECONDS,
        moe_layer_seconds=GPU_LAYER_SECONDS,
        token_seconds=300e-6,
        link=Speed((link or bandwidth) * LINK_SHARE, ASSUMED_SPREAD),
        split_seconds=GPU_SPLIT_SECONDS,
        moe_split_seconds=GPU_SPLIT_SECONDS * 1.5,
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
