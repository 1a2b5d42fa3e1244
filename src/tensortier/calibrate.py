"""What this machine achieves: measured once, in under half a minute, and kept until something changes.

Measured with the kernels, backends and file reads that a model runs on, not with a benchmark of something else:

* ``Product``: a weight matrix times one column (decode) or many (prefill), by quantization type, device, threads
  and kernel (repacked or not). Operands rotate over more memory than any cache holds.
* ``Attention``: flash attention over a KV cache, of one token or many, by cache type.
* ``Overhead``: what an operation costs however small it is.
* ``DriveRead``: random reads past the page cache (O_DIRECT), by block size and requests in flight.

Other work on a machine only ever adds time, so each figure is the median of the faster half of its runs, and
its spread the distance from there to the slowest of that half.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tensortier import paths
from tensortier.errors import LibraryError
from tensortier.gguf.ggml_types import GGML_TYPES
from tensortier.types import Hardware

if TYPE_CHECKING:
    from rich.console import Console

VERSION = 3
MIB = 1 << 20

# What people's files hold. ggml numbers come from the table of the reader.
TYPES = (
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q4_K",
    "Q3_K",
    "Q2_K",
    "Q5_0",
    "Q5_1",
    "Q4_0",
    "Q4_1",
    "IQ4_XS",
    "IQ4_NL",
    "IQ3_XXS",
    "IQ2_XXS",
    "MXFP4",
)
KV_TYPES = ("F16", "Q8_0", "Q4_0")
BLOCKS = (256 * 1024, 1 * MIB, 4 * MIB)  # bytes
DEPTHS = (1, 4, 16)

STEADY = 0.15  # spread below which a figure is taken at once; above it, measured up to twice more
BUSY = 0.25  # cores that other processes may use before a note says the figures may be too low


@dataclasses.dataclass(frozen=True)
class Product:
    device: str
    type: str
    threads: int
    batch: int  # tokens
    repacked: bool
    bytes_per_second: float  # of weights read, at this batch
    spread: float  # relative: 0.05 is 5 %


@dataclasses.dataclass(frozen=True)
class Attention:
    device: str
    type: str
    threads: int
    batch: int  # tokens that ask at once
    bytes_per_second: float  # of keys and values read, with four query heads to a KV head
    spread: float


@dataclasses.dataclass(frozen=True)
class Overhead:
    """Of one operation in a graph, however small: threads meet at a barrier after each."""

    device: str
    threads: int
    seconds: float
    spread: float


@dataclasses.dataclass(frozen=True)
class DriveRead:
    mount_point: str
    block: int  # bytes
    depth: int  # requests in flight
    bytes_per_second: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    fingerprint: str  # of machine, devices and library; see ``fingerprint``
    seconds: float  # that measuring took
    products: tuple[Product, ...]
    attention: tuple[Attention, ...]
    overheads: tuple[Overhead, ...]
    drives: tuple[DriveRead, ...]
    notes: tuple[str, ...] = ()  # what could not be measured, and why


def fingerprint(hardware: Hardware) -> str:
    """Changes when a calibration no longer holds: another processor, device, driver, memory size or library."""
    from importlib.metadata import version

    parts: list[Any] = [VERSION, version("llama-cpp-python"), hardware.cpu_model, hardware.usable_cpus]
    parts += [hardware.physical_cores, hardware.ram_total]
    for device in hardware.devices:
        parts.append([device.name, device.description, device.memory_total, device.details.get("driver")])
    return json.dumps(parts)


def path() -> Path:
    return paths.cache_dir() / "calibration.json"


def load(hardware: Hardware) -> Calibration | None:
    """The kept calibration, or None where there is none that holds for this machine now."""
    try:
        data = json.loads(path().read_text(encoding="utf-8"))
        found = Calibration(
            fingerprint=data["fingerprint"],
            seconds=data["seconds"],
            products=tuple(Product(**row) for row in data["products"]),
            attention=tuple(Attention(**row) for row in data["attention"]),
            overheads=tuple(Overhead(**row) for row in data["overheads"]),
            drives=tuple(DriveRead(**row) for row in data["drives"]),
            notes=tuple(data["notes"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # an older or damaged file: measuring again replaces it
    return found if found.fingerprint == fingerprint(hardware) else None


def save(calibration: Calibration) -> None:
    """Keeps it in the cache, whole or not at all."""
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as file:
        json.dump(dataclasses.asdict(calibration), file, indent=1)
    Path(file.name).replace(target)


def robust(seconds: Sequence[float]) -> tuple[float, float]:
    """(seconds, relative spread) of runs of which some were disturbed: the median of the faster half, and how
    far the slowest of that half is from it."""
    half = sorted(seconds)[: max(1, (len(seconds) + 1) // 2)]
    middle = statistics.median(half)
    return middle, half[-1] / middle - 1.0


def calibrate(
    hardware: Hardware,
    *,
    drive_path: Path | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> Calibration:
    """Measures every device of ``hardware``, and the drive that ``drive_path`` (default: the cache) is on.

    ``progress`` is called with the fraction done and what comes next. Takes under 30 s with one device. Run it
    on a machine that does nothing else: a second busy process slows ggml's threads many times over.

    Raises:
        LibraryError: a device is gone, or has too little memory for the test's few hundred MiB.
    """
    started = time.perf_counter()
    others = _busy_cores()
    cores = max(1, min(hardware.performance_cores, hardware.usable_cpus))
    products: list[Product] = []
    attention: list[Attention] = []
    overheads: list[Overhead] = []
    notes: list[str] = []
    if others > BUSY:
        notes.append(f"other processes were using {others:.1f} cores: the figures may be far too low")
    jobs: list[tuple[str, Callable[[], None]]] = []

    def product_job(device: str, name: str, threads: int, batch: int, repack: bool) -> Callable[[], None]:
        def job() -> None:
            row = _steadiest(
                lambda: measure_product(device, name, threads=threads, batch=batch, repack=repack)
            )
            if row is not None:
                products.append(row)

        return job

    def attention_job(device: str, name: str, threads: int, batch: int) -> Callable[[], None]:
        def job() -> None:
            row = _steadiest(lambda: measure_attention(device, name, threads=threads, batch=batch))
            if row is not None:
                attention.append(row)

        return job

    def overhead_job(device: str, threads: int) -> Callable[[], None]:
        return lambda: overheads.append(measure_overhead(device, threads=threads))

    for device in hardware.devices:
        if device.kind not in ("cpu", "gpu", "igpu"):
            continue
        on_cpu = device.kind == "cpu"
        for name in TYPES:
            counts = sorted({1, cores}) if on_cpu and name in ("Q4_K", "Q8_0") else [cores]
            for threads in counts:
                jobs.append((f"{device.name} {name}", product_job(device.name, name, threads, 1, False)))
                if on_cpu:
                    jobs.append((f"{device.name} {name}", product_job(device.name, name, threads, 1, True)))
            for repack in (False, True) if on_cpu else (False,):
                jobs.append(
                    (f"{device.name} {name} prefill", product_job(device.name, name, cores, 128, repack))
                )
        for name in KV_TYPES:
            for batch in (1, 128):
                jobs.append(
                    (f"{device.name} attention {name}", attention_job(device.name, name, cores, batch))
                )
        for threads in sorted({1, cores}) if on_cpu else [1]:
            jobs.append((f"{device.name} operations", overhead_job(device.name, threads)))

    drives: list[DriveRead] = []
    total = len(jobs) + 1
    for i, (what, job) in enumerate(jobs):
        if progress is not None:
            progress(i / total, what)
        job()
    if progress is not None:
        progress(len(jobs) / total, "drive")
    try:
        drives += measure_drive(drive_path)
    except OSError as exc:
        notes.append(f"the drive was not measured: {exc.strerror or exc}")
    if progress is not None:
        progress(1.0, "done")
    return Calibration(
        fingerprint(hardware),
        time.perf_counter() - started,
        tuple(products),
        tuple(attention),
        tuple(overheads),
        tuple(drives),
        tuple(notes),
    )


def _busy_cores() -> float:
    """Cores that are at work now, while this process waits."""
    import psutil

    return float(psutil.cpu_percent(interval=0.3)) / 100 * (psutil.cpu_count() or 1)


_Row = TypeVar("_Row", Product, Attention)


def _steadiest(measure: Callable[[], _Row | None]) -> _Row | None:
    """A figure whose runs agree, or after three tries the fastest: a disturbance only ever slows."""
    rows: list[_Row] = []
    for _ in range(3):
        row = measure()
        if row is None or row.spread < STEADY:
            return row
        rows.append(row)
    return max(rows, key=lambda r: r.bytes_per_second)


def _type(name: str) -> tuple[int, float]:
    """(ggml's number, bytes per element) of a type."""
    for number, kind in GGML_TYPES.items():
        if kind.name == name:
            return number, kind.type_size / kind.block_size
    raise LibraryError(f"ggml has no type {name}")


def measure_product(
    device: str,
    name: str,
    *,
    threads: int,
    batch: int = 1,
    repack: bool = False,
    operand_bytes: int = 96 * MIB,
) -> Product | None:
    """Weights of ``operand_bytes`` in eight matrices, read once per run; None where there is no such kernel."""
    from tensortier._llama import microbench

    number, per_element = _type(name)
    k, count = 4096, 8
    size = operand_bytes if batch == 1 else operand_bytes // 16
    n = max(64, int(size / per_element / k / count) // 64 * 64)
    seconds = microbench.mul_mat(
        device,
        number,
        k=k,
        n=n,
        count=count,
        batch=batch,
        threads=threads,
        repack=repack,
        runs=9 if batch == 1 else 3,
    )
    if not seconds:
        return None
    middle, spread = robust(seconds)
    return Product(device, name, threads, batch, repack, k * n * count * per_element / middle, spread)


def measure_attention(
    device: str, name: str, *, threads: int, cells: int = 8192, batch: int = 1
) -> Attention | None:
    """``batch`` tokens over caches of ``cells`` tokens with 8 KV heads of 128, four times as many query heads."""
    from tensortier._llama import microbench

    number, per_element = _type(name)
    count = 4
    if batch > 1:
        cells, count = cells // 8, 1
    seconds = microbench.attention(
        device,
        number,
        head_dim=128,
        heads=32,
        kv_heads=8,
        cells=cells,
        count=count,
        batch=batch,
        threads=threads,
        runs=7 if batch == 1 else 3,
    )
    if not seconds:
        return None
    middle, spread = robust(seconds)
    return Attention(device, name, threads, batch, 2 * cells * 8 * 128 * count * per_element / middle, spread)


def measure_overhead(device: str, *, threads: int) -> Overhead:
    """Seconds per operation of a graph of norms, products and sums on a vector of 2048 values."""
    from tensortier._llama import microbench

    count = 300
    seconds = microbench.small_ops(device, count=count, width=2048, threads=threads, runs=9)
    middle, spread = robust(seconds)
    return Overhead(device, threads, middle / count, spread)


def measure_drive(
    near: Path | None = None, *, file_bytes: int = 256 * MIB, seconds: float = 0.4
) -> list[DriveRead]:
    """Random reads of a file past the page cache, ``seconds`` for each block size and depth. The file is made
    beside ``near`` (default: in the cache folder) and removed.

    Raises:
        OSError: no room, or a file system that cannot read past its cache.
    """
    folder = near if near is not None and near.is_dir() else (near.parent if near else paths.cache_dir())
    folder.mkdir(parents=True, exist_ok=True)
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        raise OSError("this system has no O_DIRECT")
    rows = []
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".calibrate-") as file:
        chunk = os.urandom(MIB)
        for _ in range(file_bytes // MIB):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        descriptor = os.open(file.name, os.O_RDONLY | direct)
        try:
            for block in BLOCKS:
                for depth in DEPTHS:
                    speed = _read_randomly(descriptor, file_bytes, block, depth, seconds)
                    rows.append(DriveRead(_mount_point(folder), block, depth, speed))
        finally:
            os.close(descriptor)
    return rows


def _mount_point(folder: Path) -> str:
    folder = folder.resolve()
    return str(next(p for p in (folder, *folder.parents) if p.is_mount()))


def _read_randomly(descriptor: int, file_bytes: int, block: int, depth: int, seconds: float) -> float:
    import mmap
    import random

    done = [0] * depth
    errors: list[OSError] = []
    deadline = time.perf_counter() + seconds

    def read(worker: int) -> None:
        rng = random.Random(worker)
        buffer = mmap.mmap(-1, block)  # page-aligned, as O_DIRECT wants it
        try:
            while time.perf_counter() < deadline:
                done[worker] += os.preadv(descriptor, [buffer], rng.randrange(file_bytes // block) * block)
        except OSError as exc:
            errors.append(exc)
        finally:
            buffer.close()

    started = time.perf_counter()
    workers = [threading.Thread(target=read, args=(i,)) for i in range(depth)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return sum(done) / (time.perf_counter() - started)


def render(calibration: Calibration, console: Console) -> None:
    """Tables of what was measured, in GB/s (10^9 bytes per second)."""
    from rich.table import Table

    def speed(value: float | None) -> str:
        return "" if value is None else f"{value / 1e9:.3g}"

    found: dict[tuple[str, str, int], dict[tuple[int, bool], float]] = {}
    for p in calibration.products:
        row = found.setdefault((p.device, p.type, p.threads), {})
        row[p.batch, p.repacked] = p.bytes_per_second
    table = Table(title="Weights read while computing, GB/s", title_justify="left")
    for name in ("device", "type", "threads", "1 token", "repacked", "128 tokens", "repacked"):
        table.add_column(name, justify="left" if name in ("device", "type") else "right")
    for (device, kind, threads), row in found.items():
        cells = [row.get(key) for key in ((1, False), (1, True), (128, False), (128, True))]
        table.add_row(device, kind, str(threads), *(speed(c) for c in cells))
    console.print(table)
    table = Table(title="KV cache read by attention, GB/s", title_justify="left")
    for name in ("device", "type", "threads", "tokens", "GB/s"):
        table.add_column(name, justify="left" if name in ("device", "type") else "right")
    for a in calibration.attention:
        table.add_row(a.device, a.type, str(a.threads), str(a.batch), speed(a.bytes_per_second))
    console.print(table)
    for o in calibration.overheads:
        console.print(
            f"{o.device}, {o.threads} threads: {o.seconds * 1e6:.1f} µs per operation", markup=False
        )
    if calibration.drives:
        table = Table(title="Drive, random reads past the page cache, GB/s", title_justify="left")
        table.add_column("block")
        for depth in DEPTHS:
            table.add_column(f"{depth} in flight", justify="right")
        for block in BLOCKS:
            speeds = [
                next(
                    (d.bytes_per_second for d in calibration.drives if (d.block, d.depth) == (block, n)), None
                )
                for n in DEPTHS
            ]
            table.add_row(f"{block // 1024} KiB", *(speed(c) for c in speeds))
        console.print(table)
    for note in calibration.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"measured in {calibration.seconds:.0f} s", markup=False)
