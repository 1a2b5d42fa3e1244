"""Connections that are slow or too many, on a server of their own with an application that is made up. Its clock stands
still until the test moves it, so that however busy the machine is, nobody is slow but who is meant to be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from tensortier.server.listen import _protocol, bind
from tests.server.process import PATIENCE

SECONDS = 0.8
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class HandMoved(asyncio.SelectorEventLoop):
    """A loop whose time passes when it is told to."""

    _shown = 1000.0
    _runs_since: float | None = None

    def time(self) -> float:
        return self._shown + (0 if self._runs_since is None else time.monotonic() - self._runs_since)

    def advance(self, seconds: float) -> None:
        """From another thread; returns when what was due then has been done."""

        async def move() -> None:
            self._shown += seconds
            for _ in range(10):
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(move(), self).result(PATIENCE)

    def let_run(self) -> None:
        def begin() -> None:
            self._runs_since = time.monotonic()

        self.call_soon_threadsafe(begin)


@contextlib.contextmanager
def serving(app: ASGIApp, connections: int = 100) -> Iterator[tuple[int, HandMoved]]:
    """Its port, and its loop."""
    config = uvicorn.Config(
        app, http=_protocol(SECONDS, connections), ws="none", lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    loop = HandMoved()

    def run(bound: socket.socket) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(server.serve([bound]))

    with bind("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=run, args=(bound,))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield bound.getsockname()[1], loop
        finally:
            server.should_exit = True
            loop.let_run()
            thread.join(PATIENCE)
            assert not thread.is_alive()


class Endless:
    """Sends without end, until the client has gone."""

    def __init__(self) -> None:
        self.gone = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone.set()

        watching = asyncio.create_task(watch())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not watching.done():
            await send({"type": "http.response.body", "body": bytes(10_000), "more_body": True})
            await asyncio.sleep(0)


def connect(port: int) -> socket.socket:
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    raw.settimeout(PATIENCE)
    raw.connect(("127.0.0.1", port))
    return raw


def test_a_client_that_reads_nothing_is_let_go() -> None:
    app = Endless()
    with serving(app) as (port, loop), connect(port) as raw:
        raw.sendall(REQUEST)
        passed, deadline = 0.0, time.monotonic() + PATIENCE
        while not app.gone.is_set():
            assert time.monotonic() < deadline
            loop.advance(SECONDS / 4)
            passed += SECONDS / 4
            app.gone.wait(0.01)
        assert passed >= SECONDS


def test_a_client_that_reads_slowly_is_not() -> None:
    app = Endless()
    with serving(app) as (port, loop), connect(port) as raw:
        raw.sendall(REQUEST)
        for _ in range(16):
            read = 0
            while read < 128 << 10:  # four times this is more than what is on its way
                piece = raw.recv(200_000)
                assert piece, "it was cut off"
                read += len(piece)
            loop.advance(SECONDS / 4)
        assert not app.gone.is_set()


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def test_of_too_many_connections_the_newest_are_refused() -> None:
    with serving(hello, connections=2) as (port, loop), contextlib.ExitStack() as stack:
        first, second, third, fourth = (stack.enter_context(connect(port)) for _ in range(4))
        for raw in (third, first, second):
            raw.sendall(REQUEST)
        answer = b"".join(iter(lambda: third.recv(10_000), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after: " in head
        error = json.loads(body)["error"]
        assert error["code"] == "overloaded" and error["type"] == "server_error"
        for raw in (first, second):
            assert raw.recv(100).startswith(b"HTTP/1.1 200 ")
        loop.advance(0)  # the fourth is let in
        loop.advance(SECONDS)
        assert fourth.recv(1) == b""  # who says nothing is sent away too
