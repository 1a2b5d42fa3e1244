"""Machines that are not here: published figures of graphics cards, memory, drives and links.

``catalogue.json`` holds vendors' peaks with their sources, and says what its fields mean. Nothing in it is
measured, and nothing is scaled to what programs reach. ``hypothetical`` makes a ``Hardware`` of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from typing import Any, TypeVar

from tensortier.errors import UsageError
from tensortier.types import Device, Drive, Hardware

# What a driver keeps of a card's memory before any program may ask: with an empty desktop, CUDA reports about
# 360 MiB less than an RTX 4090's 24 GiB, and about 610 MiB less than an H200's 141 GiB.
DRIVER_RESERVE_BYTES = 384 * 2**20
DRIVER_RESERVE_SHARE = Fraction(1, 200)
# What the operating system and its services hold of main memory; at most an eighth of it.
SYSTEM_RESERVE_BYTES = 2 * 2**30
ASSUMED_CORES = 8

_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{f"{p}b": 1000**i for i, p in enumerate("kmgtp", 1)},
    **{f"{p}ib": 1024**i for i, p in enumerate("kmgtp", 1)},
    **{p: 1024**i for i, p in enumerate("kmgtp", 1)},
}
_MOST_BYTES = 2**63 - 1

# Words that say nothing about which card it is
_NOISE = (
    *("nvidia", "geforce", "amd", "radeon", "intel", "apple", "tesla", "instinct"),
    *("graphicscard", "graphics", "generation", "edition", "videocard", "card", "gpu"),
)
# "12GB" and "12 GiB" anywhere; a bare "12g" only as a word of its own, for the A10G is a card
_CARD_SIZE = re.compile(r"(?<![0-9.])(\d{1,4})\s*(?:gib|gb)(?![a-z])|(?<=[\s_-])(\d{1,4})g(?![a-z0-9])")
_MEMORY_KIND = re.compile(r"(lpddr4x|lpddr5x|lpddr5|ddr4|ddr5)")
_MEMORY_CHANNELS = re.compile(
    r"\bx\s*(\d+)\b|\b(\d+)\s*x(?![a-z0-9])|\b(\d+)[\s-]*(?:channels?|ch)\b|\b(single|dual|quad|octa)[\s-]*channel\b"
)
_TUPLES = ("aliases", "memory_options_bytes")
_CHANNEL_WORDS = {"single": 1, "dual": 2, "quad": 4, "octa": 8}


@dataclass(frozen=True)
class CatalogueGpu:
    """A graphics card or the graphics part of a chip, as its vendor describes it. None: unknown."""

    name: str
    vendor: str  # "nvidia", "amd", "intel", "apple"
    architecture: str
    memory_bytes: int | None  # None: shares main memory, whose size is not known yet
    memory_type: str | None
    bus_width_bits: int | None
    data_rate_gbps: float | None  # per pin
    bandwidth_bytes_per_s: int | None  # None: that of the main memory
    compute_units: int | None  # multiprocessors, compute units, Xe or graphics cores: the vendor's unit
    boost_clock_hz: int | None
    fp16_flops: int | None  # dense
    fp16_kind: str | None  # "tensor", "matrix" or "vector"
    fp32_flops: int | None  # vector
    int8_ops: int | None  # dense
    link_generation: int | None  # of PCI Express; None: no link, or unknown
    link_lanes: int | None
    source: str
    unified: bool = False  # shares main memory with the processor
    inline_ecc: bool = False  # error correction takes 1/16 of the memory
    nvlink_bytes_per_s: int | None = None  # both directions together
    memory_options_bytes: tuple[int, ...] = ()  # sizes it is sold with, where it shares main memory
    aliases: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of memory that it may have; empty where any size goes."""
        return (self.memory_bytes,) if self.memory_bytes is not None else self.memory_options_bytes


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: str
    source: str
    aliases: tuple[str, ...] = ()


E = TypeVar("E", bound=_Entry)


@dataclass(frozen=True, kw_only=True)
class CatalogueMemory(_Entry):
    """Main memory of one processor. ``bandwidth = transfers_per_s * channels * channel_bits / 8``."""

    standard: str
    transfers_per_s: int
    channels: int
    channel_bits: int
    bandwidth_bytes_per_s: int


@dataclass(frozen=True, kw_only=True)
class CatalogueDrive(_Entry):
    """A class of drives; the speed is the limit of the interface, or of the fastest disk where that is less."""

    kind: str  # as types.Drive.kind
    read_bytes_per_s: int


