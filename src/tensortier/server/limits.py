"""How much may go on at a time."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tensortier.server.problems import Problem

_LONGEST_RETRY = 60.0  # seconds
_WEIGHT = 0.2  # of the latest request in the mean of their durations


@dataclass(frozen=True)
class Settings:
    """What the server allows. The command line's defaults are these."""

    parallel: int = 4  # answers of one model that are computed at a time
    queue: int = 64  # that wait for this
    api_key: str | None = None
    origins: tuple[str, ...] = ()  # of other pages that may use the server; "*": all
    hosts: tuple[str, ...] | None = None  # names in the Host header; None: any
    body_bytes: int = 8 << 20  # of one request
    request_seconds: float = (
        30.0  # that its head, and then its body, may take to arrive; that nobody reads an answer
    )
    stop_seconds: float = 10.0  # that answers get to end when the server is stopped
    connections: int = 512


class Gate:
    """Counts the answers that are computed or wait, for each model."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._inside: Counter[str] = Counter()
        self._seconds = 1.0  # that an answer took, on average
        self.refused = 0

    @property
    def inside(self) -> int:
        """Of all models together."""
        return self._inside.total()

    def inside_of(self, model: str) -> int:
        return self._inside[model]

    @contextlib.contextmanager
    def enter(self, model: str, places: int = 1) -> Iterator[None]:
        """Hold ``places`` places while inside. Raises Problem: 503 when they are taken, 400 where there are fewer."""
        room = self._settings.parallel + self._settings.queue
        if places > room:
            raise Problem(400, f"this asks for {places} answers at once, and the server takes {room}")
        if self._inside[model] + places > room:
            self.refused += 1
            raise Problem(
                503,
                f"the server is busy: {self._inside[model]} answers are computed or wait already",
                code="overloaded",
                retry_after=self._retry_after(model),
            )
        self._inside[model] += places
        started = time.monotonic()
        try:
            yield
        finally:
            self._inside[model] -= places
            if not self._inside[model]:
                del self._inside[model]
            self._seconds += _WEIGHT * (time.monotonic() - started - self._seconds)

    def _retry_after(self, model: str) -> float:
        """Seconds until one of those that wait has its turn, if they all take as long as before."""
        return min(_LONGEST_RETRY, self._seconds / self._settings.parallel)
