"""Reading GGUF files: the header only, never the weights.

``read`` gives the ``ModelInfo`` of a whole model, ``read_header`` one file's header as it stands. Both take a
path, an ``https://`` URL, or ``hf://owner/repo/path/file.gguf`` (``hf://owner/repo@revision/...`` for another
revision than main); of a remote file only the first bytes are fetched.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from pathlib import Path

from tensortier.errors import ModelFileError, ModelNotFound
from tensortier.gguf import model
from tensortier.gguf.header import Header, LazyArray, TensorInfo, parse
from tensortier.types import ModelInfo

__all__ = ["Header", "LazyArray", "TensorInfo", "is_remote", "read", "read_header"]

_PART = re.compile(
    r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf(?P<query>\?.*)?", re.DOTALL
)
_REMOTE = ("hf://", "https://", "http://")


def read(source: str | Path) -> ModelInfo:
    """What planning needs to know of the model in ``source``.

    Any part of a split model may be given; ``ModelInfo.path`` is then the first, which llama.cpp wants.
    Raises ``ModelNotFound`` when there is no such file, ``ModelFileError`` when it (or a part) cannot be
    read as GGUF, ``RemoteError`` when a remote file cannot be reached.
    """
    header = read_header(source)
    count = _split_number(header, "split.count", 1)
    return model.build([header] if count <= 1 else _parts(header, count))


def read_header(source: str | Path) -> Header:
    """The header of one file. Raises as ``read`` does."""
    if isinstance(source, str) and is_remote(source):
        from tensortier.gguf import remote

        return remote.read_header(source)
    return _read_local(Path(source))


def is_remote(source: str) -> bool:
    """True for what ``read`` fetches over the network."""
    return source[:8].lower().startswith(_REMOTE)


def _read_bytes(data: bytes, name: str = "<memory>") -> ModelInfo:
    """``read`` for a file that is in memory; a split model is read as if its other parts were empty."""
    return model.build([parse(data, name)])


def _read_local(path: Path) -> Header:
    # O_NONBLOCK: opening a FIFO would otherwise wait for a writer.
    flags = (
        os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    )
    try:
        fd = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise ModelNotFound(f"{path}: no such file") from exc
    except ValueError as exc:
        raise ModelNotFound(f"{str(path)!r} is not a path: {exc}") from exc
    except OSError as exc:
        if path.is_dir():
            raise ModelFileError(f"{path}: a directory, not a GGUF file; name a file in it") from exc
        raise ModelFileError(f"{path}: cannot be opened: {exc.strerror}") from exc
    try:
        info = os.fstat(fd)
        if stat.S_ISDIR(info.st_mode):
            raise ModelFileError(f"{path}: a directory, not a GGUF file; name a file in it")
        if not stat.S_ISREG(info.st_mode):
            raise ModelFileError(f"{path}: not a regular file (a pipe, socket or device); name a GGUF file")
        if info.st_size == 0:
            raise ModelFileError(f"{path}: the file is empty")
        try:
            mapping = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as exc:
            raise ModelFileError(f"{path}: cannot be mapped: {exc}") from exc
    finally:
        os.close(fd)
    return parse(mapping, str(path))


def _split_number(header: Header, key: str, default: int | None = None) -> int:
    value = header.metadata.get(key, default)
    if value is None:
        raise ModelFileError(
            f"{header.source}: a part of a split model without {key!r}; split the model again"
        )
    if not isinstance(value, int) or not 0 <= value <= 0x7FFFFFFF:
        raise ModelFileError(f"{header.source}: {key!r} must be a number; the file is corrupt")
    return value


def _parts(given: Header, count: int) -> list[Header]:
    """Headers of all parts of the split model that ``given`` belongs to."""
    number = _split_number(given, "split.no")
    name = _PART.fullmatch(given.source)
    if not name or int(name["count"]) != count or int(name["number"]) != number + 1:
        raise ModelFileError(
            f"{given.source}: part {number + 1} of a model in {count} parts, but its name does not end in "
            f"-{number + 1:05d}-of-{count:05d}.gguf, so the others cannot be found; give it back its name"
        )
    sources = [f"{name['stem']}-{i + 1:05d}-of-{count:05d}.gguf{name['query'] or ''}" for i in range(count)]
    if not is_remote(given.source):
        missing = [s for s in sources if not os.path.lexists(s)]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelFileError(
                f"{missing[0]}: this part of the model is missing{more}; all {count} are needed"
            )
    headers = []
    for i, source in enumerate(sources):
        header = given if i == number else read_header(source)
        if _split_number(header, "split.no") != i or _split_number(header, "split.count", count) != count:
            raise ModelFileError(
                f"{source}: not part {i + 1} of {count} as its name says; the parts are mixed up"
            )
        headers.append(header)
    found = sum(len(h.tensors) for h in headers)
    expected = _split_number(headers[0], "split.tensors.count")
    if found != expected:
        raise ModelFileError(
            f"{sources[0]}: its parts hold {found} tensors instead of {expected}; download it again"
        )
    return headers