@dataclass(frozen=True, kw_only=True)
class CatalogueLink(_Entry):
    """Between main memory and a card; bytes/s in one direction."""

    generation: int  # of PCI Express, carried by something else or not
    lanes: int
    bandwidth_bytes_per_s: int


@functools.cache
def _tables() -> Mapping[str, list[dict[str, Any]]]:
    text = resources.files("tensortier").joinpath("catalogue.json").read_text(encoding="utf-8")
    tables: dict[str, list[dict[str, Any]]] = json.loads(
        text, object_hook=lambda d: {k: tuple(v) if k in _TUPLES else v for k, v in d.items()}
    )
    return tables


@functools.cache
def gpus() -> tuple[CatalogueGpu, ...]:
    """All cards of the catalogue."""
    return tuple(CatalogueGpu(**row) for row in _tables()["gpus"])


@functools.cache
def memories() -> tuple[CatalogueMemory, ...]:
    """All configurations of main memory in the catalogue."""
    return tuple(CatalogueMemory(**row) for row in _tables()["memory"])


@functools.cache
def drives() -> tuple[CatalogueDrive, ...]:
    """All classes of drives in the catalogue."""
    return tuple(CatalogueDrive(**row) for row in _tables()["drives"])


@functools.cache
def links() -> tuple[CatalogueLink, ...]:
    """All links in the catalogue."""
    return tuple(CatalogueLink(**row) for row in _tables()["links"])


