"""One thread that owns the engine, so that the main thread is always free to take a Ctrl-C.

Python runs signal handlers in the main thread only, between two bytecodes: while a thread sits inside
llama.cpp for seconds, nothing else would see the signal. All engine calls run in the same worker, because
OpenMP keeps a team of threads per calling thread.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.1
EXIT_INTERRUPTED = 130


class _End:
    """The last thing a job puts into its queue; ``error`` is what it raised."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Job(Generic[T]):
    def __init__(self, source: Callable[[], Iterable[T]]) -> None:
        self.source = source
        self.results: queue.SimpleQueue[T | _End] = queue.SimpleQueue()

    def work(self) -> None:
        try:
            for item in self.source():
                self.results.put(item)
        except BaseException as exc:  # carried over to the thread that waits, which raises it
            self.results.put(_End(exc))
        else:
            self.results.put(_End(None))


class EngineThread:
    """Runs jobs one after another in a thread of its own."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job[object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.work()

    def stream(self, source: Callable[[], Iterable[T]], cancel: Callable[[], None]) -> Iterator[T]:
        """Yield what ``source()`` yields, computed in the worker; raise what it raises.

        Ctrl-C calls ``cancel``, which must make the source end soon (normally by raising Cancelled); it is
        called again while the source goes on, since the first call can come before the source has begun. A
        second Ctrl-C ends the process at once. A consumer that stops early cancels too, and waits.
        """
        job: _Job[T] = _Job(source)
        cancelled = threading.Event()
        finished = False
        with _interrupts(cancelled):
            self._jobs.put(job)  # type: ignore[arg-type]
            try:
                while True:
                    try:
                        item = job.results.get(timeout=_POLL_SECONDS)
                    except queue.Empty:
                        if cancelled.is_set():
                            cancel()
                        continue
                    if isinstance(item, _End):
                        finished = True
                        if item.error is not None:
                            raise item.error
                        return
                    if cancelled.is_set():
                        cancel()
                    yield item
            finally:
                while not finished:
                    cancel()
                    try:
                        finished = isinstance(job.results.get(timeout=_POLL_SECONDS), _End)
                    except queue.Empty:
                        continue

    def call(self, function: Callable[[], T], cancel: Callable[[], None]) -> T:
        """The result of ``function()``, computed in the worker, with the same rules as ``stream``."""
        (result,) = self.stream(lambda: (function(),), cancel)
        return result

    def close(self) -> None:
        """End the thread after the jobs that it has."""
        self._jobs.put(None)
        self._thread.join()


@contextmanager
def _interrupts(event: threading.Event) -> Iterator[None]:
    """Turn the first Ctrl-C inside the block into ``event``, the second into the end of the process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers can only be set, and only run, in the main thread
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        if event.is_set():
            # The worker is stuck inside native code: an orderly exit would wait for it.
            sys.stderr.write("\ntensortier: error: interrupted twice, ended at once\n")
            sys.stderr.flush()
            os._exit(EXIT_INTERRUPTED)
        event.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
