"""Figures of what goes on, and measuring, with engines and measurements that are made up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tensortier import catalogue, hardware, measuring
from tensortier.deciding import Wish
from tensortier.library import LibraryModel
from tensortier.server import live as module
from tensortier.server import plans
from tensortier.server.api import _Measurement
from tensortier.server.live import Live
from tensortier.types import Activity, DeviceMemory, Plan, Settings
from tests.server.process import PATIENCE


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def engine(stats: Callable[[], Any] | None) -> Any:
    activity = Activity(1, 2, 30, 40, 12.345, 64, 256)
    return SimpleNamespace(
        activity=lambda: activity, paged=None if stats is None else SimpleNamespace(stats=stats)
    )


def loaded(name: str, phase: str, found: Any) -> Any:
    return SimpleNamespace(name=name, phase=phase, engine=found)


def test_rates_are_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    told = {"uses": 0, "hits": 0, "bytes": 0}

    def stats() -> Any:
        layer = SimpleNamespace(uses=told["uses"], hits=told["hits"])
        return SimpleNamespace(
            layers=[layer], dense_uses=0, dense_hits=0, drive_bytes=told["bytes"], memory_bytes=7
        )

    seen, models = Live(), (loaded("a", "ready", engine(stats)),)
    first = seen.of(models)[0]
    assert first["tokens_per_second"] == 12.35 or first["tokens_per_second"] == 12.34
    assert (first["active"], first["waiting"], first["context_used"], first["context"]) == (1, 2, 64, 256)
    assert first["drive"]["hit_rate"] is None and first["drive"]["bytes_per_second"] == 0
    told.update(uses=100, hits=25, bytes=3000)
    clock.now += 1
    one = seen.of(models)[0]["drive"]
    assert (one["hit_rate"], one["bytes_per_second"]) == (0.25, 3000)
    for _ in range(6):  # nothing more: it fades, and what was stays in the sum
        clock.now += 1
        last = seen.of(models)[0]["drive"]
    assert (last["hit_rate"], last["bytes_per_second"], last["hit_rate_ever"]) == (None, 0, 0.25)


def test_only_models_that_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    models = (
        loaded("a", "loading", None),
        loaded("b", "unloading", engine(None)),
        loaded("c", "ready", engine(None)),
    )
    (row,) = Live().of(models)
    assert row["model"] == "c" and row["drive"] is None


def test_measuring_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, begun = threading.Event(), threading.Event()

    def measured(machine: Any, settings: Any, rpc: Any, say: Any, progress: Any) -> None:
        progress(0.42)
        say("the drive is slow")
        begun.set()
        go_on.wait(PATIENCE)

    monkeypatch.setattr(measuring, "measured", measured)

    async def story() -> None:
        running = _Measurement(SimpleNamespace(wish=Wish("x"), machine=None))  # type: ignore[arg-type]
        assert running.state() == {"fraction": None, "warnings": []}
        running.start()
        running.start()  # is one
        await asyncio.to_thread(begun.wait, PATIENCE)
        assert running.state() == {"fraction": 0.42, "warnings": ["the drive is slow"]}
        go_on.set()
        while running.state()["fraction"] is not None:
            await asyncio.sleep(0.01)

    asyncio.run(story())


def test_too_many_questions_are_refused(monkeypatch: pytest.MonkeyPatch, smollm2_path: Path) -> None:
    monkeypatch.setattr(plans, "_WAITING", 2)
    model = LibraryModel("smollm2", str(smollm2_path), 0, "", "", "")

    async def story() -> None:
        made = plans.Plans(Wish(str(smollm2_path)), hardware.probe())
        try:
            asked = [made.curve(plans.Choice(model, context)) for context in (512, 1024, 2048, 4096)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert [isinstance(f, plans.Busy) for f in found] == [False, False, True, True]
        finally:
            await made.close()

    asyncio.run(story())


GIB = 1 << 30


@pytest.mark.parametrize(
    ("now", "settings", "expected"),
    [
        (30, Settings(), 32),  # a little less than at first is the same
        (20, Settings(load_mode="none"), 26),  # others took 6 GiB, and the model gives 6 back
        (20, Settings(load_mode="mmap", repack=False), 22),  # its 4 GiB of weights are the kernel's already
        (20, Settings(load_mode="mmap", repack=True), 26),
        (31, Settings(load_mode="none"), 32),  # never more than at first
    ],
)
def test_memory_that_others_took_is_not_planned_with(
    monkeypatch: pytest.MonkeyPatch, now: int, settings: Settings, expected: int
) -> None:
    machine = catalogue.hypothetical(["RTX 4090"], 64 * GIB, memory="DDR5-5600 x2")
    machine = replace(machine, ram_available=32 * GIB)
    monkeypatch.setattr(plans.system, "memory", lambda: SimpleNamespace(available=now * GIB))
    rows = (
        DeviceMemory("CPU", 4 * GIB, GIB // 2, GIB // 2),
        DeviceMemory("CUDA0", 9 * GIB, 0, 0),
        DeviceMemory("TIER", GIB // 2, 0, 0),
        DeviceMemory("process", GIB // 2, 0, 0),
    )
    loaded = [Plan("x", settings=settings, memory=rows)]
    assert plans.without(machine, loaded).ram_available == expected * GIB
    assert plans.without(machine, ()).ram_available == (32 if now >= 31 else now) * GIB
