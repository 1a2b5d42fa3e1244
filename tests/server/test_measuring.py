"""A real server whose measurement goes on for as long as the test likes: what waits for it, and what is refused."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.process import ServerProcess
from tests.server.test_api import post
from tests.server.test_counters import read

WHAT = "the measurement of this machine"
# Python reads this in every process before the program; only the server's measures
INSTEAD = """
import time
from pathlib import Path
from tensortier import measuring

def measured(machine, settings, rpc, say, progress=None):
    folder = Path({folder!r})
    (folder / "begun").touch()
    while not (folder / "over").exists():
        progress(0.42)
        time.sleep(0.01)
    say("nothing was measured")

measuring.measured = measured
"""
HOLDER = """
import sys
from tensortier.turn import Turn
turn = Turn()
turn.take(lambda: None)
print("inside", flush=True)
sys.stdin.read()
"""


class Measuring(ServerProcess):
    """Serves "tiny" and smollm2. ``over()`` ends the measurement under way."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.folder = folder
        (folder / "sitecustomize.py").write_text(INSTEAD.format(folder=str(folder)))
        options = ("tiny", "--threads", "1", "--no-calibrate", "--context", "512")
        super().__init__(*options, home=folder, models=models, more={"PYTHONPATH": str(folder)})

    def over(self) -> None:
        (self.folder / "over").touch()

    def phases(self) -> dict[str, tuple[str, str]]:
        return {m["name"]: (m["phase"], m["waits_for"]) for m in self.stats()["models"]}


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def holder(home: Path) -> Iterator[subprocess.Popen[str]]:
    """Another program of the same user that loads until it is killed."""
    env = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER], text=True, env=env, **pipes) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "inside\n"
            yield other
        finally:
            other.kill()


@pytest.fixture
def server(tmp_path: Path, models_folder: Path) -> Iterator[Measuring]:
    with Measuring(tmp_path, models_folder) as running:
        yield running.ready()
        assert running.stop() == 0, "".join(running.log)
        assert "Traceback" not in "".join(running.log)


def complete(server: ServerProcess, model: str) -> tuple[int, Any]:
    return post(server, "/v1/completions", {"model": model, "prompt": "x", "max_tokens": 2})


def test_everything_waits_for_a_measurement_and_is_done_afterwards(server: Measuring) -> None:
    status, plan = post(server, "/api/plan", {"model": "tiny", "context": 256})
    assert status == 200
    assert post(server, "/api/measure", {}) == (202, {"seconds": 30})
    until((server.folder / "begun").exists)
    assert post(server, "/api/measure", {})[0] == 202, "it is the same one"
    assert server.get("/api/machine")[1]["measuring"] == 0.42
    assert server.get("/health")[0] == 200
    with concurrent.futures.ThreadPoolExecutor() as threads:
        loaded = threads.submit(complete, server, "tiny")
        on_demand = threads.submit(complete, server, "smollm2")
        planned = threads.submit(post, server, "/api/plan", {"model": "tiny", "context": 512})
        until(lambda: server.phases().get("smollm2") == ("waiting", WHAT))
        until(lambda: server.stats()["answers"] == 2)
        assert not any(task.done() for task in (loaded, on_demand, planned))
        server.over()
        for task in (loaded, on_demand, planned):
            assert task.result(60)[0] == 200
    (server.folder / "over").unlink()

    assert post(server, "/api/measure", {})[0] == 202, "and again"
    until(lambda: server.get("/api/machine")[1]["measuring"] == 0.42)
    assert post(server, "/api/load", {"plan": plan["id"]}) == (202, {"model": "tiny"})
    assert post(server, "/api/unload", {"model": "smollm2"}) == (202, {"model": "smollm2"})
    until(lambda: server.get("/health")[1].get("waits_for") == WHAT)
    found = read(server.get("/metrics")[1])
    assert found["tensortier_model_state", ("tiny", "waiting")] == 1
    assert found["tensortier_model_state", ("smollm2", "unloading")] == 1
    server.over()
    until(lambda: server.phases() == {"tiny": ("ready", "")})
    assert complete(server, "tiny")[0] == 200


def test_it_is_refused_while_something_goes_on(server: Measuring) -> None:
    with holder(server.folder) as other:
        status, problem = post(server, "/api/measure", {})
        assert status == 409 and problem["error"]["code"] == "busy"
        assert problem["error"]["message"] == "another tensortier is loading a model"
        with concurrent.futures.ThreadPoolExecutor() as threads:
            on_demand = threads.submit(complete, server, "smollm2")
            until(lambda: server.phases().get("smollm2", ("", ""))[0] == "waiting")
            status, problem = post(server, "/api/measure", {})
            assert status == 409
            assert problem["error"]["message"] == "the server is busy: smollm2 is being loaded"
            other.kill()
            assert on_demand.result(60)[0] == 200
    server.quiet()
    server.over()
    assert post(server, "/api/measure", {})[0] == 202


def test_a_server_ends_in_the_middle_of_one(tmp_path: Path, models_folder: Path) -> None:
    with Measuring(tmp_path, models_folder) as running:
        running.ready()
        assert post(running, "/api/measure", {})[0] == 202
        with concurrent.futures.ThreadPoolExecutor() as threads:
            answers = [threads.submit(complete, running, name) for name in ("tiny", "smollm2")]
            until(lambda: running.stats()["answers"] == 2)
            assert running.stop() == 0
            for answer in answers:
                status, problem = answer.result(60)
                assert status == 503 and problem["error"]["code"] == "stopping", problem
        assert "Traceback" not in "".join(running.log)
        assert "warning" not in "".join(running.log)


def test_a_server_waits_for_another_program_that_loads(tmp_path: Path, models_folder: Path) -> None:
    with holder(tmp_path) as other, Measuring(tmp_path, models_folder) as running:
        until(lambda: running.get("/health")[1].get("phase") == "waiting")
        health = running.get("/health")
        assert health[0] == 503 and health[1]["status"] == "loading"
        assert health[1]["waits_for"] == "another tensortier to finish loading"
        assert post(running, "/api/unload", {"model": "tiny"})[0] == 202
        assert running.get("/health")[1] == {"status": "failed", "error": "the loading was ended"}
        with concurrent.futures.ThreadPoolExecutor() as threads:
            on_demand = threads.submit(complete, running, "smollm2")
            until(
                lambda: running.phases().get("smollm2") == ("waiting", "another tensortier to finish loading")
            )
            other.kill()  # as good as any other end
            assert on_demand.result(60)[0] == 200
        assert [line for line in running.log if "waiting for another tensortier" in line]
        assert running.stop() == 0
