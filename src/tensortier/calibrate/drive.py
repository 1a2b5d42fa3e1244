"""How fast the drive is past the page cache."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from tensortier import paths
from tensortier.calibrate.records import DriveRead
from tensortier.types import Hardware

MIB = 1 << 20
BLOCKS = (256 * 1024, 512 * 1024, 1 * MIB, 4 * MIB)  # bytes
DEPTHS = (1, 4, 16, 32)
FILE_BYTES = 256 * MIB


def measure_drive(
    near: Path | None = None,
    *,
    file_bytes: int = FILE_BYTES,
    seconds: float = 0.06,
    rounds: int = 3,
    over: Callable[[], bool] = lambda: False,
) -> list[DriveRead]:
    """Random reads past the page cache, by the reader that weights on the drive come through: the median of
    ``rounds`` over all block sizes and depths, ``seconds`` each (drives of virtual machines are fast for a moment, and
    slow for the next). Once ``over`` says that the time is up, what was read until then counts: fewer rounds, or not
    all sizes and depths.

    Read is ``near`` itself where that is a file of ``file_bytes`` or more: what was just written may still be in some
    cache on its way to the drive. Else a file that is made beside it (default: in the cache folder) and removed.

    Raises:
        OSError: no room, a file system that cannot read past its cache, or (TimeoutError) the file was not written in
            time.
    """
    if near is not None and _is_large(near, file_bytes):
        return _measured(near, seconds, rounds, over)
    folder = near if near is not None and near.is_dir() else (near.parent if near else paths.cache_dir())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".calibrate-") as file:
        chunk = os.urandom(MIB)
        for _ in range(file_bytes // MIB):
            file.write(chunk)
            if over():
                raise TimeoutError(f"writing {file_bytes // MIB} MiB to read them again took too long")
        file.flush()
        os.fsync(file.fileno())
        return _measured(Path(file.name), seconds, rounds, over)


def large_file(hardware: Hardware) -> Path | None:
    """That the machine was asked about, where its reads tell something of the drive: a model."""
    asked = (Path(drive.path) for drive in hardware.drives)
    return next((path for path in asked if _is_large(path, FILE_BYTES)), None)


def _is_large(path: Path, nbytes: int) -> bool:
    """Without holes, which are read from nowhere."""
    try:
        status = path.stat()
    except OSError:
        return False
    held = getattr(status, "st_blocks", 0) * 512  # Windows does not tell
    return path.is_file() and status.st_size >= nbytes and held >= 0.9 * status.st_size


def _measured(file: Path, seconds: float, rounds: int, over: Callable[[], bool]) -> list[DriveRead]:
    from tensortier import tier

    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        raise OSError("this system has no O_DIRECT")
    os.close(os.open(file, os.O_RDONLY | direct))  # refused where the file system has no such reads
    found: dict[tuple[int, int], list[float]] = {key: [] for key in itertools.product(BLOCKS, DEPTHS)}
    for block, depth in list(found) * rounds:
        found[block, depth].append(tier.drive_bandwidth(file, block=block, depth=depth, seconds=seconds))
        if over():
            break
    mount = _mount_point(file.parent)
    return [DriveRead(mount, *key, statistics.median(speeds)) for key, speeds in found.items() if speeds]


def _mount_point(folder: Path) -> str:
    folder = folder.resolve()
    return str(next(p for p in (folder, *folder.parents) if p.is_mount()))
