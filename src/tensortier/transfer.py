"""Downloads from the hub: they go on where they were broken off, and count only when their digest is right.

A file arrives as ``NAME.part`` beside its place, with ``NAME.part.json`` that says of what it is the beginning.
When all of it is there and its digest is the hub's, it gets its name, and ``NAME.json`` keeps the digest for
``tensortier models verify``. So a file under its final name is complete.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import quote

from tensortier import hub, web
from tensortier.errors import Cancelled, DownloadError, RemoteError
from tensortier.explain import readable_size
from tensortier.hub import HubFile
from tensortier.modelfiles import (
    PART,
    RECORD,
    Record,
    locked,
    models_dir,
    read_record,
    room,
    target,
    write_record,
)

MARGIN = 32 << 20  # bytes of the drive that stay free
RETRY_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before another attempt while nothing arrives
LONGEST_WAIT = 300.0  # seconds that a busy server may ask for
_PROGRESS_MADE = 1 << 20  # bytes after which the attempts are counted anew
_CHUNK = 1 << 20

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
Progress = Callable[[int, int], None]  # bytes that are here, bytes in all


class Download:
    """Some files of one repository, fetched by ``run``.

    ``progress(done, total)`` is called on the thread of ``run``, often, with bytes of all files together;
    ``say(text)`` gets a line when something unusual happens: a retry, a restart. ``phase`` is "queued",
    "waiting" (for another process), "checking" (what is here already), "downloading" or "done".
    """

    def __init__(
        self,
        repo: str,
        files: Sequence[HubFile],
        folder: Path | None = None,
        *,
        revision: str = "main",
        progress: Progress | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.repo = hub.checked_repo(repo)
        self.files = tuple(files)
        self.revision = revision
        self.folder = folder or models_dir().joinpath(*repo.split("/"))
        self.targets = tuple(target(self.folder, f.name) for f in files)
        self.total = sum(f.size for f in files)
        self.transferred = 0  # bytes that came over the network
        self.phase = "queued"
        self._progress = progress or (lambda _done, _total: None)
        self._say = say or (lambda _line: None)
        self._cancelled = threading.Event()
        self._connection: HTTPResponse | None = None
        self._guard = threading.Lock()
        self._before = 0  # bytes of the files before the present one
        for file in files:
            if file.sha256 is None and file.git_oid is None:
                raise DownloadError(
                    f"{file.name}: the hub does not say its digest, so it could not be checked"
                )

    def cancel(self) -> None:
        """Make ``run`` raise Cancelled soon. From any thread, at any time; what has arrived is kept."""
        self._cancelled.set()
        with self._guard:
            if self._connection is not None:
                try:
                    with socket.socket(fileno=os.dup(self._connection.fileno())) as connection:
                        connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
                except (OSError, ValueError, AttributeError):
                    return  # it has ended by itself, in this moment

    def run(self) -> tuple[Path, ...]:
        """Fetch what is missing and return where the files are, in order.

        Raises DownloadError (too little room, wrong content, a file in the way), RemoteError (the connection, after
        some attempts), Cancelled. Whatever is raised, the same download goes on from what has arrived.
        """
        self._check_room()
        for file, path in zip(self.files, self.targets, strict=True):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with locked(path, self._wait_for_other):
                    if not self._is_there(file, path):
                        self._check_room()
                        self._fetch(file, path)
            except OSError as exc:
                raise _drive_error(path, exc) from exc
            self._before += file.size
            self._progress(self._before, self.total)
        self.phase = "done"
        return self.targets

    def missing(self) -> int:
        """Bytes that have still to be fetched."""
        wanted = 0
        for file, path in zip(self.files, self.targets, strict=True):
            record = read_record(path.with_name(path.name + RECORD))
            if not (path.is_file() and (record is None or _is_of(record, file))):
                wanted += file.size - min(_beginning(file, path), file.size)
        return wanted

    def _check_room(self) -> None:
        wanted = self.missing()
        free = room(self.folder)
        if wanted and wanted + MARGIN > free:
            raise DownloadError(
                f"too little room on the drive: {readable_size(wanted)} are to be downloaded to {self.folder}, and "
                f"{readable_size(free)} are free there"
            )

    def _wait_for_other(self) -> None:
        if self.phase != "waiting":
            self.phase = "waiting"
            self._say("another process is downloading the same file: waiting for it")
        self._sleep(0.2)

    def _sleep(self, seconds: float) -> None:
        """Raises Cancelled as soon as it was cancelled, with 0 at once or not at all."""
        if self._cancelled.wait(seconds):
            raise self._stopped()

    def _stopped(self) -> Cancelled:
        return Cancelled("the download was stopped; the next one goes on from there")

    def _is_there(self, file: HubFile, path: Path) -> bool:
        """Whether the file is there already. Raises DownloadError where one is that nobody downloaded."""
        if not path.exists():
            return False
        record_path = path.with_name(path.name + RECORD)
        record = read_record(record_path)
        size = path.stat().st_size
        if record is not None and _is_of(record, file) and size == file.size:
            return True
        self.phase = "checking"
        if size == file.size:
            digest = _Digest(file)
            self._read(path, digest)
            if digest.is_right():
                write_record(record_path, self._record(file, digest.sha256()))
                return True
        if record is None:
            raise DownloadError(
                f"{path} is in the way: it is not what the hub has under that name, and was not downloaded "
                "by tensortier; move it away first"
            )
        self._say(f"{file.name} has changed on the hub: the new one takes the place of the old")
        return False

    def _record(self, file: HubFile, sha256: str | None) -> Record:
        return Record(self.repo, self.revision, file.name, file.size, sha256, file.git_oid)

    def _read(self, path: Path, digest: _Digest) -> None:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                self._sleep(0)
                digest.update(chunk)
                self._progress(self._before + digest.done, self.total)

    def _fetch(self, file: HubFile, path: Path) -> None:
        part = path.with_name(path.name + PART)
        resumed = self._prepare(file, part)
        digest = _Digest(file)
        self.phase = "checking"
        self._read(part, digest)
        while True:
            resumed = resumed or digest.done > 0
            whole = self._transfer(file, part, digest)
            if digest.is_right():
                break
            part.unlink()
            part.with_name(part.name + RECORD).unlink()
            if not resumed or whole:
                raise DownloadError(
                    f"{file.name}: what arrived is not what the hub has (SHA-256 {digest.sha256()} instead of "
                    f"{file.sha256 or 'that of git object ' + str(file.git_oid)}): refused and deleted"
                )
            self._say(f"{file.name}: its beginning was damaged; all of it is fetched again")
            resumed = self._prepare(file, part)
            digest = _Digest(file)
        record_path = path.with_name(path.name + RECORD)
        with part.open("r+b") as stream:
            os.fsync(stream.fileno())
        part.replace(path)
        write_record(record_path, self._record(file, digest.sha256()))
        part.with_name(part.name + RECORD).unlink(missing_ok=True)

    def _prepare(self, file: HubFile, part: Path) -> bool:
        """Make ``part`` the beginning of ``file``, empty if need be. True when it has something in it."""
        if _beginning(file, part.with_name(part.name.removesuffix(PART))):
            return True
        if part.exists() and part.stat().st_size:
            self._say(f"{file.name} has changed since it was begun: it is fetched from the start")
        part.unlink(missing_ok=True)  # before its description changes: never one with another's bytes
        write_record(part.with_name(part.name + RECORD), self._record(file, file.sha256))
        part.touch()
        return False

    def _transfer(self, file: HubFile, part: Path, digest: _Digest) -> bool:
        """Append to ``part`` until the file is complete. True when all of it came from one answer."""
        self.phase = "downloading"
        failures, mark = 0, digest.done
        begun = digest.done
        while digest.done < file.size:
            self._sleep(0)  # raises when it was cancelled
            begun = digest.done
            try:
                begun = self._request(file, part, digest)
                why, wait = f"the connection ended after {digest.done} of {file.size} bytes", None
            except urllib.error.HTTPError as exc:
                with exc:
                    if exc.code == 416:  # it has become shorter than what is here of it
                        raise self._changed(file) from exc
                    wait, why = hub.retry_after(exc), web.explain(exc)
                    if wait is None or wait > LONGEST_WAIT:
                        later = f"; try again in {wait:.0f} s" if wait else ""
                        raise RemoteError(f"{self.repo}: {file.name}: {why}{later}") from exc
            except urllib.error.URLError as exc:
                why, wait = f"the hub cannot be reached: {exc.reason}", None
            except (_ConnectionFailed, HTTPException) as exc:
                why, wait = f"the connection failed: {exc}", None
            self._sleep(0)
            if digest.done >= file.size:
                break
            if digest.done - mark >= _PROGRESS_MADE:
                failures, mark = 0, digest.done
            if failures == len(RETRY_WAITS):
                kept = f"; {readable_size(digest.done)} are kept, the next download goes on from there"
                raise RemoteError(f"{self.repo}: {file.name}: {why}{kept if digest.done else ''}")
            pause = RETRY_WAITS[failures] if wait is None else wait
            failures += 1
            self._say(f"{file.name}: {why}; going on in {pause:.1f} s")
            self._sleep(pause)
        return begun == 0

    def _request(self, file: HubFile, part: Path, digest: _Digest) -> int:
        """One request for what is missing. Returns where its answer began."""
        address, token = web.hub()
        url = f"{address}/{self.repo}/resolve/{quote(self.revision, safe='')}/{quote(file.name)}"
        redirects = web.Redirects()
        opener = urllib.request.build_opener(redirects)
        headers = {"Range": f"bytes={digest.done}-"} if digest.done else {}
        with _socket_errors():
            response = opener.open(web.request(url, token, **headers), timeout=web.TIMEOUT)
        with response:
            start = self._check_answer(file, response, redirects, digest.done)
            if start != digest.done:  # the server does not know ranges
                self._say(f"{file.name}: the server sends all of it again, it cannot go on in the middle")
                os.truncate(part, 0)
                digest.reset()
            with self._guard:
                self._connection = response
            try:
                self._copy(file, response, part, digest)
            finally:
                with self._guard:
                    self._connection = None
        return start

    def _copy(self, file: HubFile, response: HTTPResponse, part: Path, digest: _Digest) -> None:
        with part.open("ab") as stream:
            while not self._cancelled.is_set():
                with _socket_errors():
                    chunk = response.read1(_CHUNK)
                if not chunk:
                    return
                if digest.done + len(chunk) > file.size:
                    raise DownloadError(
                        f"{file.name}: the server sends more than the {file.size} bytes it has"
                    )
                stream.write(chunk)
                stream.flush()
                digest.update(chunk)
                self.transferred += len(chunk)
                self._progress(self._before + digest.done, self.total)

    def _check_answer(
        self, file: HubFile, response: HTTPResponse, redirects: web.Redirects, asked: int
    ) -> int:
        """Where in the file the answer begins. Raises DownloadError when it is of another file."""
        linked = redirects.linked
        if linked is None:  # no storage behind: the hub itself answers
            linked = Message() if redirects.followed else response.headers
        etag = (linked.get("X-Linked-Etag") or linked.get("ETag") or "").removeprefix("W/").strip('"')
        known = file.sha256 if len(etag) == 64 else file.git_oid if len(etag) == 40 else None
        # an ETag of another form says nothing about the content
        if (known and etag != known) or linked.get("X-Linked-Size") not in (None, str(file.size)):
            raise self._changed(file)
        if response.status == 206:
            given = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range") or "")
            if given is None or int(given[1]) != asked:
                raise RemoteError(f"{file.name}: the server sent another range than it was asked for")
            total = int(given[3])
        elif response.status == 200:
            length = response.headers.get("Content-Length") or ""
            total = int(length) if re.fullmatch("[0-9]{1,18}", length) else file.size
            asked = 0
        else:
            raise RemoteError(f"{file.name}: the server answered with status {response.status}")
        if total != file.size:
            raise self._changed(file)
        return asked

    def _changed(self, file: HubFile) -> DownloadError:
        return DownloadError(f"{file.name} has changed on the hub in this moment: start its download again")


class _ConnectionFailed(Exception):
    """An error of the network, as opposed to one of the drive: both are OSError."""


@contextmanager
def _socket_errors() -> Iterator[None]:
    try:
        yield
    except (urllib.error.URLError, HTTPException):
        raise
    except (OSError, ValueError) as exc:  # ValueError: read from a connection that was closed
        raise _ConnectionFailed(str(exc) or type(exc).__name__) from exc


class _Digest:
    """The digest that the hub knows of ``file``, and in any case SHA-256."""

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self.reset()

    def reset(self) -> None:
        self.done = 0
        self._sha256 = hashlib.sha256()
        self._git = None
        if self._file.sha256 is None:  # git's name of a blob
            self._git = hashlib.sha1(b"blob %d\0" % self._file.size, usedforsecurity=False)

    def update(self, data: bytes) -> None:
        self.done += len(data)
        self._sha256.update(data)
        if self._git is not None:
            self._git.update(data)

    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def is_right(self) -> bool:
        if self._git is not None:
            return self.done == self._file.size and self._git.hexdigest() == self._file.git_oid
        return self.done == self._file.size and self.sha256() == self._file.sha256


def _is_of(record: Record, file: HubFile) -> bool:
    """Whether that is the content of ``file``, whatever it is called."""
    if record.size != file.size:
        return False
    if file.sha256 is not None:
        return record.sha256 == file.sha256
    return file.git_oid is not None and record.git_oid == file.git_oid


def _beginning(file: HubFile, path: Path) -> int:
    """Bytes in the ``.part`` of ``path``, 0 when it is of something else than ``file``."""
    part = path.with_name(path.name + PART)
    record = read_record(part.with_name(part.name + RECORD))
    if record is None or not _is_of(record, file) or not part.is_file():
        return 0
    try:
        size = part.stat().st_size
    except FileNotFoundError:  # in this moment another process has finished it
        return 0
    return size if size <= file.size else 0


def _drive_error(path: Path, error: OSError) -> DownloadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        why = "the drive is full" if error.errno != errno.EFBIG else "a file cannot be larger there"
        return DownloadError(f"{path}: {why}; what has arrived is kept, the next download goes on from there")
    return DownloadError(f"{error.filename or path}: {error.strerror or error}")
