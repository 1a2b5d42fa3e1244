"""What was measured, and the file that keeps it."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

from tensortier import paths
from tensortier.types import Hardware

VERSION = 7


@dataclasses.dataclass(frozen=True)
class Product:
    """Weight matrices times one column or many."""

    device: str
    type: str
    threads: int
    columns: int  # of the matrices: short rows cost more per byte
    batch: int  # tokens
    experts: bool  # MUL_MAT_ID
    repacked: bool
    bytes_per_second: float  # of weights read, at this batch; of experts that are used
    spread: float  # relative: 0.05 is 5 %


@dataclasses.dataclass(frozen=True)
class Attention:
    """Flash attention over a KV cache, four query heads to a KV head."""

    device: str
    type: str
    threads: int
    head_dim: int
    cells: int
    batch: int  # tokens that ask at once
    elements_per_second: float  # query heads x (key width + value width) x cells x tokens
    spread: float


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What llama.cpp spends besides large products, from models of two depths whose matrices are tiny."""

    device: str
    threads: int
    layer_seconds: float  # more for each layer
    moe_layer_seconds: float  # more for each layer with routed experts
    token_seconds: float  # for a token whatever the number of layers
    spread: float


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """Norms, sums and products of wide batches."""

    device: str
    threads: int
    seconds: float  # per operation and value
    spread: float


@dataclasses.dataclass(frozen=True)
class Copy:
    """Between main memory and a device's."""

    device: str
    to_device: bool
    pinned: bool
    bytes_per_second: float
    spread: float


@dataclasses.dataclass(frozen=True)
class Split:
    """A graph that leaves the device for the CPU and comes back once."""

    device: str
    experts: bool  # routed experts are what is left for: which of them goes over too
    seconds: float
    spread: float


@dataclasses.dataclass(frozen=True)
class DriveRead:
    """Random reads past the page cache (O_DIRECT)."""

    mount_point: str
    block: int  # bytes
    depth: int  # requests in flight
    bytes_per_second: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    fingerprint: str  # of machine, devices and library; see ``fingerprint``
    seconds: float  # that measuring took
    products: tuple[Product, ...] = ()
    attention: tuple[Attention, ...] = ()
    layers: tuple[LayerCost, ...] = ()
    elementwise: tuple[Elementwise, ...] = ()
    copies: tuple[Copy, ...] = ()
    splits: tuple[Split, ...] = ()
    drives: tuple[DriveRead, ...] = ()
    notes: tuple[str, ...] = ()  # what could not be measured, and why


_TABLES = {
    "products": Product,
    "attention": Attention,
    "layers": LayerCost,
    "elementwise": Elementwise,
    "copies": Copy,
    "splits": Split,
    "drives": DriveRead,
}


def fingerprint(hardware: Hardware) -> str:
    """Changes when a calibration no longer holds: another processor, device, driver, memory size or library."""
    from importlib.metadata import version

    parts: list[Any] = [VERSION, version("llama-cpp-python"), hardware.cpu_model, hardware.usable_cpus]
    parts += [hardware.physical_cores, hardware.ram_total]
    for device in hardware.devices:
        parts.append([device.name, device.description, device.memory_total, device.details.get("driver")])
    return json.dumps(parts)


def path(hardware: Hardware) -> Path:
    """Of the file that keeps this machine's calibration; with other devices (a remote server) it is another."""
    digest = zlib.crc32(fingerprint(hardware).encode())
    return paths.cache_dir() / f"calibration-{digest:08x}.json"


def load(hardware: Hardware) -> Calibration | None:
    """The kept calibration, or None where there is none that holds for this machine now."""
    try:
        data = json.loads(path(hardware).read_text(encoding="utf-8"))
        tables: dict[str, Any] = {
            name: tuple(kind(**row) for row in data[name]) for name, kind in _TABLES.items()
        }
        found = Calibration(data["fingerprint"], data["seconds"], notes=tuple(data["notes"]), **tables)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # an older or damaged file: measuring again replaces it
    return found if found.fingerprint == fingerprint(hardware) else None


def save(hardware: Hardware, calibration: Calibration) -> None:
    """Keeps it in the cache, whole or not at all."""
    target = path(hardware)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as file:
        written = Path(file.name)
        try:
            json.dump(dataclasses.asdict(calibration), file, indent=1)
            file.flush()
        except BaseException:  # a full drive, or the end of the process
            written.unlink(missing_ok=True)
            raise
    written.replace(target)
