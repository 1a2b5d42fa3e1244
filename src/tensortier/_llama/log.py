"""llama.cpp's messages: kept in a short memory, printed only when asked, and read for the reason of a failure."""

from __future__ import annotations

import re
import sys
import threading
from collections import deque
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
        self.lock = threading.Lock()
        self.lines: deque[tuple[int, str]] = deque(maxlen=400)
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
                    self.lines.append((self.level, line.strip()))


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


class Recording:
    """The lines logged since it was made. One at a time: making another forgets the lines so far."""

    def __init__(self) -> None:
        with _log.lock:
            _log.lines.clear()

    def lines(self, at_least: int = LEVEL_WARN) -> list[str]:
        with _log.lock:
            return [line for level, line in _log.lines if level >= at_least]

    def all_lines(self) -> list[str]:
        with _log.lock:
            return [line for _, line in _log.lines]

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
