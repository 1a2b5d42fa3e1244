"""What this machine achieves: measured once, in under half a minute, and kept until something changes.

Measured with the kernels, backends and file reads that a model runs on, not with a benchmark of something else:

* products of weights with one column (decode) and many (prefill), by quantization type, device, threads and kernel
  (repacked or not), attention by cache type, width and length, and copies (``kernels``);
* the rest of a layer, and a graph that changes devices, through llama.cpp itself (``layers``);
* the drive (``drive``).

Other work on a machine only ever adds time, so each figure is the median of the faster half of its runs, and
its spread the distance from there to the slowest of that half.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tensortier.calibrate.drive import large_file, measure_drive
from tensortier.calibrate.kernels import (
    LONG,
    MIB,
    SHORT,
    WIDE,
    measure_attention,
    measure_copy,
    measure_elementwise,
    measure_product,
    robust,
    steadiest,
)
from tensortier.calibrate.layers import Models, measure_layers, measure_split, models
from tensortier.calibrate.records import (
    Attention,
    Calibration,
    Copy,
    DriveRead,
    Elementwise,
    LayerCost,
    Product,
    Split,
    fingerprint,
    load,
    path,
    save,
)
from tensortier.calibrate.report import render
from tensortier.types import Device, Hardware

__all__ = [
    "Attention",
    "Calibration",
    "Copy",
    "DriveRead",
    "Elementwise",
    "LayerCost",
    "Product",
    "Split",
    "calibrate",
    "fingerprint",
    "load",
    "measure_attention",
    "measure_copy",
    "measure_drive",
    "measure_elementwise",
    "measure_product",
    "path",
    "render",
    "robust",
    "save",
]

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
FAST_TYPES = ("F16", "BF16", "Q8_0", "Q6_K")  # on a CPU bound by memory
REMOTE_TYPES = (
    "F16",
    "Q8_0",
    "Q6_K",
    "Q4_K",
    "Q4_0",
)  # over a network every operand takes its time to arrive
KV_TYPES = ("F16", "Q8_0", "Q4_0")
BUSY = 0.25  # cores that other processes may use before a note says the figures may be too low


Row = Product | Attention | LayerCost | Elementwise | Copy | Split | None
Job = tuple[str, Callable[[], Row]]


def calibrate(
    hardware: Hardware,
    *,
    rpc: Sequence[str] = (),
    drive_path: Path | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> Calibration:
    """Measures every device of ``hardware``, and the drive that ``drive_path`` is on; without one, that of the large
    file ``hardware`` was asked about, or of the cache.

    ``progress`` is called with the fraction done and what comes next. Takes under 30 s with one device. Run it
    on a machine that does nothing else: a second busy process slows ggml's threads many times over.

    Raises:
        LibraryError: a device is gone, or has too little memory for the test's few hundred MiB.
    """
    from tensortier._llama import devices

    started = time.perf_counter()
    devices.load_modules(tuple(rpc))
    notes: list[str] = []
    if (others := _busy_cores()) > BUSY:
        notes.append(f"other processes were using {others:.1f} cores: the figures may be far too low")
    rows: list[Row] = []
    drives: list[DriveRead] = []
    with models() as small:
        jobs = [job for device in hardware.devices for job in _jobs(device, hardware, small, rpc)]
        for i, (what, job) in enumerate(jobs):
            if progress is not None:
                progress(i / (len(jobs) + 1), what)
            rows.append(job())
    if progress is not None:
        progress(len(jobs) / (len(jobs) + 1), "drive")
    try:
        drives += measure_drive(drive_path or large_file(hardware))
    except OSError as exc:
        notes.append(f"the drive was not measured: {exc.strerror or exc}")
    if progress is not None:
        progress(1.0, "done")
    return Calibration(
        fingerprint(hardware),
        time.perf_counter() - started,
        tuple(r for r in rows if isinstance(r, Product)),
        tuple(r for r in rows if isinstance(r, Attention)),
        tuple(r for r in rows if isinstance(r, LayerCost)),
        tuple(r for r in rows if isinstance(r, Elementwise)),
        tuple(r for r in rows if isinstance(r, Copy)),
        tuple(r for r in rows if isinstance(r, Split)),
        tuple(drives),
        tuple(notes),
    )


def _jobs(device: Device, hardware: Hardware, small: Models, rpc: Sequence[str]) -> Iterator[Job]:
    """What to measure of one device, each with its name."""
    if device.kind not in ("cpu", "gpu", "igpu"):
        return
    cores = max(1, min(hardware.performance_cores, hardware.usable_cpus))
    on_cpu = device.kind == "cpu"
    remote = device.backend == "RPC"
    threads = sorted({1, cores}) if on_cpu else [cores]
    kernels = (False, True) if on_cpu else (False,)
    name = device.name

    def size_for(kind: str, repack: bool) -> int:
        """Bytes: enough for a kernel that reads faster than memory gives, less for one that computes longer."""
        # over a network every operand takes its time to arrive
        return (32 if remote else 320 if repack or kind in FAST_TYPES else 128) * MIB

    def product(
        kind: str,
        n: int,
        repack: bool,
        size: int,
        *,
        columns: int = LONG,
        batch: int = 1,
        experts: bool = False,
    ) -> Callable[[], Row]:
        return lambda: steadiest(
            lambda: measure_product(
                name,
                kind,
                threads=n,
                columns=columns,
                batch=batch,
                experts=experts,
                repack=repack,
                operand_bytes=size,
            )
        )

    def attention(kind: str, n: int, width: int, cells: int, batch: int) -> Callable[[], Row]:
        return lambda: steadiest(
            lambda: measure_attention(name, kind, threads=n, head_dim=width, cells=cells, batch=batch)
        )

    for kind in TYPES:
        for repack in kernels:
            what = f"{name} {kind}"
            large = size_for(kind, repack)
            yield what, product(kind, cores, repack, large)
            yield what, product(kind, cores, repack, large // 4, columns=SHORT)
            for experts in (False, True):
                columns = LONG // 2
                yield what, product(kind, cores, repack, 0, columns=columns, batch=WIDE, experts=experts)
            if threads[0] < cores:
                yield what, product(kind, threads[0], repack, large // 3)
    for kind in KV_TYPES[:1] if remote else KV_TYPES:
        for width in (64, 128, 256) if kind == "F16" else (64, 128):
            for cells in (512, 2048, 8192) if kind == "F16" else (512, 8192):
                yield f"{name} attention {kind}", attention(kind, cores, width, cells, 1)
        for width in (64, 128):
            for cells in (1024, 8192) if kind == "F16" and not remote else (1024,):
                yield f"{name} attention {kind} prefill", attention(kind, cores, width, cells, WIDE)
    if on_cpu and cores > 1:
        yield f"{name} attention", attention("F16", 1, 64, 2048, 1)
    for n in threads:
        yield f"{name} layers", lambda n=n: measure_layers(small, name, threads=n, rpc=rpc)  # type: ignore[misc]
    yield f"{name} operations", lambda: measure_elementwise(name, threads=cores)
    if not on_cpu:
        for pinned in (False, True):
            for to_device in (True, False):
                yield (
                    f"{name} copies",
                    lambda p=pinned, t=to_device: measure_copy(name, to_device=t, pinned=p),  # type: ignore[misc]
                )
        for experts in (False, True):
            yield (
                f"{name} splits",
                lambda e=experts: measure_split(small, name, experts=e, threads=cores, rpc=rpc),  # type: ignore[misc]
            )


def _busy_cores() -> float:
    """Cores that are at work now, while this process waits."""
    import psutil

    return float(psutil.cpu_percent(interval=0.3)) / 100 * (psutil.cpu_count() or 1)
