"""Remote files, from servers on loopback: what is fetched, what is not, and every way it can fail."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tensortier import gguf, web
from tensortier.errors import ModelFileError, RemoteError
from tensortier.gguf import remote
from tests.unit.gguf_samples import ARR, STR, blob, small_model, value, write_split

Respond = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def _server(respond: Respond) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            try:
                respond(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Ranges:
    """Serves bytes with ranges, and remembers what was asked for."""

    def __init__(self, data: bytes, size: int | None = None) -> None:
        self.data = data
        self.size = len(data) if size is None else size
        self.asked: list[tuple[int, int]] = []
        self.headers: list[dict[str, str]] = []

    def __call__(self, h: BaseHTTPRequestHandler) -> None:
        first, last = (int(x) for x in re.fullmatch(r"bytes=(\d+)-(\d+)", h.headers["Range"]).groups())  # type: ignore[union-attr]
        self.asked.append((first, last))
        self.headers.append(dict(h.headers))
        if first >= self.size:
            h.send_response(416)
            h.send_header("Content-Range", f"bytes */{self.size}")
            h.send_header("Content-Length", "0")
            h.end_headers()
            return
        last = min(last, self.size - 1)
        h.send_response(206)
        h.send_header("Content-Range", f"bytes {first}-{last}/{self.size}")
        h.send_header("Content-Length", str(last - first + 1))
        h.end_headers()
        body = self.data[first : last + 1]
        h.wfile.write(body + b"\0" * (last - first + 1 - len(body)))


def _redirect(h: BaseHTTPRequestHandler, to: str, code: int = 302) -> None:
    h.send_response(code)
    h.send_header("Location", to)
    h.send_header("Content-Length", "0")
    h.end_headers()


def _big_header() -> bytes:
    """3.5 MB of vocabulary."""
    tokens = [f"{i:060d}" for i in range(50_000)]
    return blob(
        [("general.architecture", value(STR, "llama")), ("tokenizer.ggml.tokens", value(ARR, (STR, tokens)))]
    )


def test_same_as_the_local_file(tmp_path: Path) -> None:
    data = small_model()
    path = tmp_path / "small.gguf"
    path.write_bytes(data)
    with _server(_Ranges(data)) as url:
        there = gguf.read_header(f"{url}/small.gguf")
    here = gguf.read_header(path)
    assert (there.tensors, there.metadata, there.file_size) == (here.tensors, here.metadata, here.file_size)


def test_ranges_double_and_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_RANGE", 1000)
    data = _big_header()
    server = _Ranges(data, size=len(data) + (1 << 40))  # a terabyte of weights that must stay there
    with _server(server) as url:
        model = gguf.read(f"{url}/m.gguf")
    assert model.n_vocab == 50_000 and model.file_sizes == (len(data) + (1 << 40),)
    fetched = 0
    for first, last in server.asked:
        assert first == fetched, "nothing is fetched twice"
        fetched = last + 1
    assert len(data) <= fetched < 2 * len(data) + 1000 and len(server.asked) < 15


def test_server_without_ranges_is_not_read_to_the_end() -> None:
    data = _big_header()
    sent = []

    def respond(h: BaseHTTPRequestHandler) -> None:
        h.send_response(200)
        h.send_header("Content-Length", str(1 << 34))
        h.end_headers()
        h.wfile.write(data)
        for _ in range(1 << 14):
            h.wfile.write(b"\0" * (1 << 20))
            sent.append(1)

    with _server(respond) as url:
        assert gguf.read(f"{url}/m.gguf").n_vocab == 50_000
    assert len(sent) < 64, "MiB pushed before we hung up: socket buffers, not the file"


def test_redirects_and_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token goes to the hub and to redirects on it, and never to the storage host behind it."""
    hub: list[tuple[str, str | None]] = []
    storage = _Ranges(small_model())
    with _server(storage) as cdn:

        def respond(h: BaseHTTPRequestHandler) -> None:
            hub.append((h.path, h.headers.get("Authorization")))
            _redirect(
                h, "/renamed" if len(hub) == 1 else f"{cdn.replace('127.0.0.1', 'localhost')}/blob", 307
            )

        with _server(respond) as endpoint:
            monkeypatch.setenv("HF_ENDPOINT", endpoint)
            monkeypatch.setenv("HF_TOKEN", "hf_secret")
            model = gguf.read("hf://owner/some-repo@v 1/sub folder/model.gguf")
    assert model.files == ("hf://owner/some-repo@v 1/sub folder/model.gguf",)
    assert hub == [
        ("/owner/some-repo/resolve/v%201/sub%20folder/model.gguf", "Bearer hf_secret"),
        ("/renamed", "Bearer hf_secret"),
    ]
    assert all("Authorization" not in h for h in storage.headers)
    assert storage.headers[0]["Range"].startswith("bytes=0-")


