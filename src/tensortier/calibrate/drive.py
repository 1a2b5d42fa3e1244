"""How fast the drive is past the page cache."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from pathlib import Path

from tensortier import paths
from tensortier.calibrate.records import DriveRead

MIB = 1 << 20
BLOCKS = (256 * 1024, 512 * 1024, 1 * MIB, 4 * MIB)  # bytes
DEPTHS = (1, 4, 16, 32)


def measure_drive(
    near: Path | None = None, *, file_bytes: int = 256 * MIB, seconds: float = 0.06, rounds: int = 3
) -> list[DriveRead]:
    """Random reads of a file past the page cache, by the reader that weights on the drive come through: the median of
    ``rounds`` over all block sizes and depths, ``seconds`` each (drives of virtual machines are fast for a moment, and
    slow for the next). The file is made beside ``near`` (default: in the cache folder) and removed.

    Raises:
        OSError: no room, or a file system that cannot read past its cache.
    """
    from tensortier import tier

    folder = near if near is not None and near.is_dir() else (near.parent if near else paths.cache_dir())
    folder.mkdir(parents=True, exist_ok=True)
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        raise OSError("this system has no O_DIRECT")
    found: dict[tuple[int, int], list[float]] = {key: [] for key in itertools.product(BLOCKS, DEPTHS)}
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".calibrate-") as file:
        chunk = os.urandom(MIB)
        for _ in range(file_bytes // MIB):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        os.close(os.open(file.name, os.O_RDONLY | direct))  # refused where the file system has no such reads
        for _ in range(rounds):
            for block, depth in found:
                speed = tier.drive_bandwidth(Path(file.name), block=block, depth=depth, seconds=seconds)
                found[block, depth].append(speed)
    mount = _mount_point(folder)
    return [DriveRead(mount, *key, statistics.median(speeds)) for key, speeds in found.items()]


def _mount_point(folder: Path) -> str:
    folder = folder.resolve()
    return str(next(p for p in (folder, *folder.parents) if p.is_mount()))
