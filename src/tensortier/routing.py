"""Routing traces: which experts a model used, token by token, in a file that says of which model it is.

A trace is little-endian int32. It is made of records ``layer's number among those with experts, tokens, experts
each token uses, ids``, as the native store writes them (``tt_tier_trace``). Ahead of them stand records of no ids, one
for each number of the header: ``0, number, 0``. So whoever knows only records reads the file all the same.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tensortier import planid
from tensortier.errors import UsageError
from tensortier.types import ModelInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MAGIC, _VERSION = 0x31525454, 1  # "TTR1"
_NUMBERS = 11  # of the header ahead of the layers
_WORDS = 4  # of them that identify the model
_BYTES = 4
_MOST = 2**31 - 1
_MOST_EXPERTS = 1 << 16  # of a layer; the largest models have hundreds


@dataclass(frozen=True, eq=False)
class Trace:
    """The routing of one run."""

    layers: tuple[int, ...]  # with experts, as the model counts them
    experts: int  # of each layer
    used: int  # by a token in each layer
    tokens: int
    model: tuple[int, ...]  # fingerprint of the model's tensors
    records: NDArray[np.int32]  # as ``tier.read_trace`` and ``tier.replay`` take them

    @property
    def shape(self) -> tuple[int, int]:
        """(layers with experts, experts of each)"""
        return len(self.layers), self.experts

    def passes(self) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """(layer's number among those with experts, ids of the experts that its tokens use) of each pass."""
        at = 0
        while at < self.records.size:
            group, tokens, used = (int(number) for number in self.records[at : at + 3])
            yield group, self.records[at + 3 : at + 3 + tokens * used]
            at += 3 + tokens * used


def fingerprint(model: ModelInfo) -> tuple[int, ...]:
    """What a trace remembers of its model: ``planid.of_model`` in numbers of 31 bits."""
    digest = planid.of_model(model).rpartition("sha256:")[2]
    return tuple(int(digest[8 * i : 8 * i + 8], 16) & _MOST for i in range(_WORDS))


def publish(
    records: Path, target: Path, model: ModelInfo, layers: tuple[int, ...], experts: int, used: int
) -> Trace:
    """Makes the file ``target`` of the records that the native store wrote to ``records``, whole or not at all;
    ``target`` is replaced. Returns what was written.

    Raises:
        UsageError: ``records`` holds no routing of such a model.
        OSError: ``target`` cannot be written.
    """
    import numpy as np

    numbers = np.fromfile(records, dtype="<i4")
    tokens = _check(numbers, len(layers), experts, str(records))
    if tokens == 0:
        raise UsageError("no token was routed: the model computed nothing with experts on the drive")
    trace = Trace(layers, experts, used, tokens, fingerprint(model), numbers)
    head = [_MAGIC, _VERSION, len(layers), experts, used, tokens, numbers.size, *trace.model, *layers]
    with _becoming(target) as file:
        file.write(np.array([(0, number, 0) for number in head], dtype="<i4").tobytes())
        with records.open("rb") as source:
            shutil.copyfileobj(source, file)
    return trace


@contextlib.contextmanager
def _becoming(target: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``target`` at the end, unless that is an exception. Where the system can do so it
    has no name until then, so that nothing stays of a process that is killed."""
    part = target.with_name(f".tensortier-trace-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with _unnamed(target.parent) or part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not part.exists():
                _name(file, part)
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _unnamed(folder: Path) -> BinaryIO | None:
    """A file in ``folder`` that has no name yet; None where the system or the drive has no such files."""
    flag = getattr(os, "O_TMPFILE", 0)
    if not flag or not Path("/proc/self/fd").exists():
        return None
    try:
        return os.fdopen(os.open(folder, flag | os.O_RDWR, 0o666), "w+b")
    except OSError:
        return None


def _name(file: BinaryIO, path: Path) -> None:
    """Gives a name to a file that has none."""
    folder = os.open(path.parent, os.O_RDONLY)  # with a folder the link of /proc is followed
    try:
        os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def read(path: str | Path) -> Trace:
    """A trace from its file.

    Raises:
        UsageError: the file is not there, is no trace, or is not whole.
    """
    import numpy as np

    no_trace = f"{path} is not a routing trace of 'tensortier trace'"
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = _head(file.read(3 * _BYTES * _NUMBERS))
            if not head or head[0] != _MAGIC:
                raise UsageError(no_trace)
            if len(head) > 1 and head[1] != _VERSION:
                raise UsageError(
                    f"{path} is a trace of version {head[1]}; this program reads version {_VERSION}"
                )
            if len(head) < _NUMBERS:
                raise UsageError(f"{path} was cut off: its header is not whole")
            groups, experts, used, tokens, count = head[2:7]
            expected = _BYTES * (3 * (_NUMBERS + groups) + count)
            if size != expected:
                what = "was cut off" if size < expected else "has something behind its end"
                raise UsageError(f"{path} {what}: {size} bytes instead of {expected}")
            layers = _head(file.read(3 * _BYTES * groups))
            records = np.fromfile(file, dtype="<i4", count=count)
    except OSError as exc:
        raise UsageError(f"cannot read the trace {path}: {exc.strerror}") from exc
    if not 0 < used <= experts <= _MOST_EXPERTS or not groups or len(layers) != groups:
        raise UsageError(f"{path} is damaged: its header makes no sense")
    if _check(records, groups, experts, str(path)) != tokens or tokens == 0:
        raise UsageError(f"{path} is damaged: its header speaks of {tokens} tokens")
    return Trace(layers, experts, used, tokens, tuple(head[7:_NUMBERS]), records)


def check_model(trace: Trace, model: ModelInfo) -> None:
    """Raises UsageError where the trace was recorded with another model."""
    if trace.model != fingerprint(model):
        raise UsageError(
            f"the trace was recorded with another model than {model.path}: one with {len(trace.layers)} layers of "
            f"{trace.experts} experts; the tensors differ in names, types or shapes"
        )


def _head(data: bytes) -> tuple[int, ...]:
    """The numbers of records of no ids, up to the first that is something else."""
    import numpy as np

    whole = len(data) // (3 * _BYTES)
    rows = np.frombuffer(data, dtype="<i4", count=3 * whole).reshape(-1, 3)
    numbers: list[int] = []
    for group, number, used in rows.tolist():
        if group or used or number < 0:
            break
        numbers.append(number)
    return tuple(numbers)


def _check(records: NDArray[np.int32], groups: int, experts: int, name: str) -> int:
    """The number of tokens, that of the layer with the most: llama.cpp leaves out tokens of the last layer that
    nobody asked the result of. Raises UsageError for records that do not fit."""
    at = 0
    counts = [0] * groups
    while at < records.size:
        group, tokens, used = (int(n) for n in records[at : at + 3]) if at + 3 <= records.size else (-1, 0, 0)
        end = at + 3 + tokens * used
        if not 0 <= group < groups or tokens < 0 or not 0 <= used <= experts or end > records.size:
            raise UsageError(f"{name} is damaged: a record does not fit {groups} layers of {experts} experts")
        ids = records[at + 3 : end]
        if ids.size and not 0 <= ids.min() <= ids.max() < experts:
            raise UsageError(f"{name} is damaged: it names an expert that the model does not have")
        counts[group] += tokens
        at = end
    return max(counts)
