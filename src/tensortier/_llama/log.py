"""llama.cpp's messages: kept in a short memory, printed only when asked, and read for the reason of a failure."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

LEVEL_WARN = 3  # ggml_log_level: 1 debug, 2 info, 3 warning, 4 error, 5 continuation of the last line
LEVEL_ERROR = 4
LEVEL_CONTINUE = 5

_OUT_OF_MEMORY = re.compile(
    r"unable to allocate|failed to allocate|out of memory|cannot allocate|not enough memory|OutOfDeviceMemory"
    r"|alloc_tensor_range|cudaMalloc failed",
    re.IGNORECASE,
)
_PREFIX = re.compile(r"^(?:[\w:~]+: )+(?:error loading model: |error: )?")


class _Log:
    def __init__(self) -> None:
        # Reentrant: a garbage collection inside it may free a model, which logs.
        self.lock = threading.RLock()
        self.lines: deque[tuple[int, int, str]] = deque(maxlen=400)  # number, level, text
        self.count = 0
        self.partial = ""
        self.level = 0
        self.verbose = False

    def add(self, level: int, text: str) -> None:
        if self.verbose:
            sys.stderr.write(text)
        with self.lock:
            if level != LEVEL_CONTINUE:
                self.level = level
            *whole, self.partial = (self.partial + text).split("\n")
            for line in whole:
                if line.strip():
                    self.count += 1
                    self.lines.append((self.count, self.level, line.strip()))


_log = _Log()
_callback: Any = None  # kept alive: llama.cpp holds a pointer to it


def install(bindings: Any) -> None:
    """Takes llama.cpp's log away from the bindings, which print it."""
    global _callback

    def receive(level: int, text: bytes, _user_data: Any) -> None:
        _log.add(level, text.decode(errors="replace"))

    _callback = bindings.llama_log_callback(receive)
    bindings.llama_log_set(_callback, None)


def set_verbose(verbose: bool) -> None:
    """Whether messages are also written to standard error."""
    _log.verbose = verbose


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Keeps what C code writes to the process's standard error; the lines are there when the block is left.

    For the few messages that llama.cpp prints around its log. For the shortest time possible: what other
    threads write meanwhile is kept too.
    """
    lines: list[str] = []
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error, so nothing can get there
        yield lines
        return
    # A file, not a pipe: a process that another thread starts meanwhile keeps this end open as long as it lives.
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines.extend(line.strip() for line in file.read().decode(errors="replace").splitlines())


class Recording:
    """The last lines logged since it was made, by every thread."""

    def __init__(self) -> None:
        self._start = _log.count

    def lines(self, at_least: int = LEVEL_WARN) -> list[str]:
        with _log.lock:
            return [line for n, level, line in _log.lines if n > self._start and level >= at_least]

    @property
    def out_of_memory(self) -> bool:
        return any(_OUT_OF_MEMORY.search(line) for line in self.lines())

    def reason(self, default: str) -> str:
        """The most telling error line without its prefixes: of a failed allocation if there was one, else the
        first error, which the later ones only follow from."""
        errors = self.lines(LEVEL_ERROR)
        memory = [line for line in self.lines() if _OUT_OF_MEMORY.search(line)]
        chosen = (memory or errors or [default])[0]
        return _PREFIX.sub("", chosen).strip() or default
