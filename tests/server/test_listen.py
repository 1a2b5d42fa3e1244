"""Connections that are slow or too many, on a server of their own with an application that is made up."""

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

SECONDS = 0.8
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@contextlib.contextmanager
def serving(app: ASGIApp, connections: int = 100) -> Iterator[int]:
    """Its port."""
    config = uvicorn.Config(
        app, http=_protocol(SECONDS, connections), ws="none", lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    with bind("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)


class Endless:
    """Sends without end, until the client has gone."""

    def __init__(self) -> None:
        self.gone_after = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone_after = time.monotonic() - started

        watching = asyncio.create_task(watch())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not watching.done():
            await send({"type": "http.response.body", "body": bytes(10_000), "more_body": True})
            await asyncio.sleep(0)


def connect(port: int) -> socket.socket:
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    raw.settimeout(10)
    raw.connect(("127.0.0.1", port))
    return raw


def test_a_client_that_reads_nothing_is_let_go() -> None:
    app = Endless()
    with serving(app) as port, connect(port) as raw:
        raw.sendall(REQUEST)
        deadline = time.monotonic() + 10
        while not app.gone_after:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert app.gone_after >= SECONDS


def test_a_client_that_reads_slowly_is_not() -> None:
    app = Endless()
    with serving(app) as port, connect(port) as raw:
        raw.sendall(REQUEST)
        end = time.monotonic() + 4 * SECONDS
        while time.monotonic() < end:
            time.sleep(SECONDS / 16)
            assert raw.recv(200_000)
        assert not app.gone_after


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def test_of_too_many_connections_the_newest_are_refused() -> None:
    with serving(hello, connections=2) as port, contextlib.ExitStack() as stack:
        first, second, third, fourth = (stack.enter_context(connect(port)) for _ in range(4))
        time.sleep(0.1)
        for raw in (third, first, second):
            raw.sendall(REQUEST)
        answer = b"".join(iter(lambda: third.recv(10_000), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after: " in head
        error = json.loads(body)["error"]
        assert error["code"] == "overloaded" and error["type"] == "server_error"
        assert fourth.recv(1) == b""  # who says nothing is sent away too
        for raw in (first, second):
            assert raw.recv(100).startswith(b"HTTP/1.1 200 ")
