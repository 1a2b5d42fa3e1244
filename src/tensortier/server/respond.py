"""Answers that a client may walk away from: what is computed for it ends then, at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tensortier.errors import TensortierError
from tensortier.server.host import ModelHost
from tensortier.server.limits import Gate
from tensortier.server.problems import Problem, problem_of
from tensortier.server.threads import in_thread

if TYPE_CHECKING:
    from tensortier.engine import Engine, Request
    from tensortier.types import Piece

_log = logging.getLogger("tensortier.server")
_PING_SECONDS = 15.0  # between comments in a stream, for proxies that would close a connection without news
_PING: tuple[int, None] = (-1, None)
_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Sender:
    """Sends one answer: an object, or a stream of events."""

    def __init__(self, send: Send, told: Callable[[int], None]) -> None:
        self._send = send
        self._told = told
        self._has_told = False
        self.started = False  # with a stream

    def tell(self, status: int) -> None:
        """The first status of an answer counts."""
        if not self._has_told:
            self._has_told = True
            self._told(status)

    async def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = to_json(value)
        lines = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        raw = [(name.encode(), line.encode()) for name, line in lines.items()]
        self.tell(status)
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, source: AsyncGenerator[list[Any]]) -> None:
        """Each list is sent at once; its members are one event each: objects, or text as it is."""
        self.started = True
        self.tell(200)
        await self._send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
        async with contextlib.aclosing(source):
            async for values in source:
                await self._part(b"".join(_event(value) for value in values) or b": ping\n\n")
        await self._part(b"", more=False)

    async def problem(self, problem: Problem) -> None:
        """Say what went wrong: with its status, or as the last event of a stream."""
        if not self.started:
            await self.json(problem.body, problem.status, problem.headers)
            return
        await self._part(_event(problem.body), more=False)

    async def _part(self, body: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


class Answering(Response):
    """Runs ``work`` and sends what it sends. When the client has gone, ``work`` is cancelled.

    Args:
        work: is given the sender.
        told: is called with the status.
    """

    def __init__(self, work: Callable[[Sender], Awaitable[None]], told: Callable[[int], None]) -> None:
        super().__init__()
        self._work = work
        self._told = told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = Sender(send, self._told)
        work = asyncio.ensure_future(self._answer(sender))
        watch = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                sender.tell(499)  # as it is usually written: closed by the client
        finally:
            watch.cancel()
            work.cancel()
            await asyncio.wait({work, watch})
        if not work.cancelled():
            work.result()

    async def _answer(self, sender: Sender) -> None:
        try:
            await self._work(sender)
        except (Problem, TensortierError) as exc:
            await sender.problem(problem_of(exc))
        except Exception as exc:
            _log.exception("a request failed")
            await sender.problem(problem_of(exc))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Work:
    """What one request has the engine compute: one or several answers at a time. Leaving it cancels those that have not
    ended, frees their places, and lets go of the model."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine = engine
        self.model = model  # its name
        self.requests: list[Request] = []
        self._over = False
        self._arrived: asyncio.Queue[tuple[int, Piece | TensortierError | None]] = asyncio.Queue()

    async def start(self, begin: Callable[[], Request]) -> None:
        """Begin one more answer; ``begin`` is called in a thread, as it may take a while to read a long prompt."""
        loop = asyncio.get_running_loop()
        index = len(self.requests)

        def arrived(piece: Piece | TensortierError | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._arrived.put_nowait, (index, piece))

        begun = asyncio.ensure_future(in_thread(begin))
        try:
            request = await asyncio.shield(begun)
        except asyncio.CancelledError:
            with contextlib.suppress(TensortierError):
                (await begun).cancel()
            raise
        self.requests.append(request)
        request.listen(arrived)

    async def pieces(self) -> AsyncGenerator[list[tuple[int, Piece]]]:
        """Of all answers, with their number, as they come; an empty list from time to time while there are none. Raises
        what ended an answer too early."""
        running = len(self.requests)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(_PING_SECONDS, self._arrived.put_nowait, _PING)
        try:
            while running:
                found = [await self._arrived.get()]
                while not self._arrived.empty():
                    found.append(self._arrived.get_nowait())
                pieces: list[tuple[int, Piece]] = []
                failure: TensortierError | None = None
                for index, item in found:
                    if index < 0:
                        timer = loop.call_later(_PING_SECONDS, self._arrived.put_nowait, _PING)
                    elif item is None:
                        running -= 1
                    elif isinstance(item, TensortierError):
                        failure = failure or item
                    else:
                        pieces.append((index, item))
                if pieces or found == [_PING]:
                    yield pieces
                if failure is not None:
                    raise failure
        finally:
            timer.cancel()

    def adopt(self, requests: Sequence[Request]) -> None:
        """Have ``end`` cancel these too; from any thread, also after it."""
        self.requests.extend(requests)
        if self._over:
            self.end()

    def end(self) -> None:
        self._over = True
        for request in list(self.requests):
            request.cancel()


@contextlib.asynccontextmanager
async def working(host: ModelHost, gate: Gate, name: str | None, places: int) -> AsyncIterator[Work]:
    """Waits for a place and for the model. Raises Problem, and as ``ModelHost.engine``."""
    model = await host.find(name)
    with gate.enter(model.path, places):
        async with host.engine(model.name) as lease:
            work = Work(lease.engine, lease.name)
            try:
                yield work
            finally:
                work.end()


def to_json(value: Any) -> bytes:
    """On one line, also for readers to whom more than CR and LF ends one."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for end in ("\x85", "\u2028", "\u2029"):
        text = text.replace(end, f"\\u{ord(end):04x}")
    return text.encode("utf-8", "replace")


def _event(value: Any) -> bytes:
    return b"data: " + (value.encode() if isinstance(value, str) else to_json(value)) + b"\n\n"
