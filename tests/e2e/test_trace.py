"""``tensortier trace`` on a real mixture; what the simulator says of it is what is measured while the model runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tensortier import gguf, routing, slots, tier
from tensortier.cli import main
from tensortier.cli.trace import experts_on_the_drive, rows_in_ram
from tensortier.engine import Engine
from tensortier.errors import UsageError
from tensortier.simulate import POLICIES, Outcome, Simulator, evenly, same_room
from tensortier.tier import PagedWeights
from tensortier.types import Plan, Sampling, Settings, TierStats
from tests import tier_runs as runs
from tests.models import moe

PROGRAM = [sys.executable, "-m", "tensortier"]
TEXT = "The sun is a star. Planets go round it, and the light of it takes eight minutes to reach us."
TOKENS = 24
SETTINGS = Settings(n_ctx=256, n_ubatch=8, threads=1)
OPTIONS = ("-n", str(TOKENS), "-c", "256", "-ub", "8", "-t", "1")


@pytest.fixture(scope="module")
def recorded(moe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The routing of a text and its continuation, recorded by the command."""
    path = tmp_path_factory.mktemp("trace") / "moe.trace"
    result = command(moe_path, "-o", path, "-p", TEXT, "--raw", *OPTIONS, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["file"] == str(path)
    assert found["file_bytes"] == path.stat().st_size
    assert (found["layers"], found["experts"], found["used"]) == (30, 8, 2)
    assert 0 < found["answer_tokens"] <= TOKENS
    # the last token is chosen, and never computed
    assert found["tokens"] == found["prompt_tokens"] + found["answer_tokens"] - 1
    return path


def command(model: Path, *arguments: str | Path, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, "trace", str(model), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def plan(moe_path: Path) -> Plan:
    """The plan that the command makes."""
    model = gguf.read(moe_path)
    return experts_on_the_drive(model, SETTINGS, rows_in_ram(model, SETTINGS), 8 << 30)


def stats_of(plan: Plan) -> TierStats:
    """Of the same run as the recorded one."""
    with Engine(plan) as engine:
        text = list(engine.complete(TEXT, Sampling(max_tokens=TOKENS, seed=1)))
        assert text
        assert engine.paged is not None
        return engine.paged.stats()


def with_room(plan: Plan, policy: str, capacity: tuple[int, ...], profile: Path) -> Plan:
    """``plan`` with the smallest budget that gives the policy this room, whatever the drive's sectors."""
    assert plan.tier is not None
    model = gguf.read(plan.model)
    for sector in (512, 4096, 1):
        layers = slots.layers_of(model, tier.paged_tensors(model, plan), sector)
        one = max(layer.slot_bytes for layer in layers)
        for nbytes in range(2 * one, 241 * one, one // 2):
            if slots.capacities(layers, 2, policy, nbytes) == capacity:
                settings = dataclasses.replace(
                    plan.tier,
                    expert_bytes=nbytes,
                    policy=policy,
                    profile=str(profile),
                    guesses=2 if policy == "lru" else 0,  # they change no decision
                    warm_start=False,
                )
                found = dataclasses.replace(plan, tier=settings)
                if room_of(found, policy) == capacity:
                    return found
                break
    raise AssertionError(f"no budget gives {policy} room for {capacity}")


def room_of(plan: Plan, policy: str) -> tuple[int, ...]:
    store = PagedWeights(plan)
    try:
        rooms = tuple(layer.capacity for layer in store.stats().layers)
    finally:
        store.close()
    return rooms[:1] if policy == "global-lru" else rooms


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_simulated_is_what_happens(policy: str, share: float, recorded: Path, plan: Plan) -> None:
    trace = routing.read(recorded)
    capacity = same_room(evenly(trace, share))
    stats = stats_of(with_room(plan, policy, capacity[policy], recorded))
    (simulated,) = Simulator(trace).run(capacity, (policy,))
    happened = Outcome(
        policy,
        capacity[policy],
        tuple(layer.hits for layer in stats.layers),
        tuple(layer.uses for layer in stats.layers),
    )
    assert happened == simulated
    assert stats.hit_rate == simulated.hit_rate
    assert 0.1 < stats.hit_rate < 0.95


def test_the_trace_is_what_the_routers_say(moe_path: Path, tmp_path: Path) -> None:
    """Against the choices computed in numpy from the routers' inputs."""
    tokens = list(runs.PROMPT[:32])
    _, expected = moe.evaluate(moe_path, tokens)
    path = tmp_path / "records"
    _, everything = runs.expert_bytes(moe_path)
    with runs.tiered(runs.tier_plan(moe_path, expert_bytes=everything)) as (model, ctx, paged):
        paged.trace(path)
        runs.logits(model, ctx, tokens)
        paged.trace(None)
    model_info = gguf.read(moe_path)
    trace = routing.publish(path, tmp_path / "x.trace", model_info, tuple(range(30)), 8, 2)
    assert trace.tokens == 32
    passes = dict(trace.passes())
    same = [
        set(chosen.tolist()) == set(passes[layer][2 * t : 2 * t + 2].tolist())
        for layer in range(30)
        for t, chosen in enumerate(expected.chosen[layer])
    ]
    assert sum(same) >= 0.99 * len(same)  # where two experts are nearly alike, rounding decides


@pytest.mark.parametrize("policy", POLICIES)
def test_budgets_hold_what_the_rule_says(policy: str, recorded: Path, moe_path: Path) -> None:
    """``slots`` against the native store, at budgets all over the range."""
    least, everything = runs.expert_bytes(moe_path)
    model = gguf.read(moe_path)
    budgets = [least + i * (everything - least) // 7 + 12345 * i for i in range(8)]
    rooms = []
    for budget in budgets:
        plan = runs.tier_plan(moe_path, expert_bytes=budget, policy=policy, profile=str(recorded))
        rooms.append(room_of(plan, policy))
    paged = tier.paged_tensors(model, runs.tier_plan(moe_path))
    rules = [
        [slots.capacities(slots.layers_of(model, paged, sector), 2, policy, budget) for budget in budgets]
        for sector in (512, 4096, 1)  # which it is, is the drive's affair
    ]
    assert rooms in rules
    assert rooms == sorted(rooms)
    assert len(set(rooms)) == len(rooms)


def test_layers_that_differ_in_size(synthetic: Callable[..., Path]) -> None:
    """Three parts or two, one layer's experts beginning at a sector and another's not."""
    path = synthetic(arch="qwen3next", layers=4, experts=16, used=4, merged=True, shared=512, qtype="Q8_0")
    model = gguf.read(path)
    least, everything = runs.expert_bytes(path)
    paged = tier.paged_tensors(model, runs.tier_plan(path))
    for budget in (least, everything // 3, everything // 2, everything):
        rooms = room_of(runs.tier_plan(path, expert_bytes=budget), "lru")
        assert rooms in [
            slots.capacities(slots.layers_of(model, paged, sector), 4, "lru", budget)
            for sector in (512, 4096, 1)
        ]


# --- the command


def refusal(result: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The one line of a command that was refused."""
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("tensortier: error: ")
    return result.stderr


def test_what_is_refused(moe_path: Path, smollm2_path: Path, recorded: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.trace"
    before = recorded.read_bytes()
    assert "has no routed experts" in refusal(command(smollm2_path, "-p", "Hi", "-o", target))
    assert "--force replaces it" in refusal(command(moe_path, "-p", "Hi", "-o", recorded))
    assert "is a folder" in refusal(command(moe_path, "-p", "Hi", "-o", tmp_path))
    assert "there is no folder" in refusal(command(moe_path, "-p", "Hi", "-o", tmp_path / "none" / "x"))
    assert "standard input is empty" in refusal(command(moe_path, "-o", target))
    assert "-p and -f" in refusal(command(moe_path, "-p", "Hi", "-f", recorded, "-o", target))
    assert "too little for this model" in refusal(
        command(moe_path, "-p", "Hi", "-o", target, "--ram", "100MiB")
    )
    assert "context" in refusal(command(moe_path, "-p", TEXT * 20, "-c", "256", "-o", target, "-q"), 1)
    assert recorded.read_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_less_ram_and_the_same_routing(moe_path: Path, recorded: Path, tmp_path: Path) -> None:
    """Into a file that is there; half of the experts have to come and go."""
    target = tmp_path / "x.trace"
    target.write_text("old")
    result = command(moe_path, "-p", TEXT, "--raw", *OPTIONS, "-o", target, "--ram", "700MiB", "--force")
    assert result.returncode == 0, result.stderr
    assert "30 layers, 2 of 8 experts each" in result.stdout
    assert target.read_bytes() == recorded.read_bytes()
    assert list(tmp_path.iterdir()) == [target]


def take_interrupts() -> None:
    """A shell's background job ignores Ctrl-C, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def recorded_so_far(process: int, folder: Path) -> int:
    """Bytes of the files in ``folder`` that a process has open, with a name or without."""
    found = 0
    for file in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if str(file.readlink()).startswith(f"{folder}/"):
                found = max(found, file.stat().st_size)
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing(how: signal.Signals, moe_path: Path, tmp_path: Path) -> None:
    arguments = [*PROGRAM, "trace", str(moe_path), "-p", TEXT, "-n", "3000", "--raw", "-t", "1"]
    arguments += ["-o", str(tmp_path / "x.trace")]
    with subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=take_interrupts,
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        assert process.stderr.readline() == b"recording ...\n"
        end = time.monotonic() + 60
        while not recorded_so_far(process.pid, tmp_path):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert list(tmp_path.iterdir()) == []  # what is being written has no name
        os.kill(process.pid, how)
        out, err = process.communicate(timeout=30)
    told = b"tensortier: interrupted\n" if how is signal.SIGINT else b""
    assert process.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL)
    assert (out, err) == (b"", told)
    assert list(tmp_path.iterdir()) == []


def test_a_drive_that_fails_leaves_nothing(
    moe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = PagedWeights.trace

    def trace_and_fail(self: PagedWeights, path: Path | None) -> None:
        start(self, path)
        if path is not None:
            self.inject_fault(-5, after=40)

    monkeypatch.setattr(PagedWeights, "trace", trace_and_fail)
    code = main(["trace", str(moe_path), "-p", TEXT, *OPTIONS, "-q", "-o", str(tmp_path / "x.trace")])
    captured = capsys.readouterr()
    assert (code, captured.out) == (1, "")
    assert captured.err.startswith("tensortier: error: ")
    assert len(captured.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_least_ram_that_is_told_is_true(moe_path: Path) -> None:
    """In hundreds of KiB: that much suffices, and a little less does not."""
    model = gguf.read(moe_path)
    rows = rows_in_ram(model, SETTINGS)
    with pytest.raises(UsageError, match=r"it takes [\d.]+ MiB with a context of \d+ tokens") as caught:
        experts_on_the_drive(model, SETTINGS, rows, 100 << 20)
    least = float(str(caught.value).split("it takes ")[1].split(" MiB")[0])
    assert experts_on_the_drive(model, SETTINGS, rows, int((least + 0.1) * 2**20)).tier is not None
    with pytest.raises(UsageError):
        experts_on_the_drive(model, SETTINGS, rows, int((least - 0.2) * 2**20))
