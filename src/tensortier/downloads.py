"""Downloads in the background, as the server and its page want them."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace

from tensortier import hub
from tensortier.errors import Cancelled, TensortierError, UsageError
from tensortier.hub import Reference
from tensortier.transfer import Download

__all__ = ["ENDED", "Download", "Manager", "State"]


@dataclass(frozen=True)
class State:
    """A download of a ``Manager``."""

    id: str
    repo: str
    file: str  # the quantization or file that was asked for, then the name of the first file
    done: int  # bytes, those of an earlier download included
    total: int  # bytes; 0 before the hub was asked
    phase: str  # "queued", "asking", "waiting", "checking", "downloading", "done", "failed", "cancelled"
    error: str = ""  # of "failed"
    path: str = ""  # of "done": the model's first file


ENDED = ("done", "failed", "cancelled")


class Manager:
    """Downloads in the background, in threads of their own, the rest in a queue. All methods from any thread."""

    def __init__(self, at_once: int = 2, longest_queue: int = 32) -> None:
        self._at_once = at_once
        self._longest = longest_queue
        self._jobs: dict[str, _Job] = {}  # in the order of their beginning
        self._queue: deque[_Job] = deque()
        self._workers: set[threading.Thread] = set()
        self._guard = threading.Lock()
        self._closed = False
        self._number = 0

    def start(self, repo: str, file: str | None = None) -> str:
        """Begin a download and return its id, or that of the same one that is under way.

        ``repo`` is anything that ``hub.parse`` takes; ``file`` is a quantization or file in it, None when ``repo``
        names it or there is only one. Raises UsageError where that makes no sense or too many are waiting; what
        the hub says against it comes as phase "failed".
        """
        reference = hub.parse(repo)
        if file:
            reference = replace(reference, wanted=file)
        with self._guard:
            if self._closed:
                raise UsageError("the program is ending, it begins no downloads")
            for job in self._jobs.values():
                if job.reference == reference and job.phase not in ENDED:
                    return job.id
            if len(self._queue) >= self._longest:
                raise UsageError(f"{self._longest} downloads are waiting already: try again later")
            self._number += 1
            job = _Job(str(self._number), reference)
            self._jobs[job.id] = job
            self._queue.append(job)
            if len(self._workers) < self._at_once:
                worker = threading.Thread(target=self._work, name="download", daemon=True)
                self._workers.add(worker)
                worker.start()
            return job.id

    def cancel(self, id: str) -> None:
        """Stop a download, or take one that has ended from the list; what has arrived is kept. Raises UsageError
        where there is no such download."""
        with self._guard:
            job = self._jobs.get(id)
            if job is None:
                raise UsageError(f"there is no download {id!r}")
            if job.phase in ENDED:
                del self._jobs[id]
                return
            if job in self._queue:
                self._queue.remove(job)
        job.cancel()

    def state(self) -> tuple[State, ...]:
        """All downloads since the beginning that were not taken from the list. Cheap."""
        with self._guard:
            return tuple(job.state() for job in self._jobs.values())

    def close(self, timeout: float = 5.0) -> None:
        """Stop all downloads and wait for their threads, each at most ``timeout`` seconds."""
        with self._guard:
            self._closed = True
            self._queue.clear()
            jobs, workers = list(self._jobs.values()), list(self._workers)
        for job in jobs:
            job.cancel()
        for worker in workers:
            worker.join(timeout)

    def _work(self) -> None:
        while True:
            with self._guard:
                if not self._queue:
                    self._workers.discard(threading.current_thread())
                    return
                job = self._queue.popleft()
            job.run()


class _Job:
    def __init__(self, id: str, reference: Reference) -> None:
        self.id = id
        self.reference = reference
        self.phase = "queued"
        self._file = reference.wanted or ""
        self._error = ""
        self._path = ""
        self._numbers = (0, 0)  # one object, so that no reader sees half of a change
        self._download: Download | None = None
        self._cancelled = threading.Event()

    def state(self) -> State:
        download, phase = self._download, self.phase
        if phase == "asking" and download is not None:
            phase = download.phase if download.phase != "done" else "downloading"
        done, total = self._numbers
        repo = self.reference.repo
        return State(self.id, repo, self._file, done, total, phase, self._error, self._path)

    def cancel(self) -> None:
        self._cancelled.set()
        if self._download is not None:
            self._download.cancel()
        if self.phase not in ENDED:
            self.phase = "cancelled"

    def run(self) -> None:
        if self._cancelled.is_set():
            return
        self.phase = "asking"
        try:
            path = self._fetch()
        except Cancelled:
            phase, path = "cancelled", ""
        except TensortierError as exc:
            phase, path, self._error = "failed", "", str(exc)
        except Exception as exc:  # a fault of ours must not end the thread that serves the others
            phase, path, self._error = "failed", "", f"{type(exc).__name__}: {exc} (this is a bug)"
        else:
            phase = "done"
        self._path = path
        self.phase = "cancelled" if self._cancelled.is_set() and phase != "done" else phase

    def _fetch(self) -> str:
        found = hub.model(self.reference.repo, self.reference.revision, self._wait)
        choice = hub.choose(found, self.reference.wanted)
        self._file = choice.files[0].name
        download = Download(found.repo, choice.files, revision=found.revision, progress=self._progress)
        self._numbers = (0, download.total)
        self._download = download
        if self._cancelled.is_set():
            raise Cancelled("cancelled")
        return str(download.run()[0])

    def _progress(self, done: int, total: int) -> None:
        self._numbers = (done, total)

    def _wait(self, seconds: float, _reason: str) -> None:
        if self._cancelled.wait(seconds):
            raise Cancelled("cancelled")
