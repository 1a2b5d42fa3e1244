"""The header of a remote file, from HTTP ranges that double until it is complete."""

from __future__ import annotations

import os
import re
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from typing import IO, Any
from urllib.parse import quote, urljoin, urlsplit

from tensortier.errors import RemoteError
from tensortier.gguf.header import Header, NeedMore, parse

FIRST_RANGE = 1 << 20
MAX_HEADER = 1 << 27  # the largest vocabularies take some 30 MB
TIMEOUT = 30.0  # seconds without a byte
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
    from huggingface_hub import constants, get_token

    owner, repo, revision, path = match.groups()
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    return (
        f"{endpoint}/{owner}/{repo}/resolve/{quote(revision or 'main', safe='')}/{quote(path)}",
        get_token(),
    )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; the token goes along only to the same host (urllib would send it anywhere)."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        target = urljoin(req.full_url, newurl)
        old, new = urlsplit(req.full_url), urlsplit(target)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme != "https"):
            raise urllib.error.URLError(f"refused a redirect from {old.scheme} to {new.scheme}")
        following = super().redirect_request(req, fp, code, msg, headers, target)
        token = req.unredirected_hdrs.get("Authorization")
        if following is not None and token and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            following.add_unredirected_header("Authorization", token)
        return following


class _Download:
    """The beginning of a remote file. ``size`` is known after the first ``prefix``."""

    def __init__(self, source: str, url: str, token: str | None) -> None:
        self.source = source
        self.url = url
        self.token = token
        self.size = -1
        self._data = bytearray()
        self._stream: HTTPResponse | None = None  # of a server that ignores ranges
        self._opener = urllib.request.build_opener(_Redirects)
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
                raise RemoteError(f"{self.source}: {_explain(exc)}") from exc
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
        request = urllib.request.Request(
            self.url,
            headers={
                "Range": f"bytes={start}-{end - 1}",
                "Accept-Encoding": "identity",
                "User-Agent": "tensortier",
            },
        )
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        try:
            response = self._opener.open(request, timeout=TIMEOUT)
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


def _explain(error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403):
        return f"access denied (HTTP {error.code}); for a gated model set HF_TOKEN and accept its terms"
    if error.code == 404:
        return "no such file (HTTP 404)"
    reason = " ".join(str(error.reason).split())[:200]
    return f"the server answered with HTTP {error.code} {reason}"
