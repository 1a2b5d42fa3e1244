"""Removing and verifying models: only tensortier's own folder is written, everything that is found is read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tensortier import gguf, library
from tensortier.errors import ModelFileError, ModelNotFound, UsageError
from tensortier.library import Located
from tensortier.modelfiles import PART, RECORD, locked, models_dir, read_record, unfinished

_CHUNK = 1 << 20
_OLLAMA_BLOB = re.compile(r"sha256-([0-9a-f]{64})")
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")  # of files in large file storage; others have git's 40 digits


@dataclass(frozen=True)
class Removal:
    """What ``remove`` would delete."""

    name: str
    files: tuple[Path, ...]  # records and beginnings included
    freed: int  # bytes of the drive


@dataclass(frozen=True)
class Check:
    """What is known of one file of a model after its verification."""

    path: str
    size: int  # bytes
    sha256: str | None  # as computed; None when there is nothing to compare it with
    expected: str | None  # SHA-256 that it should have
    expected_from: str  # who says so: "download", "Ollama", "Hugging Face"; "" when nobody does
    error: str = ""


@dataclass(frozen=True)
class Verification:
    """A model is damaged when it has an ``error``, or a file of it has."""

    name: str
    files: tuple[Check, ...]
    error: str = ""  # of the GGUF structure

    @property
    def damage(self) -> str:
        """All errors in one line; "" when there is none."""
        return "; ".join(dict.fromkeys(e for e in (self.error, *(f.error for f in self.files)) if e))


def removal(name: str) -> Removal:
    """What belongs to the model or the unfinished download ``name``: anything that ``library.locate`` takes.

    Raises UsageError for files that are not in tensortier's own folder, ModelNotFound where there is nothing.
    """
    began = _unfinished(name)
    try:
        found = library.locate(name)
    except ModelNotFound:
        if not began:
            raise
        return _removal(Path(began[0].name.removesuffix(PART)).stem, began)
    top = os.path.realpath(models_dir()) + os.sep
    for part in found.parts:
        # the link itself is what would be deleted, so only the folder's links are followed
        if not (os.path.realpath(part.parent) + os.sep).startswith(top):
            whose = (
                f"is in the folder of {found.source}" if found.source else "was not downloaded by tensortier"
            )
            raise UsageError(f"{part} {whose}: only what `tensortier models pull` fetched is removed")
    return _removal(found.name, [*found.parts, *began])


def _unfinished(name: str) -> list[Path]:
    """Beginnings that a person would call ``name``: by the file, by its path, or by owner/repo:QUANTIZATION."""
    from tensortier import hub

    given = name.removesuffix(".gguf").casefold()
    repo, _, wanted = given.partition(":")
    found = []
    for part in unfinished():
        file = Path(part.record.file)
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)
        labels = ("", hub.quantization(file.parent.name, stem).casefold(), stem.casefold())
        mine = part.record.repo.casefold() == repo and wanted in labels
        if mine or given in (stem.casefold(), file.stem.casefold()) or name == str(part.path):
            found.append(part.path)
    return found


def _removal(name: str, paths: list[Path]) -> Removal:
    files: dict[Path, int] = {}
    for path in paths:
        for file in (path, path.with_name(path.name + RECORD)):
            if file.is_symlink() or file.exists():
                info = file.lstat()
                used = min(info.st_size, getattr(info, "st_blocks", info.st_size) * 512)
                files[file] = used if info.st_nlink == 1 and not file.is_symlink() else 0
    return Removal(name, tuple(files), sum(files.values()))


def remove(what: Removal) -> None:
    """Delete it, and folders that are empty then. Raises DownloadError while one of the files is being downloaded."""
    top = models_dir()
    models = {f.with_name(f.name.removesuffix(PART)) for f in what.files if not f.name.endswith(RECORD)}
    with ExitStack() as stack:
        for model in sorted(models):
            stack.enter_context(locked(model))
        for file in what.files:
            file.unlink(missing_ok=True)
    for folder in {f.parent for f in what.files}:
        while folder != top and top in folder.parents and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def verify(model: Located, progress: Callable[[int], None] | None = None) -> Verification:
    """Read all of a model: its structure (every tensor inside of its file), and its digest where one is known from the
    download, or from the name that Ollama or the Hugging Face hub gave the file.

    ``progress`` gets the number of bytes read, again and again. Damage is in the result, not raised.
    """
    error = model.error
    if not error:
        try:
            gguf.read(model.parts[0])
        except (ModelFileError, ModelNotFound) as exc:
            error = str(exc)
    return Verification(
        model.name, tuple(_check(p, progress or (lambda _n: None)) for p in model.parts), error
    )


def size_to_read(model: Located) -> int:
    """Bytes that ``verify`` will read."""
    return sum(p.stat().st_size for p in model.parts if p.is_file() and _expected(p)[0])


def _check(path: Path, progress: Callable[[int], None]) -> Check:
    expected, by = _expected(path)
    try:
        size = path.stat().st_size
        record = read_record(path.with_name(path.name + RECORD)) if by == "download" else None
        if record is not None and size != record.size:
            wrong = f"{path.name} has {size} bytes instead of {record.size}"
            return Check(str(path), size, None, expected, by, wrong)
        found = _sha256(path, progress) if expected else None
    except OSError as exc:
        return Check(str(path), 0, None, expected, by, f"{path} cannot be read: {exc.strerror or exc}")
    error = ""
    if found != expected:
        error = f"{path.name} has SHA-256 {found} instead of {expected}"
    return Check(str(path), size, found, expected, by, error)


def _expected(path: Path) -> tuple[str | None, str]:
    """The SHA-256 that a file should have, and who says so."""
    record = read_record(path.with_name(path.name + RECORD))
    if record is not None and record.sha256:
        return record.sha256, "download"
    real = Path(os.path.realpath(path))
    if (match := _OLLAMA_BLOB.fullmatch(real.name)) and real.parent.name == "blobs":
        return match[1], "Ollama"
    if _HUB_BLOB.fullmatch(real.name) and real.parent.name == "blobs":
        return real.name, "Hugging Face"
    return None, ""


def _sha256(path: Path, progress: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()
