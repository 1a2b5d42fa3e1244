"""What a caller holds of a request, and what the engine's thread knows of it."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from tensortier.errors import TensortierError
from tensortier.types import Embedding, GenerationStats, Piece, TokenLogprob

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tensortier._llama.sampling import Sampler
    from tensortier._llama.sequences import Held
    from tensortier.textstream import TextStream
    from tensortier.toolcalls import Parser

Listener = Callable[[Piece | TensortierError | None], None]


class Service(Protocol):
    """What a request needs of who serves it; callable from any thread."""

    def cancel(self, task: Task) -> None: ...

    def listen(self, task: Task, callback: Listener) -> None: ...


class Task:
    """A request on the engine's side. Only ``cancelled`` and ``outbox`` are touched by other threads."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens  # the prompt, then also what was generated
        self.n_prompt = len(tokens)
        self.number = 0  # in order of arrival
        self.cancelled = False
        self.ended = False
        self.lost = 0  # batches in a row that were given up with this request in them
        self.held: Held | None = None  # the sequence it has at the moment
        self.outbox: queue.SimpleQueue[Piece | TensortierError | None] = queue.SimpleQueue()
        self.listener: Listener | None = None
        self.stats = GenerationStats(prompt_tokens=self.n_prompt)

    def deliver(self, item: Piece | TensortierError | None) -> None:
        """An error or None is the last. A listener that fails ends its request."""
        if self.listener is None:
            self.outbox.put(item)
            return
        try:
            self.listener(item)
        except Exception:
            self.cancelled = True
            kind, value, trace = sys.exc_info()
            assert kind is not None
            threading.excepthook(threading.ExceptHookArgs((kind, value, trace, threading.current_thread())))

    def settle(self) -> None:
        """Frees what only a running request needs."""


class Generation(Task):
    """A request for text."""

    def __init__(
        self,
        tokens: list[int],
        sampler: Sampler,
        text: TextStream,
        *,
        limit: int,
        logprobs: int | None,
        parser: Parser | None,
        special: frozenset[int],
    ) -> None:
        super().__init__(tokens)
        self.sampler = sampler
        self.text = text
        self.limit = limit  # tokens to generate
        self.logprobs = logprobs
        self.parser = parser
        self.special = special  # control tokens whose names are part of the text
        self.pending: list[tuple[int, TokenLogprob]] = []  # not given out yet; where their text begins
        self.cached: int | None = None
        self.admitted: float | None = None
        self.first: float | None = None  # when the first token was chosen
        self.last = 0.0
        self.sampled = 0
        self.ended_by_token = False

    def count(self, finish_reason: str | None) -> None:
        """Brings ``stats`` up to date. ``completion_tokens`` leaves out the end-of-text token, as OpenAI's does."""
        now = time.perf_counter()
        first = self.first if self.first is not None else now
        self.stats = GenerationStats(
            prompt_tokens=self.n_prompt,
            cached_tokens=self.cached or 0,
            completion_tokens=self.sampled - (1 if self.ended_by_token else 0),
            prompt_seconds=0.0 if self.admitted is None else first - self.admitted,
            decode_seconds=max(0.0, self.last - first),
            decode_steps=max(0, self.sampled - 1),
            finish_reason=finish_reason,
        )

    def settle(self) -> None:
        self.sampler.close()


class EmbeddingTask(Task):
    """A request for a vector. ``mean``: the model does not pool, so ``sum`` becomes the mean over the tokens."""

    def __init__(self, tokens: list[int], *, mean: bool) -> None:
        super().__init__(tokens)
        self._mean = mean
        self.sum: NDArray[np.float64] | None = None

    def result(self) -> Embedding:
        """Once the request has ended without an error."""
        assert self.sum is not None
        vector = self.sum / len(self.tokens) if self._mean else self.sum
        return Embedding(tuple(vector.tolist()), len(self.tokens))


class Request:
    """An answer under way: an iterator of pieces, which computes on whether or not somebody reads.

    Iterating blocks until there is a piece, and ends with ``Cancelled``, ``ContextFull`` or ``GenerationError``
    where the request does. Dropped unread, it is cancelled.
    """

    def __init__(self, service: Service, task: Task) -> None:
        self._service = service
        self._task = task
        self._ended = False

    @property
    def stats(self) -> GenerationStats:
        """Of the request so far; final once it has ended."""
        return self._task.stats

    def cancel(self) -> None:
        """Ends it with ``Cancelled`` soon, also in the middle of a long prompt. From any thread, at any time."""
        self._service.cancel(self._task)

    def listen(self, callback: Listener) -> None:
        """Instead of iterating: ``callback`` is called on the engine's thread for each piece, then once with the error
        or with None at the end. It must not block; what it raises cancels the request."""
        self._service.listen(self._task, callback)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        if self._ended:
            raise StopIteration
        item = self._task.outbox.get()
        if isinstance(item, Piece):
            return item
        self._ended = True
        if item is None:
            raise StopIteration
        raise item

    def __del__(self) -> None:
        task = getattr(self, "_task", None)
        if task is not None and not task.ended and task.listener is None:
            self._service.cancel(task)
