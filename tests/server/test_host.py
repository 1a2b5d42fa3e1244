"""Which models are loaded, and which make room: with stand-ins for engines, as real ones take too long to fail."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from tensortier.errors import Cancelled, LoadError, ModelNotFound, OutOfMemory, UsageError
from tensortier.library import LibraryModel
from tensortier.server.host import ModelHost
from tensortier.server.loading import HostStopping, ModelUnavailable
from tensortier.server.planning import Decision
from tensortier.types import DeviceMemory, Plan, Settings
from tests.server.process import PATIENCE

GIB = 1 << 30
NAMES = ("a", "b", "c", "big", "broken")


def model(name: str) -> LibraryModel:
    return LibraryModel(
        name, f"/models/{name}.gguf", GIB, "llama", "Q4_0", "test", "bad" if name == "broken" else ""
    )


class StandIn:
    """An engine that holds memory and can be asked what happened to it."""

    def __init__(self, plan: Plan, world: World) -> None:
        self.plan = plan
        self.world = world
        self.cancelled = threading.Event()
        self.closed = False
        world.alive.append(self)
        world.most_alive = max(world.most_alive, len(world.alive))

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.world.alive.remove(self)
            self.world.events.append(f"close {name_of(self.plan)}")


def name_of(plan: Plan) -> str:
    return plan.model.removeprefix("/models/").removesuffix(".gguf")


@dataclass
class World:
    """4 GiB, of which a model takes 2, and "big" 4."""

    events: list[str] = field(default_factory=list)
    alive: list[StandIn] = field(default_factory=list)
    most_alive: int = 0
    gate: threading.Event | None = None  # loading waits for it
    failures: list[Exception] = field(default_factory=list)  # that the next loadings meet
    lessened: int = 0
    given_up: int = 0  # loadings that were cancelled

    def decide(self, path: str, held: Mapping[str, int]) -> Decision:
        size = 4 * GIB if "big" in path else 2 * GIB
        if size > 4 * GIB - held.get("CPU", 0):
            raise UsageError("does not fit")
        return Decision(Plan(path, memory=(DeviceMemory("CPU", size, 0, 0),)))

    def fits(self, plan: Plan, held: Mapping[str, int]) -> bool:
        return plan.memory[0].total_bytes + held.get("CPU", 0) <= 4 * GIB

    def less(self, decision: Decision, failure: OutOfMemory) -> Decision:
        self.lessened += 1
        return decision

    def engine(self, plan: Plan, progress: Callable[[float], None], cancel: threading.Event) -> Any:
        for step in range(10):
            progress(step / 10)
        while self.gate is not None and not self.gate.wait(0.01):
            if cancel.is_set():
                self.given_up += 1
                raise Cancelled("loading was cancelled")
        if self.failures:
            raise self.failures.pop(0)
        self.events.append(f"load {name_of(plan)}")
        return StandIn(plan, self)


@pytest.fixture
def world() -> World:
    return World()


@contextlib.asynccontextmanager
async def host_of(world: World, served: str | None = "a", **options: Any) -> AsyncIterator[ModelHost]:
    host = ModelHost(
        world,
        None if served is None else model(served),
        engine=world.engine,
        list_models=lambda: [model(name) for name in NAMES],
        **{"models_max": 8, **options},
    )
    await host.look()
    await host.start()
    try:
        yield host
    finally:
        await host.close()
        assert not world.alive and not host.state()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, PATIENCE))


def phases(host: ModelHost) -> dict[str, str]:
    return {loaded.name: str(loaded.phase) for loaded in host.state()}


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_models_are_loaded_once_and_stay(world: World) -> None:
    async def work() -> None:
        async with host_of(world) as host:

            async def use(name: str | None) -> str:
                async with host.engine(name) as lease:
                    await asyncio.sleep(0.01)
                    return lease.name

            names = await asyncio.gather(*(use(name) for name in [None, "a", "A.GGUF", "b", "b", None]))
            assert list(names) == ["a", "a", "a", "b", "b", "a"]
            assert world.events == ["load a", "load b"] and phases(host) == {"a": "ready", "b": "ready"}
            assert host.held() == {"CPU": 4 * GIB} and host.held(besides="/models/a.gguf") == {"CPU": 2 * GIB}

    run(work())


def test_the_least_recently_used_makes_room(world: World) -> None:
    async def work() -> None:
        async with host_of(world) as host:
            for name in ("a", "b", "a", "c"):
                async with host.engine(name):
                    pass
            assert world.events == ["load a", "load b", "close b", "load c"]
            async with host.engine("big"):
                pass
            assert world.events[4:] == ["close a", "close c", "load big"]
            assert world.most_alive == 2

    run(work())


def test_no_more_models_than_allowed(world: World) -> None:
    async def work() -> None:
        async with host_of(world, models_max=1) as host:
            for name in ("a", "b", "a"):
                async with host.engine(name):
                    pass
            assert world.most_alive == 1 and world.events.count("load a") == 2

    run(work())


def test_a_model_in_use_makes_room_only_afterwards(world: World) -> None:
    async def work() -> None:
        async with host_of(world) as host, contextlib.AsyncExitStack() as using:
            first = await using.enter_async_context(host.engine("a"))
            waiting = asyncio.create_task(used(host, "big"))
            await until(lambda: "unloading" in phases(host).values())
            await asyncio.sleep(0.05)
            assert world.events == ["load a"] and not waiting.done()
            again = asyncio.create_task(used(host, "a"))  # has to wait for a second loading
            await using.aclose()
            await asyncio.gather(waiting, again)
            assert not first.engine.cancelled.is_set()  # type: ignore[attr-defined]
            assert world.events == ["load a", "close a", "load big", "close big", "load a"]

    run(work())


async def used(host: ModelHost, name: str) -> None:
    async with host.engine(name) as lease:
        assert not lease.engine.closed  # type: ignore[attr-defined]
        await asyncio.sleep(0.02)
        assert not lease.engine.closed  # type: ignore[attr-defined]


def test_two_models_that_do_not_fit_together_take_turns(world: World) -> None:
    async def work() -> None:
        async with host_of(world) as host:
            names = ["big", "a", "b", "c"] * 10
            await asyncio.gather(*(used(host, name) for name in names))
            # everybody who waits for a model is served by one loading of it
            assert len([e for e in world.events if e.startswith("load")]) < 12

    run(work())


def test_what_cannot_be_loaded_says_so_and_is_tried_again_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensortier.server.host._RETRY_SECONDS", 1e9)
    world.failures = [LoadError("a strange file")]

    async def work() -> None:
        async with host_of(world) as host:
            for _ in range(2):
                with pytest.raises(ModelUnavailable, match="a strange file"):
                    async with host.engine("a"):
                        pass
            assert phases(host) == {"a": "failed"} and host.state()[0].error == "a strange file"
            monkeypatch.setattr("tensortier.server.host._RETRY_SECONDS", -1.0)  # the time is over
            await used(host, "a")
            with pytest.raises(ModelUnavailable, match="bad"):
                await used(host, "broken")
            for name in ("/models/a.gguf", "../a", "", "x"):
                with pytest.raises(ModelNotFound):
                    await used(host, name)

    run(work())


def test_memory_that_is_not_there_after_all(world: World) -> None:
    async def work() -> None:
        async with host_of(world, None) as host:
            world.failures = [OutOfMemory("none"), OutOfMemory("none")]
            await used(host, "a")
            assert world.lessened == 2
            world.failures = [OutOfMemory("none")]
            await used(host, "b")  # another model makes room first
            assert world.lessened == 2 and world.events == ["load a", "close a", "load b"]
            world.failures = [OutOfMemory("none")] * 9
            with pytest.raises(ModelUnavailable):
                await used(host, "c")

    run(work())


def test_idle_models_are_unloaded(world: World) -> None:
    async def work() -> None:
        async with host_of(world, idle_seconds=0.2) as host:
            async with host.engine("a"):
                await asyncio.sleep(0.5)
                assert phases(host) == {"a": "ready"}
            await until(lambda: not host.state())
            await used(host, "a")
            assert world.events == ["load a", "close a", "load a"]

    run(work())


def test_a_plan_replaces_an_engine(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensortier.server.host._PATIENCE_SECONDS", 0.1)
    given = Plan("/models/a.gguf", settings=Settings(n_ctx=512), memory=(DeviceMemory("CPU", GIB, 0, 0),))

    async def work() -> None:
        async with host_of(world, parallel=3) as host:
            async with host.engine("a") as lease:
                host.load("a", given)
                await until(lease.engine.cancelled.is_set)  # type: ignore[attr-defined]
                assert not lease.engine.closed  # type: ignore[attr-defined]
            async with host.engine("a") as lease:
                assert lease.engine.plan.settings == Settings(n_ctx=512, n_seq_max=3)
            host.load("b")
            assert host.served.name == "b"  # type: ignore[union-attr]
            async with host.engine(None) as lease:
                assert lease.name == "b"
            with pytest.raises(ModelNotFound):
                host.load("/models/a.gguf")

    run(work())


def test_a_plan_that_was_made_for_the_whole_memory_gets_it(world: World) -> None:
    async def work() -> None:
        async with host_of(world) as host:
            await used(host, "b")
            for size in (2 * GIB, 3 * GIB):
                host.load("c", Plan("/models/c.gguf", memory=(DeviceMemory("CPU", size, 0, 0),)))
                await used(host, "c")
                assert sum(e.plan.memory[0].total_bytes for e in world.alive) <= 4 * GIB
            assert world.events == ["load a", "load b", "close a", "load c", "close c", "close b", "load c"]

    run(work())


def test_models_of_one_name_are_told_apart(world: World) -> None:
    async def work() -> None:
        twins = [LibraryModel("a", f"/models/{p}.gguf", GIB, "llama", "Q4_0", p) for p in "xyz"]
        host = ModelHost(world, twins[1], engine=world.engine, list_models=lambda: twins)
        for _ in range(2):
            assert {m.name: m.source for m in await host.look()} == {"a": "y", "a@2": "x", "a@3": "z"}
            await host.start()
            host.load("a@2")
            async with host.engine() as lease:
                assert (lease.name, lease.engine.plan.model) == ("a@2", "/models/x.gguf")
            host._scanned_at = float("-inf")
        await host.close()

    run(work())


def test_a_loading_is_replaced_by_the_next(world: World) -> None:
    world.gate = threading.Event()

    async def work() -> None:
        async with host_of(world) as host:
            waiting = asyncio.create_task(used(host, "a"))
            await until(lambda: phases(host) == {"a": "loading"})
            host.load("a", Plan("/models/a.gguf", settings=Settings(n_ctx=512)))
            await until(lambda: world.given_up)
            assert world.gate is not None
            world.gate.set()
            await waiting
            assert world.events == ["load a"] and world.alive[0].plan.settings.n_ctx == 512

    run(work())


def test_changes_are_told(world: World) -> None:
    async def work() -> None:
        async with host_of(world) as host:
            seen: list[tuple[str, float]] = []

            async def watch() -> None:
                async for _ in host.changes():
                    seen.extend((str(loaded.phase), loaded.fraction) for loaded in host.state())

            watching = asyncio.create_task(watch())
            await used(host, "a")
            host.stop()
            await watching
        assert ("ready", 1.0) in seen and seen[-1] == ("ready", 1.0)
        assert [fraction for _, fraction in seen] == sorted(fraction for _, fraction in seen)

    run(work())


def test_stopping_ends_what_waits(world: World) -> None:
    world.gate = threading.Event()

    async def work() -> None:
        async with host_of(world) as host:
            waiting = [asyncio.create_task(used(host, name)) for name in "aab"]
            await until(lambda: phases(host).get("a") == "loading")
            host.stop()
            found = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(error) for error in found] == [HostStopping] * 3
            with pytest.raises(HostStopping):
                await used(host, "a")

    run(work())
    for thread in threading.enumerate():
        if thread.name.startswith("server-"):
            thread.join(PATIENCE)  # it may be about to end
            assert not thread.is_alive(), thread


def test_a_request_that_is_given_up_leaves_nothing(world: World) -> None:
    world.gate = threading.Event()

    async def work() -> None:
        async with host_of(world) as host:
            waiting = [asyncio.create_task(used(host, "a")) for _ in range(20)]
            await until(lambda: host.state()[0].users == 20)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert host.state()[0].users == 0
            assert world.gate is not None
            world.gate.set()
            await used(host, "a")

    run(work())
