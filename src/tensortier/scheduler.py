"""One thread that computes all requests of a model together: every sequence that generates has a token in each batch,
prompts come in micro-batch-sized pieces, in turn.

Requests beyond the number of sequences wait, first come first served. The cells of the KV cache are shared: where
they run out, kept prefixes of ended requests go first, then the newest request goes back to waiting; what it has
generated is computed again later.
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from tensortier._llama import log
from tensortier._llama.loaded import POOLING_NONE, Loaded
from tensortier._llama.sampling import logprob
from tensortier._llama.sequences import Batch, Held, Outcome, Sequences
from tensortier.errors import Cancelled, ContextFull, GenerationError, TensortierError
from tensortier.request import EmbeddingTask, Generation, Listener, Task
from tensortier.types import Activity, Piece

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_HEADROOM = 32  # cells that each sequence must still have when another one is let in
_RATE_SECONDS = 1.0
_PATIENCE = 8  # batches that a prompt may lose to others that go
_KEPT_SHARE = 0.5  # of a kept sequence, to go on with it rather than with a copy of its beginning


class Scheduler:
    """Serves requests until ``close``.

    Args:
        loaded: model and context; only this thread computes with it.
        abort: makes llama.cpp give up the batch under way, until called with False.
        take_error: why weights on the drive could not be read, once; empty if they could.
        at_end: called on the thread when it ends.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        abort: Callable[[bool], None],
        take_error: Callable[[], str],
        at_end: Callable[[], None],
    ) -> None:
        self._loaded = loaded
        self._abort = abort
        self._take_error = take_error
        self._at_end = at_end
        self._sequences = Sequences(loaded)
        self._batch = Batch(loaded.n_batch)
        self._free: list[Held] = list(self._sequences.all)  # the longest unused first
        self._active: list[Task] = []  # in order of arrival
        self._waiting: list[Task] = []  # in order of arrival
        self._full = False  # somebody was sent back: nobody is let in before somebody ends
        self._turn = 0  # whose prompt comes next
        self._embedded_last = False
        # A lock that its thread may take again: the garbage collector may drop a Request anywhere.
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._arrived: deque[Task] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._arrivals = 0
        self._computing: tuple[Task, ...] = ()
        self._owed = False  # others have lost the latest batch to somebody who went
        self._closing = False
        self._prompt_total = 0
        self._completion_total = 0
        self._recent: deque[tuple[float, int]] = deque()  # when, how many tokens
        self._thread = threading.Thread(target=self._run, name="tensortier-engine", daemon=True)
        self._thread.start()

    # --- from any thread

    def submit(self, task: Task) -> None:
        """Raises GenerationError once closed."""
        with self._lock:
            if self._closing:
                raise GenerationError("the engine is closed")
            self._arrivals += 1
            task.number = self._arrivals
            self._arrived.append(task)
            self._wake.notify()

    def cancel(self, task: Task) -> None:
        with self._lock:
            task.cancelled = True
            self._interrupt()
            self._wake.notify()

    def cancel_all(self) -> None:
        with self._lock:
            for task in (*self._arrived, *self._waiting, *self._active):
                task.cancelled = True
            self._interrupt()
            self._wake.notify()

    def listen(self, task: Task, callback: Listener) -> None:
        def start() -> None:
            task.listener = callback
            while not task.outbox.empty():
                task.deliver(task.outbox.get())

        with self._lock:
            if not self._closing:
                self._calls.append(start)
                self._wake.notify()
                return
        if threading.current_thread() is not self._thread:
            self._thread.join()
        start()

    def activity(self) -> Activity:
        now = time.perf_counter()
        with self._lock:
            recent = sum(n for when, n in self._recent if now - when <= _RATE_SECONDS)
            return Activity(
                active=len(self._active),
                waiting=len(self._waiting) + len(self._arrived),
                prompt_tokens_total=self._prompt_total,
                completion_tokens_total=self._completion_total,
                decode_tokens_per_second=recent / _RATE_SECONDS,
                kv_used_cells=self._sequences.used,
                n_ctx=self._loaded.n_ctx,
            )

    def close(self) -> None:
        """Ends all requests with Cancelled, and the thread. Waits for that, but not in the thread itself."""
        with self._lock:
            self._closing = True
            self._interrupt()
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _interrupt(self) -> None:
        """Has llama.cpp give up the batch under way where that is worth it: nobody wants it any more, or it holds
        the prompt of somebody who has gone. What others lose of it is computed again; a prompt that has lost often is
        left alone once, or clients that come and go would stop it for good. A recurrent state cannot be computed
        again short of its beginning, so there the others' wish goes first."""
        tasks = self._computing
        if not tasks:
            return
        gone = [task for task in tasks if task.cancelled]
        patient = any(task.lost >= _PATIENCE and not task.cancelled for task in tasks)
        dear = patient or self._loaded.recurrent or self._loaded.hybrid
        long = any(_pending(task) > 1 for task in gone) and not dear
        if self._closing or len(gone) == len(tasks) or long:
            self._abort(True)

    # --- the thread

    def _run(self) -> None:
        last: TensortierError = Cancelled("the engine was closed")
        try:
            while self._take_in():
                self._step()
        except BaseException as exc:  # a defect: nobody may be left waiting
            last = GenerationError(f"the engine failed: {exc}")
            raise
        finally:
            with self._lock:
                self._closing = True
            self._end_all(last)
            self._at_end()

    def _take_in(self) -> bool:
        """Waits for work and takes note of what has come. False when closing."""
        with self._lock:
            while not (self._closing or self._active or self._waiting or self._arrived or self._calls):
                self._wake.wait()
            if self._closing:
                return False
            while self._arrived:
                insort(self._waiting, self._arrived.popleft(), key=_number)
            calls = tuple(self._calls)
            self._calls.clear()
        for call in calls:
            call()
        for task in [t for t in (*self._active, *self._waiting) if t.cancelled]:
            self._end(task, Cancelled("the answer was cancelled"))
        self._admit()
        return True

    def _step(self) -> None:
        embeddings = [task for task in self._active if isinstance(task, EmbeddingTask)]
        generations = [task for task in self._active if isinstance(task, Generation)]
        if embeddings and not (generations and self._embedded_last):
            self._embedded_last = True
            self._compute(self._plan_embeddings(embeddings))
        elif generations:
            self._embedded_last = False
            self._compute(self._plan(generations))

    # --- who gets a sequence

    def _admit(self) -> None:
        if self._full and self._active:
            return
        self._full = False
        while self._waiting and self._free:
            task = self._waiting[0]
            held = self._place(task)
            if held is None:
                return
            with self._lock:
                self._waiting.pop(0)
                task.held = held
                insort(self._active, task, key=_number)
            if isinstance(task, Generation) and task.admitted is None:
                task.admitted = time.perf_counter()
                task.cached = len(held.tokens)
                task.count(None)

    def _place(self, task: Task) -> Held | None:
        """A sequence with as much of the request as is already computed, or None where it does not fit yet."""
        wanted = task.tokens[:-1]  # the last one is computed in any case, for its logits
        if isinstance(task, EmbeddingTask):
            wanted = []
        best, target = self._free[0], None
        longest = 0
        for held in self._sequences.all:
            n = self._sequences.reusable(held, held.common(wanted))
            if n > longest:
                longest, best = n, held
        if longest and best in self._free and longest >= _KEPT_SHARE * len(best.tokens):
            target = best
        gained = 0 if target is None else len(target.tokens) - longest
        if not self._make_room(len(task.tokens) - longest - gained, spare=best if longest else None):
            return None
        if target is None:
            empty = [held for held in self._free if not held.tokens]
            target = (
                empty[0] if empty else next((held for held in self._free if held is not best), self._free[0])
            )
            if target is best:  # the only free one: it keeps what is common
                self._sequences.keep(target, longest)
            else:
                self._sequences.clear(target)
                self._sequences.copy(best, target, longest)
        else:
            self._sequences.keep(target, longest)
        self._free.remove(target)
        return target

    def _make_room(self, cells: int, spare: Held | None) -> bool:
        """Whether so many more cells are free besides what the active ones will need; forgets kept prefixes, the
        longest unused first, until it is so."""
        if self._loaded.recurrent:
            return True  # a state has one cell, however long the text
        others = [task for task in self._active if task.held is not None]
        promised = sum(_pending(task) for task in others) + _HEADROOM * len(others)
        free = self._loaded.n_ctx - self._sequences.used - promised
        kept = [held for held in self._free if held is not spare and held.tokens]
        while free < cells and kept:
            before = self._sequences.used
            self._sequences.clear(kept.pop(0))
            free += before - self._sequences.used
        return free >= cells or not others

    # --- batches

    def _plan(self, tasks: list[Generation]) -> list[tuple[Task, int]]:
        """(request, number of tokens) of the next batch."""
        room = min(self._loaded.n_batch, max(self._loaded.n_ubatch, len(tasks)))
        ready = [task for task in tasks if _pending(task) == 1]
        prompts = [task for task in tasks if _pending(task) > 1]
        if self._owed and ready:
            prompts = []  # first what was lost and takes little time
        parts: list[tuple[Task, int]] = [(task, 1) for task in ready]
        room -= len(parts)
        self._turn += 1
        for i in range(len(prompts)):
            task = prompts[(self._turn + i) % len(prompts)]
            n = min(room, _pending(task))
            if n <= 0:
                break
            parts.append((task, n))
            room -= n
        return parts

    def _plan_embeddings(self, tasks: list[EmbeddingTask]) -> list[tuple[Task, int]]:
        """Whole texts where the model pools them itself: it pools what is in one micro-batch."""
        room = self._loaded.n_ubatch
        parts: list[tuple[Task, int]] = []
        for task in tasks:
            pending = _pending(task)
            n = min(room, pending)
            if n == pending or (n > 0 and self._loaded.pooling == POOLING_NONE):
                parts.append((task, n))
                room -= n
        return parts

    def _compute(self, parts: list[tuple[Task, int]]) -> None:
        embeds = isinstance(parts[0][0], EmbeddingTask)
        self._batch.clear()
        rows = []
        for task, n in parts:
            assert task.held is not None
            done = len(task.held.tokens)
            last = done + n == len(task.tokens)
            rows.append(self._batch.add(task.held, task.tokens[done : done + n], output=last, every=embeds))
        with self._lock:
            self._computing = tuple(task for task, _ in parts)
            if self._closing or any(task.cancelled for task in self._computing):
                self._computing = ()
                return  # the next round takes note of it first
        record = log.Recording()
        vectors: list[NDArray[np.float64]] = []
        if embeds:
            outcome, vectors = self._sequences.embed(self._batch)
        else:
            outcome = self._sequences.compute(self._batch)
        with self._lock:
            self._computing = ()
            self._abort(False)
        self._owed = outcome is Outcome.ABORTED
        for task, _ in parts:
            task.lost = task.lost + 1 if self._owed else 0
        if outcome is Outcome.DONE:
            for i, (task, n) in enumerate(parts):
                if isinstance(task, EmbeddingTask):
                    task.sum = vectors[i] if task.sum is None else task.sum + vectors[i]
                    self._finish_embedding(task, n)
                elif isinstance(task, Generation):
                    self._advance(task, rows[i], n)
        elif outcome is Outcome.NO_CELLS:
            self._give_way([task for task, _ in parts])
        else:
            told = self._take_error()
            if outcome is Outcome.FAILED and not told:
                told = f"llama.cpp failed while it computed: {record.reason('it gave no reason')}"
            for task, _ in parts if told else ():
                if not task.cancelled:
                    self._end(task, GenerationError(told))

    def _give_way(self, tasks: list[Task]) -> None:
        """There were no cells: somebody must go, first who has ended, then the newest."""
        for held in self._free:
            if held.tokens:
                self._sequences.clear(held)
                return
        if len(self._active) > 1:
            newest = self._active[-1]
            left = self._leave(newest)
            if left is not None:
                self._sequences.clear(left)
            with self._lock:
                insort(self._waiting, newest, key=_number)
            self._full = True
            return
        for task in tasks:
            if isinstance(task, Generation) and task.first is not None:
                self._conclude(task, "length")
            else:
                self._end(task, ContextFull("the KV cache is full; raise --context or shorten the prompt"))

    def _leave(self, task: Task) -> Held | None:
        """Takes a request's sequence away; what that holds is kept for the next one with the same beginning."""
        held, task.held = task.held, None
        with self._lock:
            if task in self._active:
                self._active.remove(task)
            if task in self._waiting:
                self._waiting.remove(task)
        if held is not None:
            self._free.append(held)
        return held

    # --- tokens

    def _advance(self, task: Generation, row: int, computed: int) -> None:
        """After a batch with this request's tokens in it: the next one, if those were the last of its prompt."""
        if task.first is None:
            with self._lock:
                self._prompt_total += computed
        assert task.held is not None
        if len(task.held.tokens) < len(task.tokens) or task.cancelled:
            return
        try:
            token = task.sampler.sample(row)
        except TensortierError as exc:
            self._end(task, exc)
            return
        task.last = time.perf_counter()
        if task.first is None:
            task.first = task.last
        task.sampled += 1
        if self._loaded.ends(token):
            task.ended_by_token = True
            self._conclude(task, "stop")
            return
        with self._lock:
            self._completion_total += 1
            self._recent.append((task.last, 1))
            while task.last - self._recent[0][0] > _RATE_SECONDS:
                self._recent.popleft()
        if task.logprobs is not None:
            task.pending.append((task.text.seen, logprob(self._loaded, row, token, task.logprobs)))
        task.tokens.append(token)
        text = task.text.feed(self._loaded.piece(token, token in task.special))
        if task.text.stopped:
            self._give(task, text)
            self._conclude(task, "stop")
        elif task.sampled >= task.limit:
            self._give(task, text)
            self._conclude(task, "length")
        else:
            task.count(None)
            self._give(task, text)

    def _give(self, task: Generation, text: str) -> None:
        pieces = [Piece(text)] if text else []
        if task.parser is not None:
            pieces = task.parser.feed(text)
        self._deliver(task, pieces)

    def _deliver(self, task: Generation, pieces: list[Piece]) -> None:
        for i, piece in enumerate(pieces):
            if i == 0 and task.pending:
                due = [entry for begin, entry in task.pending if begin < task.text.given]
                del task.pending[: len(due)]
                piece = Piece(piece.text, piece.finish_reason, piece.delta, tuple(due))
            task.deliver(piece)

    def _conclude(self, task: Generation, reason: str) -> None:
        text = task.text.finish()
        pieces = [Piece(text)] if text else []
        if task.parser is not None:
            pieces = [*task.parser.feed(text), *task.parser.finish()]
            if task.parser.called and reason == "stop":
                reason = "tool_calls"
        self._deliver(task, pieces)
        rest = () if task.text.stopped else tuple(entry for _, entry in task.pending)
        task.count(reason)
        task.deliver(Piece("", reason, None, rest))
        self._end(task, None)

    def _finish_embedding(self, task: EmbeddingTask, computed: int) -> None:
        with self._lock:
            self._prompt_total += computed
        if task.held is not None and len(task.held.tokens) == len(task.tokens):
            held = self._leave(task)
            if held is not None:
                self._sequences.clear(held)  # nobody goes on from it
            self._end(task, None)

    def _end(self, task: Task, error: TensortierError | None) -> None:
        self._leave(task)
        self._full = False
        task.ended = True
        if error is not None and isinstance(task, Generation):
            task.count(None)
        task.settle()
        task.deliver(error)

    def _end_all(self, error: TensortierError) -> None:
        with self._lock:
            tasks = [*self._active, *self._waiting, *self._arrived]
            self._arrived.clear()
            calls = tuple(self._calls)
            self._calls.clear()
        for call in calls:
            call()
        for task in tasks:
            self._end(task, error)


def _pending(task: Task) -> int:
    """Tokens of a request that are still to be computed."""
    return len(task.tokens) - (0 if task.held is None else len(task.held.tokens))


def _number(task: Task) -> int:
    return task.number
