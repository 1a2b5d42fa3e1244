"""The files of downloaded models: where they go, what is known of them, who writes them at the moment.

``NAME.json`` beside a file says what was downloaded. ``NAME.part`` is the beginning of a file, and
``NAME.part.json`` says of which.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tensortier import paths
from tensortier.errors import DownloadError

RECORD = ".json"  # behind a file's name: what was downloaded
PART = ".part"  # behind a file's name: the beginning of it
_VERSION = 1

# https://learn.microsoft.com/windows/win32/fileio/naming-a-file; refused everywhere, so that a folder can be moved
_RESERVED = re.compile(
    r"(?:CON|PRN|AUX|NUL|COM[0-9¹²³]|LPT[0-9¹²³]|CONIN\$|CONOUT\$)(?:\..*)?", re.IGNORECASE
)
_FORBIDDEN = frozenset('<>:"|?*\\')
_LONGEST_NAME = 255 - len(PART + RECORD + ".tmp")  # bytes


@dataclass(frozen=True)
class Record:
    """What is known of a file, or of the file that a ``.part`` is the beginning of. Digests as in ``hub.HubFile``."""

    repo: str
    revision: str
    file: str
    size: int
    sha256: str | None
    git_oid: str | None = None

    @property
    def source(self) -> str:
        return f"hf://{self.repo}@{self.revision}/{self.file}"


@dataclass(frozen=True)
class Unfinished:
    """The beginning of a file."""

    path: Path  # of the beginning
    record: Record
    done: int  # bytes


def models_dir() -> Path:
    """Where downloads go: ``owner/repo/`` below it, with the repository's own folders."""
    return paths.cache_dir() / "models"


def room(folder: Path | None = None) -> int:
    """Bytes that are free on the drive of ``folder`` (``models_dir()``), which need not exist yet. Raises OSError."""
    wanted = folder or models_dir()
    return shutil.disk_usage(next(p for p in (wanted, *wanted.parents) if p.exists())).free


def target(folder: Path, name: str) -> Path:
    """Where the file that the hub calls ``name`` goes in ``folder``. Raises DownloadError for a name that would lead
    out of it, or that some system cannot have."""
    parts = name.split("/")
    for part in parts:
        if not part or part in (".", ".."):
            why = "would lead out of its folder" if part == ".." or not parts[0] else "is no file's name"
        elif not part.isprintable() or _FORBIDDEN & set(part):
            why = "has characters that a file's name cannot have everywhere"
        elif _RESERVED.fullmatch(part) or part.endswith((".", " ")):
            why = "is a name that Windows keeps for itself"
        elif len(part.encode("utf-8", "surrogatepass")) > _LONGEST_NAME:
            why = f"is longer than {_LONGEST_NAME} bytes"
        else:
            continue
        shown = name if len(name) < 120 else f"{name[:120]}..."
        raise DownloadError(f"refused: the hub calls a file {shown!r}, which {why}")
    return folder.joinpath(*parts)


def read_record(path: Path) -> Record | None:
    """What stands in a ``.json`` beside a file; None where there is none, or not one of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("version") != _VERSION:
            return None
        record = Record(**found)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    texts = (record.repo, record.revision, record.file)
    digests = (record.sha256, record.git_oid)
    sound = (
        all(isinstance(t, str) for t in texts)
        and all(d is None or isinstance(d, str) for d in digests)
        and isinstance(record.size, int)
    )
    return record if sound else None


def unfinished(folder: Path | None = None) -> list[Unfinished]:
    """Downloads below ``folder`` (``models_dir()``) that were broken off, or are under way."""
    found = []
    for part in sorted((folder or models_dir()).rglob(f"*{PART}")):
        record = read_record(part.with_name(part.name + RECORD))
        if record is None or not part.is_file():
            continue
        try:
            found.append(Unfinished(part, record, part.stat().st_size))
        except FileNotFoundError:  # finished in this moment
            continue
    return found


@contextmanager
def locked(path: Path, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Nobody else writes the file at ``path`` meanwhile. While somebody does, ``wait`` is called again and again, and
    may raise; None raises DownloadError at once."""
    from filelock import FileLock, Timeout

    # apart from the models, and never deleted: a lock that is removed can be held twice
    folder = paths.cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    lock = FileLock(folder / f"{name}.lock")
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            if wait is None:
                raise DownloadError(f"{path.name} is being downloaded by another process") from None
            wait()
    try:
        yield
    finally:
        lock.release()


def write_record(path: Path, record: Record) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(
        json.dumps({"version": _VERSION, **asdict(record)}, indent=2) + "\n", encoding="utf-8"
    )
    temporary.replace(path)
