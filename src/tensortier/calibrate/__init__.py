"""What this machine achieves: measured once, in under half a minute where it is idle, and kept until something changes.

Measured with the kernels, backends and file reads that a model runs on, not with a benchmark of something else:

* products of weights with one column (decode) and many (prefill), by quantization type, device, threads and kernel
  (repacked or not), attention by cache type, width and length, and copies (``kernels``);
* the rest of a layer, and a graph that changes devices, through llama.cpp itself (``layers``);
* the drive (``drive``).

Other work on a machine only ever adds time, so each figure is the median of the faster half of its runs, and
its spread the distance from there to the slowest of that half.

A slow or busy machine is not measured for longer than ``pace.LIMIT_SECONDS`` a device, and as much for the drive. Where
that runs short, figures are first taken once instead of until their runs agree, and then left out, those that a plan
needs least (``Job.needed`` is false): the planner takes the middle of the others for them, with a wide interval. A note
says so. Without even the needed ones there is no calibration.
"""

from __future__ import annotations

import dataclasses
import functools
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
from tensortier.calibrate.pace import LIMIT_SECONDS, Pace
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
from tensortier.errors import LibraryError
from tensortier.types import Device, Hardware

__all__ = [
    "LIMIT_SECONDS",
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
NEEDED_TYPES = ("Q4_K", "Q8_0", "F16")  # where time is short; others lie between them
FAST_TYPES = ("F16", "BF16", "Q8_0", "Q6_K")  # on a CPU bound by memory
KV_TYPES = ("F16", "Q8_0", "Q4_0")
BUSY = 0.25  # cores that other processes may use before a note says the figures may be too low


Row = Product | Attention | LayerCost | Elementwise | Copy | Split | None


@dataclasses.dataclass(frozen=True)
class Job:
    """One figure."""

    what: str
    measure: Callable[[], Row]
    needed: bool = True  # by every plan


def calibrate(
    hardware: Hardware,
    *,
    rpc: Sequence[str] = (),
    drive_path: Path | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> Calibration:
    """Measures every device of ``hardware``, and the drive that ``drive_path`` is on; without one, that of the large
    file ``hardware`` was asked about, or of the cache.

    ``progress`` is called with the fraction done and what comes next. Takes under 30 s with one device, and at most
    ``LIMIT_SECONDS`` for each device and for the drive, and the figure under way. Run it on a machine that does nothing
    else: a second busy process slows ggml's threads many times over.

    Raises:
        LibraryError: a device is gone, has too little memory for the test's few hundred MiB, or takes longer than the
            limit for the figures that every plan needs.
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
        paces: dict[str, Pace] = {}
        jobs: dict[str, list[Job]] = {}
        for device in hardware.devices:
            pace = paces[device.name] = Pace()
            found = _jobs(device, hardware, small, rpc, pace.again)
            jobs[device.name] = sorted(found, key=lambda job: not job.needed)
            pace.figures = len(jobs[device.name])
        total = sum(len(mine) for mine in jobs.values())
        before = 0
        for name, mine in jobs.items():
            for i, job in enumerate(mine):
                if not paces[name].next():
                    break
                if progress is not None:
                    progress((before + i) / (total + 1), job.what)
                rows.append(job.measure())
            _check_needed(name, mine, paces[name])
            notes += paces[name].notes(name)
            before += len(mine)
    if progress is not None:
        progress(total / (total + 1), "drive")
    drive_pace = Pace(figures=1)
    drive_pace.next()
    try:
        drives += measure_drive(drive_path or large_file(hardware), over=drive_pace.over)
    except OSError as exc:
        notes.append(f"the drive was not measured: {exc.strerror or exc}")
    else:
        if drive_pace.over():
            notes.append(
                f"measuring the drive was ended after {LIMIT_SECONDS:.0f} s: its figures are of few reads"
            )
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


def _check_needed(device: str, jobs: Sequence[Job], pace: Pace) -> None:
    needed = sum(job.needed for job in jobs)
    if pace.taken < needed:
        raise LibraryError(
            f"after {LIMIT_SECONDS:.0f} s only {pace.taken} of the {needed} figures of {device} that every plan needs "
            "were measured: other programs may keep this machine busy; measure it when they do not"
        )


def _jobs(
    device: Device, hardware: Hardware, small: Models, rpc: Sequence[str], again: Callable[[], bool]
) -> Iterator[Job]:
    """What to measure of one device. ``again``: as for ``steadiest``."""
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
            ),
            again,
        )

    def attention(kind: str, n: int, width: int, cells: int, batch: int) -> Callable[[], Row]:
        return lambda: steadiest(
            lambda: measure_attention(name, kind, threads=n, head_dim=width, cells=cells, batch=batch),
            again,
        )

    for kind in TYPES:
        for repack in kernels:
            what, needed = f"{name} {kind}", kind in NEEDED_TYPES
            large = size_for(kind, repack)
            yield Job(what, product(kind, cores, repack, large), needed)
            yield Job(what, product(kind, cores, repack, large // 4, columns=SHORT), False)
            for experts in (False, True):
                wide = product(kind, cores, repack, 0, columns=LONG // 2, batch=WIDE, experts=experts)
                yield Job(what, wide, needed and not experts)
            if threads[0] < cores:
                yield Job(what, product(kind, threads[0], repack, large // 3), False)
    for kind in KV_TYPES[:1] if remote else KV_TYPES:
        for width in (64, 128, 256) if kind == "F16" else (64, 128):
            for cells in (512, 2048, 8192) if kind == "F16" else (512, 8192):
                one = attention(kind, cores, width, cells, 1)
                yield Job(f"{name} attention {kind}", one, kind == "F16" and width == 128)
        for width in (64, 128):
            for cells in (1024, 8192) if kind == "F16" and not remote else (1024,):
                many = attention(kind, cores, width, cells, WIDE)
                yield Job(f"{name} attention {kind} prefill", many, kind == "F16" and width == 128)
    if on_cpu and cores > 1:
        yield Job(f"{name} attention", attention("F16", 1, 64, 2048, 1), False)
    for n in threads:
        layers = functools.partial(measure_layers, small, name, threads=n, rpc=rpc)
        yield Job(f"{name} layers", layers, n == cores)
    yield Job(f"{name} operations", functools.partial(measure_elementwise, name, threads=cores))
    if not on_cpu:
        for pinned in (False, True):
            for to_device in (True, False):
                copy = functools.partial(measure_copy, name, to_device=to_device, pinned=pinned)
                yield Job(f"{name} copies", copy, to_device)
        for experts in (False, True):
            split = functools.partial(measure_split, small, name, experts=experts, threads=cores, rpc=rpc)
            yield Job(f"{name} splits", split)


def _busy_cores() -> float:
    """Cores that are at work now, while this process waits."""
    import psutil

    return float(psutil.cpu_percent(interval=0.3)) / 100 * (psutil.cpu_count() or 1)
