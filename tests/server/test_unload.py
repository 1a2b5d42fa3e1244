"""A person frees a model: with the stand-ins of test_host, and in a real server."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tensortier.errors import LoadError, ModelNotFound
from tensortier.server.loading import ModelUnavailable
from tests.server.process import PATIENCE, ServerProcess
from tests.server.test_host import World, host_of, phases, run, until


def test_its_memory_is_there_for_the_next() -> None:
    world = World()

    async def work() -> None:
        async with host_of(world) as host:
            for name in ("a", "b"):
                async with host.engine(name):
                    pass
            assert host.unload("B.gguf") == "b"
            await until(lambda: phases(host) == {"a": "ready"})
            assert world.events == ["load a", "load b", "close b"]
            assert host.unload("b") == "b"  # it is gone already
            async with host.engine("c"):
                pass
            assert phases(host) == {"a": "ready", "c": "ready"} and world.most_alive == 2
            async with host.engine("b") as lease:  # and comes back when it is asked for
                assert lease.name == "b"

    run(work())


def test_answers_under_way_have_a_moment_and_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensortier.server.host._PATIENCE_SECONDS", 0.1)
    world = World()

    async def work() -> None:
        async with host_of(world) as host:
            async with host.engine("a"):
                engine = world.alive[0]
                host.unload("a")
                assert phases(host) == {"a": "unloading"} and not engine.cancelled.is_set()
                await until(engine.cancelled.is_set)
                assert not engine.closed, "not under the one that uses it"
            await until(lambda: engine.closed)

    run(work())


def test_loading_is_ended() -> None:
    world = World(gate=threading.Event())

    async def work() -> None:
        async with host_of(world) as host:
            await until(lambda: phases(host) == {"a": "loading"})
            host.unload("a")
            with pytest.raises(ModelUnavailable, match="the loading was ended"):
                async with host.engine("a"):
                    pass
            assert phases(host) == {"a": "failed"}
            host.unload("a")  # what failed is only forgotten
            assert not host.state() and not world.events

    run(work())


def test_what_failed_is_forgotten_and_unknown_names_are_refused() -> None:
    world = World(failures=[LoadError("no")])

    async def work() -> None:
        async with host_of(world) as host:
            await until(lambda: phases(host) == {"a": "failed"})
            host.unload("a")
            assert phases(host) == {}
            for name in ("nothing", "../a", "/models/a.gguf"):
                with pytest.raises(ModelNotFound):
                    host.unload(name)
            await asyncio.sleep(0)

    run(work())


def test_in_a_server(tmp_path: Path) -> None:
    with ServerProcess("smollm2", "--threads", "1", "--no-calibrate", home=tmp_path) as server:
        server.ready()

        def post(path: str, body: object) -> int:
            request = urllib.request.Request(
                server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as exc:
                exc.close()
                return exc.code

        def resident() -> int:
            return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096

        before = resident()
        assert post("/api/unload", {"model": "smollm2"}) == 202
        end = time.monotonic() + PATIENCE
        while server.stats()["models"]:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert before - resident() > 100e6  # weights and KV cache
        assert post("/api/unload", {"model": "nothing"}) == 404
        assert post("/api/unload", {}) == 400
        assert post("/v1/completions", {"model": "smollm2", "prompt": "x", "max_tokens": 1}) == 200
        assert server.stop() == 0
        assert "Traceback" not in "".join(server.log)
