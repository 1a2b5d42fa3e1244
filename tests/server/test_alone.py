"""One at a time: a measurement has the machine for itself, and loadings take turns with other programs. With the
stand-ins of test_host; nothing here waits for time to pass."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tensortier import measuring
from tensortier.deciding import Wish
from tensortier.errors import OutOfMemory
from tensortier.library import LibraryModel
from tensortier.server import planning
from tensortier.server.api import _Measurement
from tensortier.server.host import ModelHost
from tensortier.server.loading import HostStopping, ModelUnavailable, Occupied
from tensortier.server.order import OTHERS
from tensortier.server.planning import Decision
from tensortier.turn import Turn
from tensortier.types import DeviceMemory, Plan
from tests.server.test_host import GIB, World, host_of, phases, run, until, used

WHAT = "the measurement of this machine"
locks = pytest.mark.skipif(sys.platform == "win32", reason="nobody waits there")


def waits(host: ModelHost) -> dict[str, str]:
    return {one.name: one.waits_for for one in host.state()}


def free() -> bool:
    """Whether another program could load now."""
    turn = Turn()
    try:
        return turn.try_take()
    finally:
        turn.end()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the lock is, of this process and those that it starts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@contextlib.asynccontextmanager
async def turns_of(world: World, served: str | None = "a", **options: Any) -> AsyncIterator[ModelHost]:
    async with host_of(world, served, turn=Turn, **options) as host:
        yield host


# --- a measurement


def test_what_is_asked_for_meanwhile_waits_and_is_done_afterwards() -> None:
    world = World()
    answered: list[str] = []

    async def answer(host: ModelHost, name: str) -> None:
        async with host.engine(name):
            answered.append(name)

    async def work() -> None:
        async with host_of(world) as host:
            await used(host, "a")
            await used(host, "b")
            async with host.alone(WHAT):
                host.unload("b")
                host.load("c")
                answers = [asyncio.create_task(answer(host, name)) for name in ("a", "c", "big")]
                await until(lambda: len(host.state()) == 4 and host.state()[1].users)
                told = {"a": "ready", "b": "unloading", "c": "waiting", "big": "waiting"}
                for _ in range(20):  # whatever could go on now had its turn
                    await asyncio.sleep(0)
                    assert phases(host) == told
                assert waits(host) == {"a": "", "b": WHAT, "c": WHAT, "big": WHAT}
                assert world.events == ["load a", "load b"] and not answered
            await asyncio.gather(*answers)
            assert world.events[2:4] == ["close b", "load c"] and world.events[-1] == "load big"

    run(work())


def test_it_is_refused_where_something_goes_on() -> None:
    world = World(gate=threading.Event())

    async def work() -> None:
        assert world.gate is not None
        async with host_of(world) as host:

            async def refused(reason: str) -> None:
                with pytest.raises(Occupied, match=reason):
                    async with host.alone(WHAT):
                        pytest.fail("it was not alone")

            await until(lambda: phases(host) == {"a": "loading"})
            host.load("b")
            await until(lambda: phases(host) == {"a": "loading", "b": "waiting"})
            assert waits(host)["b"] == "a to be loaded"
            await refused("is being loaded")
            world.gate.set()
            await until(lambda: phases(host) == {"a": "ready", "b": "ready"})
            async with host.engine("a"):
                await refused("a is answering")
                host.unload("a")
                await refused("a is ")
            await until(lambda: phases(host) == {"b": "ready"})
            async with host.alone(WHAT):
                await refused(WHAT)
            async with host.alone(WHAT):  # whoever was refused has left nothing behind
                pass
            await used(host, "b")

    run(work())


def test_a_loading_that_waits_is_ended_at_once() -> None:
    world = World()

    async def work() -> None:
        async with host_of(world) as host:
            await used(host, "a")
            async with host.alone(WHAT):
                waiting = asyncio.create_task(used(host, "b"))
                await until(lambda: phases(host).get("b") == "waiting")
                host.unload("b")
                with pytest.raises(ModelUnavailable, match="the loading was ended"):
                    await waiting
                assert phases(host) == {"a": "ready", "b": "failed"}
                host.load("b")  # and is asked for again
                await until(lambda: phases(host)["b"] == "waiting")
            await used(host, "b")
            assert world.events == ["load a", "load b"]

    run(work())


def test_the_end_of_the_server_ends_what_waits_for_it() -> None:
    world = World()

    async def work() -> None:
        async with host_of(world) as host:
            await used(host, "a")
            async with host.alone(WHAT):
                waiting = [asyncio.create_task(used(host, name)) for name in ("a", "b")]
                await until(lambda: phases(host) == {"a": "ready", "b": "waiting"} and host.state()[0].users)
                host.stop()
                found = await asyncio.gather(*waiting, return_exceptions=True)
                assert [type(error) for error in found] == [HostStopping] * 2
            with pytest.raises(HostStopping):
                async with host.alone(WHAT):
                    pass

    run(work())


def test_who_gives_up_waiting_leaves_nothing() -> None:
    world = World()

    async def work() -> None:
        async with host_of(world) as host:
            await used(host, "a")
            async with host.alone(WHAT):
                waiting = [asyncio.create_task(used(host, name)) for name in ("a", "b") * 20]
                await until(lambda: [one.users for one in host.state()] == [20, 20])
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
                assert [one.users for one in host.state()] == [0, 0]
            await used(host, "b")
            async with host.alone(WHAT):
                pass

    run(work())


def test_what_was_measured_less_well_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(notes=("measuring CPU took long",))
    monkeypatch.setattr(measuring, "measured", lambda *_: found)

    async def work() -> None:
        left: list[str] = []
        async with contextlib.AsyncExitStack() as held:
            held.callback(left.append, "left")
            measurement = _Measurement(SimpleNamespace(wish=Wish("x"), machine=None))  # type: ignore[arg-type]
            measurement.start(held.pop_all())
        await until(lambda: not measurement.running)
        assert measurement.state() == {"fraction": None, "warnings": ["measuring CPU took long"]}
        assert left == ["left"]

    run(work())


# --- other programs


@locks
def test_memory_is_freed_while_another_program_loads(cache: Path) -> None:
    """One that was stopped in the middle of it, say, and holds the turn for hours."""
    world, others = World(), Turn()

    async def work() -> None:
        async with turns_of(world) as host:
            await used(host, "a")
            assert others.try_take()
            host.load("b")
            await until(lambda: waits(host).get("b") == OTHERS)
            await used(host, "a")  # answers go on
            host.unload("a")
            await until(lambda: phases(host) == {"b": "waiting"})
            assert world.events == ["load a", "close a"]
            others.end()
            await used(host, "b")

    run(work())


@locks
def test_two_servers_load_one_after_the_other(cache: Path) -> None:
    first, second = World(gate=threading.Event()), World()

    async def work() -> None:
        assert first.gate is not None
        async with turns_of(first) as one, turns_of(second, None) as other:
            await until(lambda: phases(one) == {"a": "loading"})
            with pytest.raises(Occupied, match="another tensortier"):
                async with other.alone(WHAT):
                    pytest.fail("the other one is loading")
            waiting = asyncio.create_task(used(other, "b"))
            await until(lambda: waits(other) == {"b": OTHERS})
            assert phases(other) == {"b": "waiting"} and not second.events
            first.gate.set()
            await waiting
            await used(one, "a")
            assert phases(other) == {"b": "ready"}
            async with one.alone(WHAT):  # a measurement keeps the others waiting too
                assert not free()
            assert free(), "a model that is loaded is in nobody's way"

    run(work())


@locks
def test_a_loading_that_waits_for_another_program_lets_go(cache: Path) -> None:
    world, others = World(), Turn()
    assert others.try_take()

    async def work() -> None:
        async with turns_of(world) as host:
            await until(lambda: waits(host) == {"a": OTHERS})
            host.unload("a")
            assert phases(host) == {"a": "failed"}
            host.load("a")
            host.load("b")
            await until(lambda: waits(host) == {"a": OTHERS, "b": "a to be loaded"})
            host.load("a")  # the one that waits is replaced
            await until(lambda: waits(host).get("b") == OTHERS)
            host.unload("a")
            host.unload("b")
            await until(lambda: set(phases(host).values()) == {"failed"})
            others.end()
            await until(others.try_take)  # what was ended holds nothing
            host.load("b")
            await until(lambda: waits(host)["b"] == OTHERS)
            others.end()
            await used(host, "b")
            assert world.events == ["load b"]

    run(work())


@locks
def test_the_end_of_the_server_does_not_wait_for_other_programs(cache: Path) -> None:
    others = Turn()
    assert others.try_take()

    async def work() -> None:
        async with turns_of(World()) as host:
            await until(lambda: waits(host) == {"a": OTHERS})
        assert others.try_take()

    run(work())
    others.end()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("server-")]


@locks
def test_others_may_load_while_answers_are_waited_for(cache: Path) -> None:
    world, others = World(), Turn()

    async def work() -> None:
        async with turns_of(world) as host, contextlib.AsyncExitStack() as using:
            await using.enter_async_context(host.engine("a"))
            waiting = asyncio.create_task(used(host, "big"))
            await until(lambda: phases(host).get("a") == "unloading")
            await until(others.try_take)
            await using.aclose()  # a makes room, and now the other program loads
            await until(lambda: waits(host) == {"big": OTHERS})
            assert world.events == ["load a", "close a"]
            others.end()
            await waiting
            assert world.events[2:] == ["load big"]

    run(work())


@locks
def test_the_turn_ends_with_every_end_of_a_loading(cache: Path) -> None:
    world = World(failures=[OutOfMemory("none")] * 9)

    async def work() -> None:
        async with turns_of(world) as host:
            await until(lambda: phases(host) == {"a": "failed"})
            assert free()
            world.failures = [RuntimeError("a bug")]
            host.load("b")
            await until(lambda: phases(host).get("b") == "failed")
            assert free()
            world.gate = threading.Event()
            host.load("c")
            await until(lambda: phases(host).get("c") == "loading")
            assert not free()
            host.unload("c")
            await until(lambda: phases(host).get("c") == "failed")
            assert free()

    run(work())


@locks
def test_a_small_model_keeps_nobody_waiting(cache: Path) -> None:
    """One that leaves most of the memory free."""

    class Small(World):
        def decide(self, path: str, held: Any) -> Decision:
            return replace(super().decide(path, held), fills=False)

    world = Small(gate=threading.Event())

    async def work() -> None:
        assert world.gate is not None
        async with turns_of(world) as host:
            await until(lambda: phases(host) == {"a": "loading"})
            assert free()
            world.gate.set()
            await used(host, "a")

    run(work())


@pytest.mark.parametrize(
    ("rows", "fills"),
    [({"CPU": 3}, False), ({"CPU": 5}, True), ({"CPU": 3, "GPU": 3}, False), ({"CPU": 1, "GPU": 5}, True)],
)
def test_what_fills_memory(rows: dict[str, int], fills: bool) -> None:
    """Of 8 GiB of RAM and 8 GiB on a card."""
    from tensortier import catalogue

    machine = catalogue.hypothetical(["RTX 4060"], 8 * GIB, memory="DDR5-5600 x2")
    (card,) = [device for device in machine.devices if device.kind == "gpu"]
    machine = replace(
        machine,
        ram_available=8 * GIB,
        devices=tuple(replace(d, memory_free=8 * GIB) if d.name == card.name else d for d in machine.devices),
    )
    memory = tuple(DeviceMemory(card.name if d == "GPU" else d, n * GIB, 0, 0) for d, n in rows.items())
    planned: Any = type("Planned", (), {"plan": Plan("x", memory=memory), "hardware": machine})()
    assert planning._fills(planned) is fills


LOADER = """
import asyncio, threading
from tensortier.library import LibraryModel
from tensortier.server.host import ModelHost
from tensortier.server.planning import Decision
from tensortier.turn import Turn
from tensortier.types import Plan

