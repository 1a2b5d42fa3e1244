"""The socket, the protocol on it, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tensortier.errors import TensortierError, UsageError
from tensortier.server.host import ModelHost
from tensortier.server.limits import Gate, Settings
from tensortier.server.problems import RETRY_SECONDS, Problem

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_POLL_SECONDS = 0.05
_IDLE_SECONDS = 15  # of a connection between requests; clients give theirs up earlier
_LAST_SECONDS = 2  # for connections, after the answers
_SEND_BYTES = (
    1 << 16
)  # that the system keeps for a client: with more, it cannot be seen for long whether one reads


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound, and does not listen yet. Port 0 is any that is free.

    Raises:
        UsageError: there is no such address here.
        TensortierError: the port is in use, or not for us.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as exc:
        raise UsageError(f"--host {host} is no address of this machine: {exc}") from exc
    bound = socket.socket(family, kind, number)
    try:
        if sys.platform != "win32":  # there it would let two servers have one port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        bound.bind(address)
    except OSError as exc:
        bound.close()
        if exc.errno == errno.EADDRINUSE:
            text = f"port {port} of {host} is in use: end what listens there, or choose another with --port"
            raise TensortierError(text) from exc
        if exc.errno == errno.EADDRNOTAVAIL:
            raise UsageError(f"--host {host} is no address of this machine") from exc
        raise TensortierError(f"port {port} of {host} cannot be used: {exc.strerror}") from exc
    return bound


def is_loopback(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def url_of(bound: socket.socket) -> str:
    """Where a browser on this machine finds the page."""
    name, port = bound.getsockname()[:2]
    if ipaddress.ip_address(name.partition("%")[0]).is_unspecified:
        name = "::1" if bound.family == socket.AF_INET6 else "127.0.0.1"
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def serve(
    app: FastAPI, host: ModelHost, settings: Settings, bound: socket.socket, ready: Callable[[], None]
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. Answers under way then get ``stop_seconds``; a second signal ends them at
    once. ``ready`` is called when requests are taken."""
    config = uvicorn.Config(
        app,
        http=_protocol(settings.request_seconds, settings.connections),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    logging.getLogger("uvicorn.error").addFilter(_worth_telling)
    server = _Server(config, host, app.state.gate, settings.stop_seconds, ready)
    asyncio.run(server.serve([bound]))


def _worth_telling(record: logging.LogRecord) -> bool:
    """Not what clients do wrong, nor that they were cut off at the end."""
    error = record.exc_info[1] if record.exc_info else None
    return (
        record.levelno >= logging.ERROR
        and error is not None
        and not isinstance(error, asyncio.CancelledError)
    )


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        host: ModelHost,
        gate: Gate,
        stop_seconds: float,
        ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._host = host
        self._gate = gate
        self._stop_seconds = stop_seconds
        self._ready = ready
        self._stop: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def handle(signum: int, frame: FrameType | None) -> None:
            del signum, frame
            loop.call_soon_threadsafe(self._asked_to_stop)

        before = {number: signal.signal(number, handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked_to_stop(self) -> None:
        if self._stop is None:
            self._stop = asyncio.create_task(self._drain())
        else:
            self.should_exit = True

    async def _drain(self) -> None:
        """New requests are refused, and those under way have some time to end."""
        self._host.stop()
        deadline = asyncio.get_running_loop().time() + self._stop_seconds
        while self._gate.inside and asyncio.get_running_loop().time() < deadline and not self.should_exit:
            await asyncio.sleep(_POLL_SECONDS)
        for loaded in self._host.state():
            if loaded.engine is not None:
                loaded.engine.cancel()
        self.should_exit = True


async def _overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    problem = Problem(
        503,
        "the server is busy: it has too many connections",
        code="overloaded",
        retry_after=RETRY_SECONDS,
        close=True,
    )
    await problem.response()(scope, receive, send)


def _protocol(seconds: float, most: int) -> type[asyncio.Protocol]:
    """HTTP/1.1, where the head of a request has to arrive within so many seconds of its first byte, or of the
    connection's beginning, and a client may not let an answer wait for longer without reading some of it. Of more
    than ``most`` connections the newest are told that there are too many."""

    class Protocol(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _reader: asyncio.TimerHandle | None = None
        _patience = seconds

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                self.app = _overloaded
                self._patience = min(seconds, _LAST_SECONDS)
            self._arm()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            waiting = self.cycle is None or self.cycle.response_complete
            if not waiting:
                self._disarm()
            elif self.timeout_keep_alive_task is None:
                self._arm()

        def on_response_complete(self) -> None:
            self._disarm()
            super().on_response_complete()
            if self.conn.trailing_data[0]:  # a part of the next request is there already
                self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            """More is ready than the client reads."""
            super().pause_writing()
            self._wait_for_reader()

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._reader is not None:
                self._reader.cancel()
                self._reader = None

        def _arm(self) -> None:
            if self._head is None and not self.transport.is_closing():
                self._head = self.loop.call_later(self._patience, self._too_slow)

        def _disarm(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _wait_for_reader(self) -> None:
            left = self.transport.get_write_buffer_size()

            def look_again() -> None:
                if self.transport.get_write_buffer_size() < left:
                    self._wait_for_reader()
                else:
                    self._too_slow()

            self._reader = self.loop.call_later(seconds, look_again)

        def _too_slow(self) -> None:
            self._head = self._reader = None
            self.transport.abort()

    return Protocol
