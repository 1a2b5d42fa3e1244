"""One at a time: programs that fill memory on purpose, each with what the others leave, plan and load in turn.

The turn is a lock on a file in the cache folder, so it is among the processes of one user, and the system ends it with
the process that holds it, however that ends. Where the cache cannot be written, on file systems without locks and on
Windows nobody waits: two that plan at the same moment then count the same free memory, as they would without this.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import IO

from tensortier import paths
from tensortier.errors import Cancelled

FILE = "loading.lock"  # in the cache folder
_POLL_SECONDS = 0.1


class Turn:
    """Of this process, or of one part of it: two in one process wait for each other too. Not for several threads at a
    time."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None

    def take(self, waiting: Callable[[], None], stop: threading.Event | None = None) -> None:
        """Wait until nobody else has the turn, and hold it. ``waiting`` is called once, where somebody has it.

        Raises:
            Cancelled: ``stop`` was set meanwhile; the turn is not held.
        """
        stop = threading.Event() if stop is None else stop
        if self.try_take():
            return
        waiting()
        while not stop.wait(_POLL_SECONDS):
            if self.try_take():
                return
        raise Cancelled("waiting for another tensortier to finish loading was ended")

    def try_take(self) -> bool:
        """Hold the turn, unless somebody else has it."""
        if sys.platform == "win32":
            return True
        import fcntl

        self.end()
        path = paths.cache_dir() / FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")  # not inherited by programs that this one starts
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.end()
            return False
        except OSError:
            self.end()  # there are no locks here
        return True

    def end(self) -> None:
        """Let the next one in. Nothing where the turn is not held."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # of a network drive that is gone: the lock is too
                file.close()
