"""One at a time: programs that fill RAM on purpose, each with what the others leave, plan and load in turn."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from tensortier import paths
from tensortier.cli.common import note


@contextlib.contextmanager
def loading_turn(*, quiet: bool = False) -> Iterator[None]:
    """Waits until no other process of this user is inside, and says so. The system ends it with the process.

    Where the cache cannot be written, and on Windows, nobody waits: two that plan at the same moment then count the
    same free RAM, as they would without this.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    path = paths.cache_dir() / "loading.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not quiet:
                note("waiting for another tensortier that is loading a model ...")
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
