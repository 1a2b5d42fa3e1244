"""What the server tells of itself, for machines; and streams without news."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tensortier.server import respond
from tensortier.server.respond import Work
from tensortier.types import Piece
from tests.server.process import ServerProcess, until

MIB = 1 << 20


def samples(server: ServerProcess) -> dict[tuple[str, tuple[str, ...]], float]:
    """(name, values of its labels) -> value, as Prometheus reads them."""
    status, text = server.get("/metrics")
    assert status == 200
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_was_done(server: ServerProcess) -> None:
    server.quiet()
    before = samples(server)
    never_ends = {"0": -100, "2": -100}
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        answers = [
            client.completions.create(
                model="smollm2", prompt=f"Metric {n}", max_tokens=5, logit_bias=never_ends
            )
            for n in range(3)
        ]
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nothing", prompt="x")
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="smollm2", prompt="x", temperature=9)
    after = samples(server)

    def more(name: str, *labels: str) -> float:
        return after[name, labels] - before.get((name, labels), 0.0)

    assert more("tensortier_requests_total", "completions", "200") == 3
    assert more("tensortier_requests_total", "completions", "404") == 1
    assert more("tensortier_requests_total", "completions", "400") == 1
    told = sum(answer.usage.completion_tokens for answer in answers if answer.usage)
    assert more("tensortier_completion_tokens_total", "smollm2") == told == 15
    assert after["tensortier_model_state", ("smollm2", "ready")] == 1
    assert after["tensortier_answers", ()] == after["tensortier_active", ("smollm2",)] == 0
    assert after["process_open_fds", ()] > 0 and after["tensortier_threads", ()] > 1
    row = server.stats()["models"][0]["memory"][0]
    assert row["device"] == "CPU" and row["allocated_bytes"] == row["planned_bytes"]


def test_weights_on_the_drive_are_told_of(synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """A mixture of 700 MB in 560 MiB, begun by a plan file."""
    mixture = {"layers": 12, "n_embd": 512, "n_ff": 1024, "experts": 64, "used": 4, "heads": 8, "kv_heads": 2}
    path = synthetic(**mixture)
    options = ["--no-calibrate", "--threads", "1", "--context", "512", "--ubatch", "64", "--no-repack"]
    command = [sys.executable, "-m", "tensortier", "plan", str(path), *options, "--ram", "560MiB", "--json"]
    plan = tmp_path / "plan.json"
    env = {**os.environ, "HOME": str(tmp_path)}
    plan.write_text(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    with ServerProcess("--plan", str(plan), "--parallel", "2", home=tmp_path) as running:
        running.ready()
        with openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
            name = client.models.list().data[0].id
            client.completions.create(model=name, prompt="The sun is", max_tokens=4, temperature=0)
        found = running.quiet()["models"][0]
        drive = found["drive"]
        assert 0 < drive["expert_hit_rate"] < 1 and drive["bytes_read"] > 10 * MIB
        assert drive["bytes_per_second"] > MIB and drive["memory_bytes"] < 560 * MIB
        rows = {row["device"]: row for row in found["memory"]}
        assert 0 < rows["TIER"]["allocated_bytes"] <= rows["TIER"]["planned_bytes"]

        def told_alike() -> bool:  # once what was read ahead is there
            told = samples(running)["tensortier_tier_drive_bytes_total", (name,)]
            return bool(told == running.stats()["models"][0]["drive"]["bytes_read"])

        until(told_alike)
        assert running.stop() == 0


class Silent:
    """A request whose pieces come when the test says so."""

    def listen(self, callback: Callable[[Piece | None], None]) -> None:
        self.tell = callback

    def cancel(self) -> None:
        self.cancelled = True


def test_streams_without_news_are_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(respond, "_PING_SECONDS", 0.02)

    async def work() -> list[Any]:
        request = Silent()
        held = Work(None, "silent")  # type: ignore[arg-type]
        await held.start(lambda: request)  # type: ignore[arg-type, return-value]
        seen: list[Any] = []
        async for pieces in held.pieces():
            seen.append(pieces)
            if len(seen) == 3:
                request.tell(Piece("news"))
                request.tell(None)
        held.end()
        assert request.cancelled
        return seen

    assert asyncio.run(work()) == [[], [], [], [(0, Piece("news"))]]


def test_an_event_is_one_line_to_every_reader() -> None:
    """httpx, like str.splitlines, ends lines at more than CR and LF."""
    value = {"content": "".join(map(chr, range(0x3000))) + "\U0001f600"}
    text = respond.to_json(value).decode()
    assert text.splitlines() == [text] and json.loads(text) == value
