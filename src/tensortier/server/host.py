"""``ModelHost``: the models that are loaded, and which of them may stay. Everything here runs on the event loop;
planning, loading and freeing run in threads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tensortier import library
from tensortier.errors import Cancelled, ModelNotFound, OutOfMemory, TensortierError, UsageError
from tensortier.library import LibraryModel
from tensortier.server.loading import (
    HostStopping,
    Lease,
    Loaded,
    MakeEngine,
    ModelUnavailable,
    Occupied,
    Phase,
    Planning,
    Slot,
    going_on,
    held_by,
    made,
    make_engine,
)
from tensortier.server.names import named, unique
from tensortier.server.order import OTHERS, MakeTurn, Order
from tensortier.server.planning import Decision
from tensortier.server.threads import in_thread
from tensortier.types import Plan

if TYPE_CHECKING:
    from tensortier.engine import Engine

_log = logging.getLogger("tensortier.server")
_PLANS_AGAIN = 3  # after allocations that failed
_PATIENCE_SECONDS = 5.0  # that running answers get before a model is replaced under them
_RETRY_SECONDS = 5.0  # a load that failed is not tried again before
_RESCAN_SECONDS = 2.0
_ENDED = "the loading was ended"


class ModelHost:
    """Owns the engines.

    Models are loaded one at a time, in the order they were asked for. One that has to make room is the least recently
    used; a model in use makes room only once its requests are answered, and those that come meanwhile wait for it to
    be loaded again.

    Args:
        planning: decides where a model goes.
        served: the model that requests without a name get; None: there is none yet.
        given: the plan ``served`` is loaded with at first; None: ``planning`` decides.
        parallel: sequences of each engine.
        models_max: models that may be loaded at once.
        idle_seconds: a model unused for so long is unloaded; None: never.
        engine: makes an engine, in a thread.
        turn: among other programs that load; it is held while one is planned and loaded, and not while it waits for
            answers under way. None: there are none.
    """

    def __init__(
        self,
        planning: Planning,
        served: LibraryModel | None,
        *,
        given: Plan | None = None,
        parallel: int = 1,
        models_max: int = 1,
        idle_seconds: float | None = None,
        engine: MakeEngine = make_engine,
        list_models: Callable[[], Sequence[LibraryModel]] = library.list_models,
        turn: MakeTurn | None = None,
    ) -> None:
        self.served = served
        self.parallel = parallel
        self._planning = planning
        self._given = given
        self._models_max = models_max
        self._idle_seconds = idle_seconds
        self._make_engine = engine
        self._list_models = list_models
        self._first = [] if served is None else [served]  # it need not be in a model folder
        self._models: list[LibraryModel] = list(self._first)
        self._scanned_at = float("-inf")
        self._scanning = asyncio.Lock()
        self._slots: dict[str, Slot] = {}  # by path, the newest of each model
        self._leaving: list[Slot] = []
        self._order = Order(turn)
        self._switching = asyncio.Lock()  # one model is loaded or freed at a time
        self._alone = ""  # who has the machine for itself, and answers wait for
        self._before_free: list[Callable[[str, Engine], None]] = []
        self._change = asyncio.Event()  # set at a change, and then another one
        self._changes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    # --- life

    async def start(self) -> None:
        """Begin to load the served model, in the background."""
        if self.served is not None:
            self._begin(self.served, self._given)
        if self._idle_seconds is not None:
            self._spawn(self._unload_idle(self._idle_seconds))

    def stop(self) -> None:
        """From now on nobody gets an engine who does not have one, and loading ends."""
        self._stopping = True
        for slot in self._slots.values():
            slot.stop.set()
        self._notify()

    async def close(self) -> None:
        """End all that is going on, and free every model."""
        self.stop()
        slots = [*self._slots.values(), *self._leaving]
        for slot in slots:
            if slot.engine is not None:
                slot.engine.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in slots:
            await self._free(slot)
        self._slots.clear()
        self._notify()

    # --- what is there

    @property
    def stopping(self) -> bool:
        return self._stopping

    def models(self) -> list[LibraryModel]:
        """The models on this machine, as of the last look; the one that is served among them. Names are unique."""
        return list(self._models)

    async def look(self) -> list[LibraryModel]:
        """Look at the model folders again (at most every two seconds), and return ``models()``."""
        async with self._scanning:
            if time.monotonic() - self._scanned_at > _RESCAN_SECONDS:
                found = await in_thread(self._list_models)
                paths = {model.path for model in self._first}
                self._models = unique([*self._first, *(m for m in found if m.path not in paths)])
                self._scanned_at = time.monotonic()
        return self.models()

    async def find(self, name: str | None) -> LibraryModel:
        """The model of that name, with or without ``.gguf``, upper or lower case; None is the served one.

        Only names of ``models()`` are known: a path or a URL is not looked at, whatever is there.

        Raises:
            ModelNotFound: no such name.
            ModelUnavailable: there is a file of that name, and it cannot be read.
        """
        if name is None:
            if self.served is None:
                raise ModelNotFound("no model is loaded: name one, GET /v1/models lists those that there are")
            return self.served
        found = named(self._models, name) or named(await self.look(), name)
        if found is None:
            raise ModelNotFound(
                f"the model {name[:100]!r} does not exist: GET /v1/models lists those that do"
            )
        if found.error:
            raise ModelUnavailable(f"the model {found.name} cannot be read: {found.error}")
        return found

    def state(self) -> tuple[Loaded, ...]:
        """The models that are loaded or about to be, the served one first."""
        served = None if self.served is None else self.served.path
        slots = sorted(self._slots.values(), key=lambda s: s.model.path != served)
        return tuple(slot.state(self._waits_for(slot)) for slot in [*slots, *self._leaving])

    def _waits_for(self, slot: Slot) -> str:
        if slot.phase is Phase.WAITING:
            return slot.waits_for or self._order.holder
        return self._alone if slot.phase is Phase.UNLOADING else ""

    def held(self, *, besides: str | None = None) -> dict[str, int]:
        """Bytes per device that loaded models take, all but the model with the path ``besides``."""
        return held_by(s for s in self._slots.values() if s.model.path != besides)

    async def changes(self) -> AsyncIterator[None]:
        """Yields after each change of ``state()``; changes that come while nobody waits are told once. Ends when the
        host is closed or stopped."""
        seen = self._changes
        while not self._stopping:
            while self._changes == seen:
                await self._change.wait()
            seen = self._changes
            yield

    def before_free(self, tell: Callable[[str, Engine], None]) -> None:
        """``tell`` is called with name and engine of each model that is about to be freed."""
        self._before_free.append(tell)

    # --- use

    @contextlib.asynccontextmanager
    async def alone(self, what: str) -> AsyncIterator[None]:
        """Nothing is loaded, freed or computed while inside: what is asked for waits, for ``what``.

        Raises:
            Occupied: something goes on now, here or in another program that loads a model.
            HostStopping: the server is about to end.
        """
        if self._stopping:
            raise HostStopping("the server is about to end")
        if busy := self._alone or going_on(self.state()):
            raise Occupied(f"the server is busy: {busy}")
        self._alone = what
        try:
            async with self._order.now(what), self._switching:
                yield
        finally:
            self._alone = ""
            self._notify()

    @contextlib.asynccontextmanager
    async def engine(self, name: str | None = None) -> AsyncIterator[Lease]:
        """The engine of a model, which is loaded first where it is not.

        Raises:
            ModelNotFound, ModelUnavailable: as ``find``; the latter also where loading fails.
            HostStopping: the server is about to end.
        """
        model = await self.find(name)
        slot = await self._acquire(model)
        try:
            assert slot.engine is not None
            yield Lease(model.name, slot.engine)
        finally:
            self._release(slot)

    def load(self, model: str, plan: Plan | None = None) -> None:
        """Begin to load a model of ``models()``, by this plan or by one that is made now. It becomes the served one.
        An engine of it that is there already is replaced; answers under way have a few seconds to end. Raises
        ModelNotFound; HostStopping."""
        found = self._known(model)
        if plan is not None:
            settings = replace(plan.settings, n_seq_max=self.parallel)
            plan = replace(plan, model=found.path, settings=settings)
        self.served = found
        self._begin(found, plan)

    def unload(self, model: str) -> str:
        """Begin to free a model, whose answers under way have a few seconds to end, or end its loading; returns its
        name. A request for it loads it again. Nothing where it is not loaded. Raises ModelNotFound."""
        found = self._known(model)
        slot = self._slots.get(found.path)
        if slot is not None:
            slot.stop.set()
            if slot.engine is not None:
                self._leave(slot)
                self._spawn(self._unload_now(slot))
            elif slot.phase is Phase.WAITING:
                self._fail(slot, _ENDED)  # it may wait for long
            elif slot.phase is Phase.FAILED:
                del self._slots[found.path]
                self._notify()
        return found.name

    def _known(self, name: str) -> LibraryModel:
        found = named(self._models, name)
        if found is None:
            raise ModelNotFound(f"the model {name[:100]!r} does not exist")
        return found

    async def _unload_now(self, slot: Slot) -> None:
        async with self._switching:  # who is loaded next counts on its memory
            await self._unload(slot, _PATIENCE_SECONDS)

    async def _acquire(self, model: LibraryModel) -> Slot:
        while True:
            slot = self._slots.get(model.path)
            failed = slot is not None and slot.phase is Phase.FAILED
            if slot is None or (failed and time.monotonic() - slot.used_at > _RETRY_SECONDS):
                slot = self._begin(model, None)
            slot.users += 1  # while waiting too: who has waited for a model finds it there
            try:
                while not self._stopping and (not slot.settled or (self._alone and slot.engine is not None)):
                    await self._change.wait()
                if self._stopping:
                    raise HostStopping("the server is about to end")
                if slot.phase is Phase.FAILED and self._slots.get(model.path) is slot:
                    raise ModelUnavailable(slot.error)
            except BaseException:
                self._release(slot)
                raise
            if slot.engine is not None:
                return slot
            self._release(slot)  # another loading has taken its place

    def _release(self, slot: Slot) -> None:
        slot.users -= 1
        if slot.phase is not Phase.FAILED:
            slot.used_at = time.monotonic()
        if slot.users == 0:
            self._notify()

    # --- loading

    def _begin(self, model: LibraryModel, given: Plan | None) -> Slot:
        if self._stopping:
            raise HostStopping("the server is about to end")
        before = self._slots.get(model.path)
        slot = self._slots[model.path] = Slot(model, given)
        if before is not None:
            before.stop.set()
            if before.engine is not None:
                self._leave(before)
        self._notify()
        self._spawn(self._load(slot, before))
        return slot

    async def _load(self, slot: Slot, before: Slot | None) -> None:
        try:
            if self._order.busy:
                self._wait(slot)
            async with self._order.next(f"{slot.model.name} to be loaded"):
                self._go_on(slot)
                if before is not None and before.engine is not None:
                    async with self._switching:
                        await self._unload(before, _PATIENCE_SECONDS)
                while (crowding := await self._load_in_turn(slot)) is not None:
                    async with self._switching:
                        await self._unload(crowding)
        except Cancelled:
            self._fail(slot, _ENDED)
        except (TensortierError, OSError) as exc:
            self._fail(slot, " ".join(str(exc).split()))
            _log.warning("%s cannot be loaded: %s", slot.model.name, slot.error)
        except asyncio.CancelledError:
            self._fail(slot, "the server is about to end")
            raise
        except Exception as exc:
            self._fail(slot, f"{type(exc).__name__}: {exc} (this is a bug)")
            raise

    def _wait(self, slot: Slot, what: str = "") -> None:
        """``what`` is waited for; "": whoever comes before."""
        if slot.phase is Phase.PLANNING:
            slot.phase, slot.waits_for = Phase.WAITING, what
            self._notify()

    def _go_on(self, slot: Slot) -> None:
        self._check(slot)
        slot.phase, slot.waits_for = Phase.PLANNING, ""
        self._notify()

    def _fail(self, slot: Slot, reason: str) -> None:
        if slot.phase is not Phase.FAILED:
            slot.phase, slot.error, slot.used_at = Phase.FAILED, reason, time.monotonic()
            self._notify()

    async def _load_in_turn(self, slot: Slot) -> Slot | None:
        """Plan and load while no other program does; or the model that has to make room first. Nobody's answers are
        waited for in here: the other programs wait too."""

        def waiting() -> None:
            self._wait(slot, OTHERS)
            _log.warning("%s: waiting for %s", slot.model.name, OTHERS)

        async with self._order.turn(waiting, slot.stop) as end_turn, self._switching:
            self._go_on(slot)
            decision = await self._decide(slot)
            while isinstance(decision, Decision):
                self._check(slot)
                if not decision.fills:
                    end_turn()
                slot.phase, slot.plan, slot.fraction = Phase.LOADING, decision.plan, 0.0
                self._notify()
                try:
                    engine = await self._make(slot, decision.plan)
                except OutOfMemory as exc:
                    slot.phase = Phase.PLANNING
                    decision = await self._after(slot, decision, exc)
                    continue
                if slot.stop.is_set():
                    await in_thread(engine.close)
                    raise Cancelled(_ENDED)
                slot.engine, slot.fraction, slot.used_at = engine, 1.0, time.monotonic()
                slot.phase = Phase.READY
                self._notify()
                return None
            return decision

    async def _after(self, slot: Slot, decision: Decision, failure: OutOfMemory) -> Decision | Slot:
        """The next attempt, or the model that has to make room for it."""
        slot.failures += 1
        if slot.failures > _PLANS_AGAIN:
            raise failure
        others = self._others(slot)
        if others:
            return others[0]
        if slot.given is not None:
            raise failure
        return await in_thread(self._planning.less, decision, failure)

    async def _make(self, slot: Slot, plan: Plan) -> Engine:
        def tell(fraction: float) -> None:
            slot.fraction = fraction
            self._notify()

        return await made(self._make_engine, plan, tell, slot.stop)

    async def _decide(self, slot: Slot) -> Decision | Slot:
        """The plan with what is left, or the model that has to make room first."""
        self._check(slot)
        others = self._others(slot)
        if len(others) >= self._models_max:
            return others[0]
        if slot.given is not None:
            if not others or await in_thread(self._planning.fits, slot.given, held_by(others)):
                return Decision(slot.given)
            return others[0]
        try:
            decision = await in_thread(self._planning.decide, slot.model.path, held_by(others))
        except UsageError:  # it cannot run in what the others leave
            if not others:
                raise
            return others[0]
        idle = [s for s in others if not s.users]
        if not others or not (decision.spills or (decision.cramped and idle)):
            return decision
        return others[0]

    def _others(self, slot: Slot) -> list[Slot]:
        """Models beside this one, in the order in which they should make room."""
        found = [s for s in self._slots.values() if s is not slot and s.engine is not None]
        return sorted(found, key=lambda s: (s.users > 0, s.used_at))

    def _check(self, slot: Slot) -> None:
        if slot.stop.is_set():
            raise Cancelled(_ENDED)

    # --- unloading

    def _leave(self, slot: Slot) -> None:
        """No new requests for it."""
        if self._slots.get(slot.model.path) is slot:
            del self._slots[slot.model.path]
        slot.phase = Phase.UNLOADING
        self._leaving.append(slot)
        self._notify()

    async def _unload(self, slot: Slot, patience: float | None = None) -> None:
        """Free a model once its requests are answered; they are cancelled after ``patience`` seconds."""
        if slot not in self._leaving:
            self._leave(slot)
        deadline = None if patience is None else time.monotonic() + patience
        while slot.users:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                deadline = time.monotonic() + 0.2  # again, for requests that begin this moment
                if slot.engine is not None:
                    slot.engine.cancel()
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._change.wait(), left)
        await self._free(slot)

    async def _free(self, slot: Slot) -> None:
        engine, slot.engine = slot.engine, None
        if engine is not None:
            for tell in self._before_free:
                tell(slot.model.name, engine)
            await in_thread(engine.close)
        if slot in self._leaving:
            self._leaving.remove(slot)
        self._notify()

    async def _unload_idle(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(min(5.0, seconds / 4))
            async with self._switching:  # nobody counts on the memory of a model that is about to leave
                for slot in list(self._slots.values()):
                    idle = slot.engine is not None and not slot.users and slot.phase is Phase.READY
                    if idle and time.monotonic() - slot.used_at > seconds:
                        await self._unload(slot)

    def _notify(self) -> None:
        self._changes += 1
        event, self._change = self._change, asyncio.Event()
        event.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
