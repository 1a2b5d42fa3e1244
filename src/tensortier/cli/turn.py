"""One at a time: what ``tensortier.turn`` is for, at the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tensortier.cli.common import note
from tensortier.turn import Turn


@contextlib.contextmanager
def loading_turn(*, quiet: bool = False) -> Iterator[None]:
    """Waits until no other process of this user is inside, and says so. The system ends it with the process."""
    turn = Turn()

    def waiting() -> None:
        if not quiet:
            note("waiting for another tensortier that is loading a model ...")

    try:
        turn.take(waiting)
        yield
    finally:
        turn.end()
