"""Moments in the work of an engine, for tests that must not depend on which thread runs when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
import pytest

from tensortier._llama.sequences import Batch, Outcome, Sequences
from tensortier.engine import Engine, Request
from tensortier.errors import TensortierError
from tensortier.types import Piece

# An answer that no end is allowed in: it goes on until the context is full or somebody cancels it.
ENDLESS = "root ::= [a-z] root"


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """For what must come: the time is a bound against hanging only."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def together(engine: Engine) -> Iterator[None]:
    """Requests made in the block arrive at once, however long it takes to make them: the engine begins nothing
    meanwhile."""
    with engine._scheduler._lock:
        yield


class Heard:
    """What a request's listener is told. ``at`` says what is done, on the engine's thread, when so many pieces have
    come, ``last`` when it has ended: nothing is computed before that is done."""

    def __init__(
        self,
        request: Request,
        at: dict[int, Callable[[], object]] | None = None,
        last: Callable[[], object] = lambda: None,
    ) -> None:
        self.pieces: list[Piece] = []
        self.error: TensortierError | None = None
        self.ended = threading.Event()
        self._at = at or {}
        self._last = last
        self.request = request
        request.listen(self._hear)

    def _hear(self, item: Piece | TensortierError | None) -> None:
        if isinstance(item, Piece):
            self.pieces.append(item)
            self._at.get(len(self.pieces), lambda: None)()
        else:
            self.error = item
            self._last()
            self.ended.set()

    def wait(self) -> list[Piece]:
        """All pieces; raises what the request ended with."""
        assert self.ended.wait(300)
        if self.error is not None:
            raise self.error
        return self.pieces


class Batches:
    """What was computed while it was recorded: the outcome and the number of tokens of each batch. ``before`` is called
    with the number of tokens, on the engine's thread, before a batch is computed."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object] | None = None
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.sizes: list[int] = []
        compute = Sequences.compute

        def recorded(sequences: Sequences, batch: Batch) -> Outcome:
            if before is not None:
                before(batch.rows)
            outcome = compute(sequences, batch)
            self.sizes.append(batch.rows)
            self.outcomes.append(outcome)
            return outcome

        monkeypatch.setattr(Sequences, "compute", recorded)


class Operations:
    """Counts how often llama.cpp asks whether to go on, which it does before each operation of a batch; the
    ``limit``-th time, ``then`` is called, and it goes on only if the engine says so."""

    def __init__(self, engine: Engine) -> None:
        self.asked = 0
        self.limit = 0
        self.then: Callable[[], object] = lambda: None
        parameters = engine._parameters

        @llama_cpp.ggml_abort_callback
        def ask(_: Any) -> bool:
            self.asked += 1
            if self.asked == self.limit:
                self.then()
            return bool(parameters._flag.value)

        self._ask = ask
        llama_cpp.llama_set_abort_callback(engine._loaded.context, ask, None)