def parse_bytes(text: str) -> int:
    """Bytes of "8GiB", "8GB", "8g", "8192MiB", "1.5TiB", "4096".

    KiB, MiB, GiB, TiB, PiB are powers of 1024; kB, MB, GB, TB, PB powers of 1000; the bare letters k, m, g, t,
    p mean powers of 1024, as with docker and systemd; no unit means bytes. (Only as part of a card's name does
    GB mean GiB: ``find_gpu``.) Fractions of a byte are rounded. UsageError for anything else, and for negative
    sizes.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", text.strip().lower(), re.ASCII)
    if not found or found[2] not in _UNITS:
        why = "must not be negative" if text.strip().startswith("-") else "is not a size"
        raise UsageError(f"{text!r} {why}: write it like 8GiB, 16GB or 512MiB")
    size = round(Fraction(found[1]) * _UNITS[found[2]])
    if size > _MOST_BYTES:
        raise UsageError(f"{text!r} is more than any machine has: write it like 8GiB, 16GB or 512MiB")
    return size


def find_gpu(name: str) -> CatalogueGpu:
    """The card of that name.

    Case, spaces, hyphens and the vendor's words do not matter, nor does a missing "RTX", "GTX", "RX" or
    "Arc". A size ("8GB" or "8 GiB", both meaning 2^30 bytes) picks the variant, or tells the memory of a chip
    that shares it; without one, such a chip comes back with ``memory_bytes`` None. UsageError: unknown (the
    nearest names are listed), sold in several variants (they are listed), or never with that much memory.
    """
    text = name.lower().replace("®", "").replace("™", "")
    sizes = {int(a or b) for a, b in _CARD_SIZE.findall(text)}
    if len(sizes) > 1:
        raise UsageError(f"{name!r} names two memory sizes: give one")
    key = _card_key(_CARD_SIZE.sub(" ", text))
    index = _card_index()
    found = index.get(key, ())
    if not key or not found:
        raise UsageError(_unknown("card", name, key, {k: [g.name for g in v] for k, v in index.items()}))
    if sizes:
        size = sizes.pop() * 2**30
        fitting = [g for g in found if not g.sizes or size in g.sizes]
        if not fitting:
            known = sorted({b for g in found for b in g.sizes})
            raise UsageError(
                f"{found[0].name} is not sold with {size >> 30} GB, but with "
                f"{_either([str(b >> 30) for b in known])} GB"
            )
        found = tuple(dataclasses.replace(g, memory_bytes=size) if g.unified else g for g in fitting)
    if len(found) > 1:
        raise UsageError(f"{name!r} may be {_either([_describe(g) for g in found])}: say which")
    return found[0]


def find_memory(text: str) -> CatalogueMemory:
    """Main memory by standard, rate and channels ("DDR5-6000 x2", "dual channel DDR4 3200", "LPDDR5X-8000
    256-bit") or by the processors it comes with ("EPYC 9004").

    A channel is 64 bits wide, also with DDR5. UsageError when it is unknown or when the channels are missing:
    the bandwidth depends on them.
    """
    rest = text.lower()
    kind = _MEMORY_KIND.search(rest)
    if not kind:
        return _pick("memory", text, memories())
    standard = kind[1].upper()
    rest = _MEMORY_KIND.sub(" ", rest, count=1)
    width = re.search(r"\b(\d+)[\s-]*bits?\b", rest)
    rest = rest.replace(width[0], " ") if width else rest
    counted = _MEMORY_CHANNELS.search(rest)
    rest = rest.replace(counted[0], " ") if counted else rest
    rate = re.search(r"\b\d{4,5}(?=\s*(?:mt/s|mhz|\b))", rest)
    rest = rest.replace(rate[0], " ", 1) if rate else rest
    same = [m for m in memories() if m.standard == standard and m.name.startswith(standard + "-")]
    low_power = standard.startswith("LP")
    common = rate[0] if rate else same[0].transfers_per_s // 10**6
    example = f"{standard}-{common} {'128-bit' if low_power else 'x2'}"
    unread = re.sub(r"mt/s|mhz|memory|ram|[\s,-]", "", rest)
    if unread or not rate or (width if not low_power else counted):
        raise UsageError(f"{text!r} is not understood as main memory: write it like {example}")
    if not (width or counted):
        what = "how wide is its bus" if low_power else "how many channels (desktops and laptops have 2)"
        raise UsageError(f"{text!r}: {what}? Write it like {example!r}")
    if width:
        name = f"{standard}-{rate[0]} {int(width[1])}-bit"
    else:
        assert counted is not None
        word = next(g for g in counted.groups() if g)
        name = f"{standard}-{rate[0]} x{_CHANNEL_WORDS.get(word) or int(word)}"
    for memory in same:
        if memory.name == name:
            return memory
    near = difflib.get_close_matches(name, [m.name for m in same], n=4, cutoff=0.0)
    raise UsageError(f"no {name} in the catalogue: nearest are {', '.join(near)}; or give the GB/s")


def find_drive(text: str) -> CatalogueDrive:
    """A class of drives: "SATA SSD", "NVMe PCIe 4.0 x4", "Gen 4 NVMe", "HDD", "eMMC", "USB 3". UsageError when
    it is unknown, or several classes are meant."""
    return _pick("drive", text, drives())


def find_link(text: str) -> CatalogueLink:
    """A link: "PCIe 4.0 x8", "Gen3 x4", "Thunderbolt 4", "OCuLink". UsageError when it is unknown."""
    return _pick("link", text, links())


def hypothetical(
    gpu: Sequence[str],
    ram: int,
    cpu_bandwidth: float | None = None,
    memory: str | None = None,
    drive: str | None = None,
    cores: int | None = None,
    link: str | None = None,
) -> Hardware:
    """A machine made of catalogue entries.

    ``gpu``: names for ``find_gpu``, in the order of the devices. ``ram``: bytes of main memory.
    ``cpu_bandwidth``: of main memory, GB/s (10^9 bytes); or ``memory`` for ``find_memory``; one of them is
    needed unless the graphics part's own figure is that of the main memory. ``drive`` for ``find_drive``.
    ``cores``: performance cores; 8 are assumed, with a warning, when None. ``link``: what all cards are
    plugged into, for ``find_link``; a card never gets more than its own generation and lanes.

    Devices are named as ggml names them: CUDA for NVIDIA, MTL for Apple, Vulkan for the rest. Their
    ``memory_total`` is the card's memory less what error correction and the driver take
    (``reserve_bytes`` in ``details``), or the part of main memory that the system lets a graphics part use.
    ``details`` has ``provenance`` "catalogue" and the published peaks with their sources. UsageError for
    names that are not known and for a machine that cannot be.
    """
    if ram <= 0:
        raise UsageError("the machine needs main memory: give its size, like 32GiB")
    if cores is not None and not 1 <= cores <= 4096:
        raise UsageError(f"{cores} cores cannot be: give the number of performance cores")
    cards = [find_gpu(name) for name in gpu]
    shared = [card for card in cards if card.unified]
    if len(shared) > 1 or (shared and shared[0].vendor == "apple" and len(cards) > 1):
        raise UsageError(
            f"{shared[0].name} is part of the processor: it cannot be there with {cards[-1].name}"
        )
    if link is not None and len(shared) == len(cards):
        raise UsageError(f"a link ({link!r}) needs a card that is plugged into it")
    ram = _settle_ram(shared[0], ram) if shared else ram
    bandwidth, bandwidth_source = _main_memory(shared[0] if shared else None, cpu_bandwidth, memory)
    reserve = min(SYSTEM_RESERVE_BYTES, ram // 8)
    processor = Device(
        name="CPU",
        kind="cpu",
        description="processor (not described)",
        memory_total=ram,
        memory_free=ram - reserve,
        backend="CPU",
        details={
            "provenance": "catalogue",
            "bandwidth_bytes_per_s": bandwidth,
            "bandwidth_source": bandwidth_source,
            "reserve_bytes": reserve,
            "reserve_source": "assumed for the operating system",
        },
    )
    plugged = find_link(link) if link is not None else None
    devices: list[Device] = []
    for card in cards:
        backend = {"nvidia": "CUDA", "apple": "MTL"}.get(card.vendor, "Vulkan")
        number = sum(d.backend == backend for d in devices)
        total, reserve_source = _usable(card, ram)
        speed, speed_source = card.bandwidth_bytes_per_s, card.source
        if card.unified or speed is None:
            speed, speed_source = bandwidth, bandwidth_source
        devices.append(
            Device(
                name=f"{backend}{number}",
                # ggml calls Apple's graphics a GPU, and other vendors' shared ones integrated
                kind="igpu" if card.unified and card.vendor != "apple" else "gpu",
                description=card.name,
                memory_total=total,
                memory_free=total,
                backend=backend,
                details={
                    "provenance": "catalogue",
                    "shares_main_memory": card.unified,
                    "bandwidth_bytes_per_s": speed,
                    "bandwidth_source": speed_source,
                    "reserve_bytes": (ram if card.memory_bytes is None else card.memory_bytes) - total,
                    "reserve_source": reserve_source,
                    **_link_details(card, plugged),
                    **{f: getattr(card, f) for f in ("fp16_flops", "fp16_kind", "fp32_flops", "int8_ops")},
                    "nvlink_bytes_per_s": card.nvlink_bytes_per_s,
                    "source": card.source,
                },
            )
        )
    n_cores = cores or ASSUMED_CORES
    return Hardware(
        cpu_model="unknown",
        architecture="arm64" if shared and shared[0].vendor == "apple" else "unknown",
        physical_cores=n_cores,
        logical_cores=n_cores,
        performance_cores=n_cores,
        usable_cpus=n_cores,
        cpu_features=(),
        ram_total=ram,
        ram_limit=ram,
        ram_available=ram - reserve,
        swap_total=0,
        os="unknown",
        devices=(processor, *devices),
        drives=(_drive(find_drive(drive)),) if drive is not None else (),
        warnings=() if cores else (f"number of cores not given: {ASSUMED_CORES} are assumed",),
    )


def _drive(found: CatalogueDrive) -> Drive:
    details = {"read_bytes_per_s": found.read_bytes_per_s, "read_source": found.source}
    details["provenance"] = "catalogue"
    return Drive("", "", found.name, "unknown", found.kind, total=0, free=0, details=details)


def _settle_ram(card: CatalogueGpu, ram: int) -> int:
    """Main memory of a chip whose name or vendor says how much there is. People say GB where it is GiB."""
    if not card.sizes:
        return ram
    for size in card.sizes:
        if size * Fraction(93, 100) <= ram <= size:
            return size
    raise UsageError(
        f"{card.name} shares main memory of {_either([str(b >> 30) for b in card.sizes])} GiB: "
        f"{ram / 2**30:.1f} GiB contradicts that"
    )


def _main_memory(
    shared: CatalogueGpu | None, cpu_bandwidth: float | None, memory: str | None
) -> tuple[int, str]:
    """Bytes/s of main memory, and where that is from."""
    if cpu_bandwidth is not None and memory is not None:
        raise UsageError("the bandwidth of main memory is given twice: as a figure and as its kind")
    if cpu_bandwidth is not None:
        if not (math.isfinite(cpu_bandwidth) and 0 < cpu_bandwidth < 100_000):
            raise UsageError(f"{cpu_bandwidth} GB/s cannot be the bandwidth of main memory")
        return round(cpu_bandwidth * 1e9), "given by the user"
    if memory is not None:
        found = find_memory(memory)
        return found.bandwidth_bytes_per_s, found.source
    if shared is not None and shared.bandwidth_bytes_per_s is not None:
        return shared.bandwidth_bytes_per_s, shared.source
    raise UsageError(
        'how fast is main memory? Give its bandwidth in GB/s, or its kind, like "DDR5-6000 x2" (two channels)'
    )


def _usable(card: CatalogueGpu, ram: int) -> tuple[int, str]:
    """Bytes that programs may use, and why it is less than there is."""
    if card.vendor == "apple":
        # recommendedMaxWorkingSetSize as llama.cpp prints it: 10922 MiB of 16 GiB, 21845 of 32, 49152 of 64,
        # 73728 of 96
        share = Fraction(2, 3) if ram <= 32 * 2**30 else Fraction(3, 4)
        return math.floor(ram * share), f"Metal's recommended working set: {share} of main memory"
    if card.unified:
        return (
            ram // 2,
            "half of main memory: what Linux and Windows let a graphics part map unless told otherwise",
        )
    assert card.memory_bytes is not None
    size, why = card.memory_bytes, "assumed for the driver"
    if card.inline_ecc:
        size, why = size * 15 // 16, "error correction (1/16), and assumed for the driver"
    return size - max(DRIVER_RESERVE_BYTES, math.ceil(size * DRIVER_RESERVE_SHARE)), why


def _link_details(card: CatalogueGpu, plugged: CatalogueLink | None) -> dict[str, Any]:
    own: CatalogueLink | None = None
    if card.link_lanes is not None:
        own = find_link(f"PCIe {card.link_generation}.0 x{card.link_lanes}")
    best, source = own, card.source
    if plugged is not None and own is not None:
        generation, lanes = min(own.generation, plugged.generation), min(own.lanes, plugged.lanes)
        least = find_link(f"PCIe {generation}.0 x{lanes}")
        if least.bandwidth_bytes_per_s < own.bandwidth_bytes_per_s:
            same = least.bandwidth_bytes_per_s == plugged.bandwidth_bytes_per_s
            best, source = (plugged if same else least), "given by the user"
    return {
        "link": "main memory" if card.unified else best.name if best else None,
        "link_bandwidth_bytes_per_s": best.bandwidth_bytes_per_s if best else None,
        "link_source": f"{source}; {best.source}" if best else card.source,
    }


def _describe(card: CatalogueGpu) -> str:
    sizes = [f"{b >> 30}" for b in card.sizes]
    if not sizes or _CARD_SIZE.search(card.name.lower()):
        return card.name
    return f"{card.name} with {_either(sizes)} GB"


def _either(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _key(text: str) -> str:
    """Letters and digits only; "4.0" counts as "4"."""
    return re.sub(r"[^a-z0-9.]|\.(?!\d)", "", re.sub(r"(\d)\.0(?!\d)", r"\1", text.lower()))


def _card_key(text: str) -> str:
    key = _key(text).replace("mobile", "laptop").replace("notebook", "laptop")
    for word in _NOISE:
        key = key.replace(word, "")
    return re.sub(r"^(?:rtx|gtx|rx|arc)(?=[ab]?\d)", "", key)


@functools.cache
def _card_index() -> Mapping[str, tuple[CatalogueGpu, ...]]:
    """Keys without a size -> the cards they may mean."""
    index: dict[str, tuple[CatalogueGpu, ...]] = {}
    for card in gpus():
        for key in {_card_key(_CARD_SIZE.sub(" ", n.lower())) for n in (card.name, *card.aliases)}:
            index[key] = (*index.get(key, ()), card)
    return index


def _pick(what: str, text: str, entries: Sequence[E]) -> E:
    keys = [{_key(n) for n in (e.name, *e.aliases)} for e in entries]
    key = _key(text)
    found = [e for e, own in zip(entries, keys, strict=True) if key in own]
    if not found:
        names = {k: [e.name] for e, own in zip(entries, keys, strict=True) for k in own}
        raise UsageError(_unknown(what, text, key, names))
    if len(found) > 1:
        raise UsageError(f"{text!r} may be {_either([e.name for e in found])}: say which")
    return found[0]


def _unknown(what: str, text: str, key: str, names: Mapping[str, Sequence[str]]) -> str:
    close = [k for k in names if len(key) > 2 and key in k]
    close += difflib.get_close_matches(key, names, n=4, cutoff=0.5)
    near = list(dict.fromkeys(name for k in close for name in names[k]))[:5]
    hint = f"nearest are {', '.join(near)}" if near else "nothing in the catalogue is like it"
    return f"no {what} {text!r} in the catalogue: {hint}"