def test_plain_urls_get_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server = _Ranges(small_model())
    with _server(server) as url:
        gguf.read(f"{url}/m.gguf")
    assert "Authorization" not in server.headers[0]


def test_split_model(tmp_path: Path) -> None:
    parts = write_split(tmp_path / "m.gguf")

    def respond(h: BaseHTTPRequestHandler) -> None:
        path = tmp_path / h.path.removeprefix("/").partition("?")[0]
        if path.exists() and h.path.endswith("?download=true"):
            _Ranges(path.read_bytes())(h)
        else:
            h.send_error(404)

    with _server(respond) as url:
        model = gguf.read(f"{url}/{parts[0].name}?download=true")
        assert len(model.files) == 3 and len(model.tensors) == 5
        parts[2].unlink()
        with pytest.raises(RemoteError, match=r"m-00003-of-00003\.gguf.*no such file"):
            gguf.read(f"{url}/{parts[0].name}?download=true")


def _status(code: int) -> Respond:
    return lambda h: h.send_error(code)


def _answer(status: int, headers: dict[str, str], body: bytes = b"") -> Respond:
    def respond(h: BaseHTTPRequestHandler) -> None:
        h.send_response(status)
        for key, content in headers.items():
            h.send_header(key, content)
        h.end_headers()
        h.wfile.write(body)
        h.close_connection = True

    return respond


FAILURES: dict[str, tuple[Respond, type[Exception], str]] = {
    "404": (_status(404), RemoteError, "no such file"),
    "401": (_status(401), RemoteError, "access denied"),
    "500": (_status(500), RemoteError, "HTTP 500"),
    "204": (_answer(204, {}), RemoteError, "status 204"),
    "html": (_answer(200, {"Content-Length": "15"}, b"<!doctype html>"), ModelFileError, "not a GGUF file"),
    "empty": (_Ranges(b""), ModelFileError, "is empty"),
    "empty without ranges": (_answer(200, {"Content-Length": "0"}), ModelFileError, "is empty"),
    "no size": (_answer(200, {}, small_model()), RemoteError, "nor tells the file's size"),
    "no content range": (_answer(206, {"Content-Length": "4"}, b"GGUF"), RemoteError, "another range"),
    "wrong range": (
        _answer(206, {"Content-Range": "bytes 5-8/900", "Content-Length": "4"}, b"GGUF"),
        RemoteError,
        "another range",
    ),
    "hangs up": (
        _answer(206, {"Content-Range": "bytes 0-99/100", "Content-Length": "100"}, b"GG"),
        RemoteError,
        "another range|stopped",
    ),
    "redirect loop": (lambda h: _redirect(h, h.path), RemoteError, "HTTP 302"),
    "redirect to a file": (lambda h: _redirect(h, "file:///etc/passwd"), RemoteError, "not allowed"),
    "truncated": (_Ranges(small_model()[:700]), ModelFileError, "cut short|does not fit|corrupt"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures(case: str) -> None:
    respond, kind, problem = FAILURES[case]
    with _server(respond) as url, pytest.raises(kind, match=problem) as caught:
        gguf.read(f"{url}/m.gguf")
    assert "\n" not in str(caught.value) and f"{url}/m.gguf" in str(caught.value)


def test_endless_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_HEADER", 1 << 22)
    data = blob([("a", value(ARR, (STR, ["x" * (8 << 20), "y" * (8 << 20)])))])
    server = _Ranges(data, size=1 << 40)
    with _server(server) as url, pytest.raises(RemoteError, match="longer than 4 MiB"):
        gguf.read(f"{url}/m.gguf")
    assert server.asked[-1][1] < 1 << 22


def test_silence_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "TIMEOUT", 0.2)
    release = threading.Event()
    with _server(lambda h: release.wait(120) and None) as url:
        with pytest.raises(RemoteError, match="timed out"):
            gguf.read(f"{url}/m.gguf")
        release.set()


def test_trickle_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DEADLINE", 0.3)

    def respond(h: BaseHTTPRequestHandler) -> None:
        h.send_response(206)
        h.send_header("Content-Range", "bytes 0-999/1000")
        h.send_header("Content-Length", "1000")
        h.end_headers()
        for _ in range(100):
            h.wfile.write(b"G")
            threading.Event().wait(0.05)

    with _server(respond) as url, pytest.raises(RemoteError, match="too slow"):
        gguf.read(f"{url}/m.gguf")


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody else can listen there, and it does not
        with pytest.raises(RemoteError, match="cannot be reached"):
            gguf.read(f"http://127.0.0.1:{taken.getsockname()[1]}/m.gguf")
    for bad in ("hf://owner", "hf://owner/repo", "hf:///repo/x.gguf"):
        with pytest.raises(RemoteError, match="not of the form"):
            gguf.read(bad)
    with pytest.raises(RemoteError):
        gguf.read("http://[::1/m.gguf")