class Planning:
    def decide(self, path, held):
        return Decision(Plan(path))

def engine(plan, progress, cancel):
    print("loading", flush=True)
    threading.Event().wait()

async def work():
    model = LibraryModel("a", "/models/a.gguf", 0, "", "", "")
    host = ModelHost(Planning(), model, engine=engine, list_models=lambda: [model], turn=Turn)
    await host.start()
    await asyncio.Event().wait()

asyncio.run(work())
"""


@locks
def test_a_server_that_is_killed_lets_the_next_one_in(cache: Path) -> None:
    world = World()
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "HOME": str(cache)}

    async def work() -> None:
        with subprocess.Popen(
            [sys.executable, "-c", LOADER], stdout=subprocess.PIPE, text=True, env=env
        ) as other:
            try:
                assert other.stdout is not None and other.stdout.readline() == "loading\n"
                async with turns_of(world) as host:
                    await until(lambda: waits(host) == {"a": OTHERS})
                    other.send_signal(signal.SIGKILL)
                    await used(host, "a")
            finally:
                other.kill()

    run(work())
    assert world.events == ["load a", "close a"]


def test_models_are_named_in_what_others_wait_for() -> None:
    """A name of a file says nothing but a name."""
    world = World(gate=threading.Event())
    odd = LibraryModel("<b>\n", "/models/a.gguf", GIB, "llama", "Q4_0", "test")

    async def work() -> None:
        assert world.gate is not None
        models = [odd, replace(odd, name="c", path="/models/c.gguf")]
        host = ModelHost(world, odd, engine=world.engine, list_models=lambda: models, models_max=2)
        await host.look()
        await host.start()
        host.load("c")
        await until(lambda: waits(host) == {"<b>\n": "", "c": "<b>\n to be loaded"})
        world.gate.set()
        await host.close()

    run(work())
