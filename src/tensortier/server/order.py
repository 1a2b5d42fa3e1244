"""Who may have the machine for itself: here one after the other, and in turn with other programs that load models."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from tensortier.errors import Cancelled
from tensortier.server.loading import Occupied
from tensortier.server.threads import in_thread
from tensortier.turn import Turn

OTHERS = "another tensortier to finish loading"
MakeTurn = Callable[[], Turn]


class Order:
    """Loadings and measurements of one server, in the order they were asked for. ``turn`` makes the turn among other
    programs; None: there are none."""

    def __init__(self, turn: MakeTurn | None) -> None:
        self._make_turn = turn
        self._lock = asyncio.Lock()
        self.holder = ""  # whose turn it is, for the others: "waiting for ..."

    @property
    def busy(self) -> bool:
        return self._lock.locked()

    @contextlib.asynccontextmanager
    async def next(self, what: str) -> AsyncIterator[None]:
        """Waits until all who came before are done. ``what`` is ``holder`` meanwhile."""
        async with self._lock:
            self.holder = what
            try:
                yield
            finally:
                self.holder = ""

    @contextlib.asynccontextmanager
    async def now(self, what: str) -> AsyncIterator[None]:
        """``next`` and ``turn``, without waiting. Raises Occupied where somebody has one of them."""
        if self.busy:
            raise Occupied("the server is busy: a model is being loaded")
        async with self.next(what), contextlib.AsyncExitStack() as held:
            at_once = threading.Event()
            at_once.set()
            try:
                await held.enter_async_context(self.turn(lambda: None, at_once))
            except Cancelled as exc:
                raise Occupied("another tensortier is loading a model") from exc
            yield

    @contextlib.asynccontextmanager
    async def turn(
        self, waiting: Callable[[], None], stop: threading.Event
    ) -> AsyncIterator[Callable[[], None]]:
        """Waits until no other program loads, and keeps them from it until the end or until what is yielded is called.
        ``waiting`` is called once, on the event loop, where another one loads.

        Raises:
            Cancelled: ``stop`` was set while another one did.
        """
        if self._make_turn is None:
            yield lambda: None
            return
        mine = self._make_turn()
        with _ended(mine):
            await self._take(mine, waiting, stop)
            yield mine.end

    async def _take(self, mine: Turn, waiting: Callable[[], None], stop: threading.Event) -> None:
        loop = asyncio.get_running_loop()

        def tell() -> None:
            loop.call_soon_threadsafe(waiting)

        taking = asyncio.ensure_future(in_thread(mine.take, tell, stop))
        try:
            await asyncio.shield(taking)
        except asyncio.CancelledError:
            stop.set()  # the thread cannot be left behind with the turn
            with contextlib.suppress(Cancelled):
                await taking
            raise


@contextlib.contextmanager
def _ended(turn: Turn) -> Iterator[None]:
    try:
        yield
    finally:
        turn.end()
