"""What is known of a model that is loaded, or about to be; what loading needs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from tensortier.budget import PROCESS
from tensortier.errors import OutOfMemory, TensortierError
from tensortier.library import LibraryModel
from tensortier.server.planning import Decision
from tensortier.server.threads import in_thread
from tensortier.types import Plan

if TYPE_CHECKING:
    from tensortier.engine import Engine


_STEPS = 200  # of progress that are told


class Phase(StrEnum):
    """``Loaded.phase``, in this order, "waiting" only where it has to; "failed" ends it early."""

    WAITING = "waiting"  # for others that load, or for the measurement of this machine
    PLANNING = "planning"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    FAILED = "failed"


UNDER_WAY = (Phase.WAITING, Phase.PLANNING, Phase.LOADING)


@dataclass(frozen=True)
class Loaded:
    """The state of one model that is loaded, or about to be."""

    name: str
    path: str
    phase: Phase
    fraction: float  # loaded, 0 to 1
    error: str  # why it failed
    plan: Plan | None  # None while planning
    engine: Engine | None  # from "ready" on, until it is freed
    users: int  # requests that hold it or wait for it
    loading: int  # which of this process' loadings it is
    waits_for: str = ""  # what has to be over first, as in "waiting for ..."


@dataclass(frozen=True)
class Lease:
    """An engine that is not unloaded while the lease is held."""

    name: str
    engine: Engine


class HostStopping(TensortierError):
    """The server is about to end."""


class ModelUnavailable(TensortierError):
    """The model cannot be planned or loaded; the message says why."""


class Occupied(TensortierError):
    """Something goes on that has to be over first; the message says what."""


class Planning(Protocol):
    """Decides where a model goes; called in threads, one call at a time."""

    def decide(self, path: str, held: Mapping[str, int]) -> Decision:
        """``held``: bytes per device that models which stay loaded take."""

    def less(self, decision: Decision, failure: OutOfMemory) -> Decision:
        """After an allocation failed. Raises ``failure`` where nothing can be done."""

    def fits(self, plan: Plan, held: Mapping[str, int]) -> bool:
        """Whether there is room for a plan that somebody made, beside models that take ``held``."""


MakeEngine = Callable[[Plan, Callable[[float], None], threading.Event], "Engine"]


def make_engine(
    plan: Plan, progress: Callable[[float], None], cancel: threading.Event, *, verbose: bool = False
) -> Engine:
    from tensortier.engine import Engine

    engine = Engine(plan, progress=progress, cancel=cancel, verbose=verbose)
    for line in () if engine.paged is None else engine.paged.warnings():
        logging.getLogger("tensortier.server").warning("%s", line)
    return engine


async def made(make: MakeEngine, plan: Plan, tell: Callable[[float], None], stop: threading.Event) -> Engine:
    """The engine that ``make`` makes in a thread. ``tell`` is called on the event loop with the fraction done. Who is
    cancelled here ends the loading, and waits for that."""
    loop = asyncio.get_running_loop()
    told = [-1]

    def progress(fraction: float) -> None:
        if int(fraction * _STEPS) > told[0]:
            told[0] = int(fraction * _STEPS)
            loop.call_soon_threadsafe(tell, fraction)

    making = asyncio.ensure_future(in_thread(make, plan, progress, stop))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        stop.set()  # the thread cannot be left behind with half an engine
        with contextlib.suppress(TensortierError):
            await in_thread((await making).close)
        raise


class Slot:
    """One loading of one model. A model that is loaded again gets a new one."""

    _numbers = itertools.count(1)

    def __init__(self, model: LibraryModel, given: Plan | None) -> None:
        self.number = next(Slot._numbers)
        self.model = model
        self.given = given
        self.phase = Phase.PLANNING
        self.waits_for = ""
        self.fraction = 0.0
        self.failures = 0  # allocations that did not succeed
        self.error = ""
        self.plan: Plan | None = given
        self.engine: Engine | None = None
        self.users = 0
        self.used_at = time.monotonic()
        self.stop = threading.Event()  # ends the loading

    @property
    def settled(self) -> bool:
        return self.phase not in UNDER_WAY

    def state(self, waits_for: str = "") -> Loaded:
        return Loaded(
            self.model.name,
            self.model.path,
            self.phase,
            self.fraction,
            self.error,
            self.plan,
            self.engine,
            self.users,
            self.number,
            waits_for,
        )


def going_on(models: Iterable[Loaded]) -> str:
    """What one of them does, in words; "" where all only wait to be asked."""
    for one in models:
        if one.phase in UNDER_WAY:
            return f"{one.name} is being loaded"
        if one.users:
            return f"{one.name} is answering"
        if one.phase is Phase.UNLOADING:
            return f"{one.name} is being unloaded"
    return ""


def held_by(slots: Iterable[Slot]) -> dict[str, int]:
    """Bytes per device that those which are loaded take."""
    held: dict[str, int] = {}
    for slot in slots:
        if slot.engine is not None and slot.plan is not None:
            for row in slot.plan.memory:
                if row.device == PROCESS:
                    continue  # there is one, and the plan of the next model counts it
                held[row.device] = held.get(row.device, 0) + row.total_bytes
    return held
