"""Counters of /metrics never go back, whatever is loaded, replaced and freed: read as Prometheus reads them."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tensortier.server.limits import Gate, Settings
from tensortier.server.metrics import Metrics
from tensortier.types import Activity, DeviceMemory, Plan
from tests.server.process import ServerProcess
from tests.server.test_host import GIB, StandIn, World, host_of, phases, run, until, used

END_TOKENS = ("0", "2")  # of SmolLM2
Samples = dict[tuple[str, tuple[str, ...]], float]


def read(text: str) -> Samples:
    """Fails where a series is there twice, which Prometheus refuses."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sample.labels.values()))
            assert key not in found, key
            found[key] = sample.value
    return found


class Counting(StandIn):
    """One that has done something, with weights on the drive."""

    def __init__(self, plan: Plan, world: World) -> None:
        super().__init__(plan, world)
        self.done = 0

    def activity(self) -> Activity:
        assert not self.closed, "nobody asks one that is freed"
        return Activity(0, 0, 10 * self.done, self.done, 0.0, 0, 256)

    @property
    def paged(self) -> Any:
        stats = SimpleNamespace(
            drive_bytes=1000 * self.done, stall_seconds=self.done / 4, hit_rate=0.5, memory_bytes=7
        )
        return SimpleNamespace(stats=lambda: stats)


class Working(World):
    def engine(self, *arguments: Any) -> Any:
        found = super().engine(*arguments)
        self.alive.remove(found)
        return Counting(found.plan, self)


def test_counters_outlive_their_engines() -> None:
    world = Working()

    async def work() -> None:
        async with host_of(world) as host:
            metrics = Metrics(host, Gate(Settings()))
            before: Samples = {}

            def look() -> Samples:
                found = read(generate_latest(metrics.registry).decode())
                for key, value in before.items():
                    if key[0].startswith("tensortier") and key[0].endswith("_total"):
                        assert found[key] >= value, key
                before.clear()
                before.update(found)
                return found

            def tokens(name: str) -> float:
                return look()["tensortier_completion_tokens_total", (name,)]

            async with host.engine("a") as lease:
                lease.engine.done = 5  # type: ignore[attr-defined]
            assert tokens("a") == 5
            host.unload("a")
            look()
            await until(lambda: not host.state())
            found = look()
            assert found["tensortier_completion_tokens_total", ("a",)] == 5
            assert found["tensortier_prompt_tokens_total", ("a",)] == 50
            assert found["tensortier_tier_drive_bytes_total", ("a",)] == 5000
            assert found["tensortier_tier_stall_seconds_total", ("a",)] == 1.25
            assert ("tensortier_active", ("a",)) not in found, "of what it does now nothing is told"
            async with host.engine("a") as lease:
                assert tokens("a") == 5
                lease.engine.done = 2  # type: ignore[attr-defined]
                assert tokens("a") == 7
                for context in (1, 2, 3):  # replaced while it answers: for a moment it is there several times
                    host.load("a", Plan("/models/a.gguf", memory=(DeviceMemory("CPU", context * GIB, 0, 0),)))
                await until(lambda: "unloading" in phases(host).values())
                assert tokens("a") == 7
                lease.engine.done = 4  # type: ignore[attr-defined]
                assert tokens("a") == 9
            await used(host, "a")
            assert tokens("a") == 9
            await used(host, "b")
            found = look()
            assert found["tensortier_completion_tokens_total", ("b",)] == 0
            assert found["tensortier_model_state", ("b", "ready")] == 1
            async with host.engine("big") as lease:  # the others make room
                lease.engine.done = 1  # type: ignore[attr-defined]
            assert (tokens("a"), tokens("b"), tokens("big")) == (9, 0, 1)

    run(work())


def test_in_a_server(tmp_path: Path) -> None:
    """Its counters add up to what its answers say, over two loadings of a model."""
    with ServerProcess("smollm2", "--threads", "1", "--no-calibrate", home=tmp_path) as server:
        server.ready()

        def post(path: str, **body: object) -> Any:
            kind = {"Content-Type": "application/json"}
            request = urllib.request.Request(server.url + path, json.dumps(body).encode(), kind)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        def counted(prompt: str) -> tuple[int, int]:
            asked = {"prompt": prompt, "max_tokens": 5, "logit_bias": dict.fromkeys(END_TOKENS, -100)}
            usage = post("/v1/completions", model="smollm2", **asked)["usage"]
            return usage["prompt_tokens"], usage["completion_tokens"]

        def told() -> tuple[float, float]:
            found = read(server.get("/metrics")[1])
            kinds = ("prompt", "completion")
            prompt, completion = (found[f"tensortier_{kind}_tokens_total", ("smollm2",)] for kind in kinds)
            return prompt, completion

        first = counted("One")
        assert told() == first
        post("/api/unload", model="smollm2")
        end = time.monotonic() + 30
        while server.stats()["models"]:
            assert told() == first and time.monotonic() < end
            time.sleep(0.01)
        assert told() == first
        second = counted("A dozen")
        assert told() == (first[0] + second[0], first[1] + second[1])
