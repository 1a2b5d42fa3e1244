"""How fast the drive is past the page cache."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path

from tensortier import paths
from tensortier.calibrate.records import DriveRead

MIB = 1 << 20
BLOCKS = (256 * 1024, 1 * MIB, 4 * MIB)  # bytes
DEPTHS = (1, 4, 16)


def measure_drive(
    near: Path | None = None, *, file_bytes: int = 256 * MIB, seconds: float = 0.2
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
