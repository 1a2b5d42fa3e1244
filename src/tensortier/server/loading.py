"""What is known of a model that is loaded, or about to be; what loading needs."""

from __future__ import annotations

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
from tensortier.types import Plan

if TYPE_CHECKING:
    from tensortier.engine import Engine


class Phase(StrEnum):
    """``Loaded.phase``, in this order; "failed" ends it early."""

    PLANNING = "planning"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    FAILED = "failed"


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


@dataclass(frozen=True)
class Lease:
    """An engine that is not unloaded while the lease is held."""

    name: str
    engine: Engine


class HostStopping(TensortierError):
    """The server is about to end."""


class ModelUnavailable(TensortierError):
    """The model cannot be planned or loaded; the message says why."""


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


class Slot:
    """One loading of one model. A model that is loaded again gets a new one."""

    _numbers = itertools.count(1)

    def __init__(self, model: LibraryModel, given: Plan | None) -> None:
        self.number = next(Slot._numbers)
        self.model = model
        self.given = given
        self.phase = Phase.PLANNING
        self.fraction = 0.0
        self.error = ""
        self.plan: Plan | None = given
        self.engine: Engine | None = None
        self.users = 0
        self.used_at = time.monotonic()
        self.stop = threading.Event()  # ends the loading

    @property
    def settled(self) -> bool:
        return self.phase not in (Phase.PLANNING, Phase.LOADING)

    def state(self) -> Loaded:
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
        )


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
