"""The header of a remote file, from HTTP ranges that double until it is complete."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from urllib.parse import quote

from tensortier import web
from tensortier.errors import RemoteError
from tensortier.gguf.header import Header, NeedMore, parse

FIRST_RANGE = 1 << 20
MAX_HEADER = 1 << 27  # the largest vocabularies take some 30 MB
DEADLINE = 300.0  # seconds for one file's header
_CHUNK = 1 << 16
_HF = re.compile(r"(?i:hf)://([\w.-]+)/([\w.-]+)(?:@([^/]+))?/(.+)", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18})")


def read_header(source: str) -> Header:
    """Header of the file at ``hf://owner/repo[@revision]/path`` or an ``http(s)://`` URL.

    Fetches little more than the header: 1 MiB, then twice as much as often as needed, at most 128 MiB. A
    server that ignores ranges is read until the header ends, then disconnected. ``HF_ENDPOINT`` and the
    Hugging Face token apply to ``hf://`` as in huggingface_hub; the token is never sent to another host.
    Raises ``RemoteError`` for the connection and ``ModelFileError`` for the content.
    """
    url, token = _resolve(source)
    download = _Download(source, url, token)
    try:
        wanted = FIRST_RANGE
        while True:
            data = download.prefix(wanted)
            try:
                return parse(data, source, download.size)
            except NeedMore as need:
                wanted = max(2 * wanted, need.end)
                if need.end > MAX_HEADER:
                    raise RemoteError(
                        f"{source}: its header is longer than {MAX_HEADER >> 20} MiB, which no model needs"
                    ) from None
                wanted = min(wanted, MAX_HEADER)
    finally:
        download.close()


def _resolve(source: str) -> tuple[str, str | None]:
    """URL and token for a source."""
    if not source.lower().startswith("hf://"):
        return source, None
    match = _HF.fullmatch(source)
    if not match:
        raise RemoteError(f"{source}: not of the form hf://owner/repo/file.gguf")
    owner, repo, revision, path = match.groups()
    endpoint, token = web.hub()
    return f"{endpoint}/{owner}/{repo}/resolve/{quote(revision or 'main', safe='')}/{quote(path)}", token


class _Download:
    """The beginning of a remote file. ``size`` is known after the first ``prefix``."""

    def __init__(self, source: str, url: str, token: str | None) -> None:
        self.source = source
        self.url = url
        self.token = token
        self.size = -1
        self._data = bytearray()
        self._stream: HTTPResponse | None = None  # of a server that ignores ranges
        self._opener = urllib.request.build_opener(web.Redirects)
        self._end = time.monotonic() + DEADLINE

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def prefix(self, n: int) -> bytes:
        """The first ``n`` bytes, or the whole file if it is shorter."""
        if self.size >= 0:
            n = min(n, self.size)
        while len(self._data) < n:
            before = len(self._data)
            try:
                if self._stream is None:
                    self._request(before, n)
                else:
                    self._take(self._stream, n)
            except urllib.error.HTTPError as exc:
                exc.close()
                raise RemoteError(f"{self.source}: {web.explain(exc)}") from exc
            except urllib.error.URLError as exc:
                raise RemoteError(f"{self.source}: cannot be reached: {exc.reason}") from exc
            except (OSError, HTTPException, ValueError) as exc:
                raise RemoteError(
                    f"{self.source}: the connection failed: {exc or type(exc).__name__}"
                ) from exc
            n = min(n, self.size)
            if len(self._data) <= before and n:
                raise RemoteError(
                    f"{self.source}: the server stopped sending after {before} bytes; try again"
                )
        return bytes(self._data[:n])

    def _request(self, start: int, end: int) -> None:
        request = web.request(self.url, self.token, Range=f"bytes={start}-{end - 1}")
        try:
            response = self._opener.open(request, timeout=web.TIMEOUT)
        except urllib.error.HTTPError as exc:
            empty = _CONTENT_RANGE.fullmatch(exc.headers.get("Content-Range", ""))
            if exc.code == 416 and start == 0 and empty and int(empty[3]) == 0:
                exc.close()
                self.size = 0
                return
            raise
        if response.status == 206:
            with response:
                self._check_range(response, start)
                self._take(response, min(end, self.size))
        elif response.status == 200:
            # The whole file is on its way: take from it what is needed and hang up.
            length = response.headers.get("Content-Length") or ""
            if not re.fullmatch("[0-9]{1,18}", length):
                response.close()
                raise RemoteError(f"{self.source}: the server neither takes ranges nor tells the file's size")
            self._data.clear()
            self.size = int(length)
            self._stream = response
            self._take(response, min(end, self.size))
        else:
            response.close()
            raise RemoteError(f"{self.source}: the server answered with status {response.status}")

    def _check_range(self, response: HTTPResponse, start: int) -> None:
        given = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range") or "")
        if not given or given[1] is None or int(given[1]) != start:
            raise RemoteError(f"{self.source}: the server sent another range than it was asked for")
        total = int(given[3])
        if self.size not in (-1, total):
            raise RemoteError(f"{self.source}: the file changed while it was read; try again")
        self.size = total

    def _take(self, response: HTTPResponse, end: int) -> None:
        while len(self._data) < end:
            if time.monotonic() > self._end:
                raise RemoteError(
                    f"{self.source}: no complete header after {DEADLINE:.0f} s; the server is too slow"
                )
            chunk = response.read1(min(_CHUNK, end - len(self._data)))
            if not chunk:
                return
            self._data += chunk
