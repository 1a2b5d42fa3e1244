"""What goes wrong with weights on the drive: the request fails with a reason, and the engine goes on."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tensortier import gguf, memory, routing
from tensortier.engine import Engine
from tensortier.errors import Cancelled, GenerationError, LoadError, PlanError, UsageError
from tensortier.tier import PagedWeights
from tensortier.types import Override, Placement, Plan, Sampling, Tier
from tests import tier_runs as runs
from tests.engine_moments import ENDLESS, Operations, together, wait_until

GREEDY = Sampling(temperature=0.0, max_tokens=8)
PROMPT = "The lighthouse on the cliff"


@pytest.fixture(scope="module")
def small_path(synthetic: Callable[..., Path]) -> Path:
    return synthetic(layers=3, experts=8, used=2, qtype="Q4_0")


@pytest.fixture
def copied(small_path: Path, tmp_path: Path) -> Path:
    """A model that a test may damage."""
    return Path(shutil.copy(small_path, tmp_path / "model.gguf"))


def text(engine: Engine, sampling: Sampling = GREEDY) -> str:
    return "".join(piece.text for piece in engine.complete(PROMPT, sampling))


def least_plan(path: Path, **fields: object) -> Plan:
    """Room for one token's experts in one layer: everything is read anew."""
    return runs.tier_plan(path, expert_bytes=runs.expert_bytes(path)[0], **fields)


def stock_text(path: Path) -> str:
    with Engine(Plan(str(path), settings=runs.SETTINGS)) as engine:
        return text(engine)


@pytest.fixture(scope="module")
def expected(small_path: Path) -> str:
    return stock_text(small_path)


@pytest.mark.parametrize("reader", ["auto", "threads"])
@pytest.mark.parametrize("after", [0, 7])
def test_a_read_error_fails_the_request_only(
    reader: str, after: int, small_path: Path, expected: str
) -> None:
    with Engine(least_plan(small_path, reader=reader)) as engine:
        assert engine.paged is not None
        engine.paged.inject_fault(-errno.EIO, after=after)
        with pytest.raises(GenerationError, match=r"reading .*\.gguf failed at byte \d+: Input/output error"):
            text(engine)
        assert text(engine) == expected


def test_a_read_error_of_a_dense_weight(smollm2_path: Path) -> None:
    plan = runs.tier_plan(smollm2_path, runs.DENSE, dense_bytes=3 << 20)
    with Engine(plan) as engine:
        assert engine.paged is not None
        engine.paged.inject_fault(-errno.EIO, after=40, count=10_000)
        with pytest.raises(GenerationError, match="Input/output error"):
            text(engine)
        engine.paged.inject_fault(0, count=0)
        assert text(engine) == stock_text(smollm2_path)


def test_a_read_may_stop_early(small_path: Path, expected: str) -> None:
    """The operating system may give fewer bytes than were asked for; the rest is asked for again."""
    with Engine(least_plan(small_path)) as engine:
        assert engine.paged is not None
        engine.paged.inject_fault(4096, count=50)
        assert text(engine) == expected


def test_an_end_of_file_in_the_middle(small_path: Path, expected: str) -> None:
    with Engine(least_plan(small_path)) as engine:
        assert engine.paged is not None
        engine.paged.inject_fault(0, after=3)
        with pytest.raises(GenerationError, match=r"ends at byte .* it was cut while in use"):
            text(engine)
        assert text(engine) == expected


def test_a_file_cut_while_in_use(copied: Path) -> None:
    with Engine(least_plan(copied)) as engine:
        os.truncate(copied, copied.stat().st_size // 2)
        for _ in range(2):
            with pytest.raises(GenerationError, match=r"was cut to .* bytes while it was in use"):
                text(engine)
        assert engine.tokenize("still here")


def test_a_file_written_to_while_in_use(copied: Path) -> None:
    with Engine(least_plan(copied)) as engine:
        with copied.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(bytes(100))
        with pytest.raises(GenerationError, match="was written to while it was in use; load it again"):
            text(engine)


def test_a_file_replaced_by_another(copied: Path, tmp_path: Path, expected: str) -> None:
    """The old file is still open, so nothing changes."""
    with Engine(least_plan(copied)) as engine:
        other = tmp_path / "other.gguf"
        other.write_bytes(b"something else")
        other.replace(copied)
        assert text(engine) == expected


def test_a_resident_weight_that_cannot_be_read(smollm2_path: Path) -> None:
    """What always stays is read when the model is loaded, so that is what fails."""
    paged = PagedWeights(runs.tier_plan(smollm2_path, runs.DENSE, dense_bytes=100 << 20))
    paged.inject_fault(-errno.EIO, after=10)
    with pytest.raises(LoadError, match="Input/output error"):
        paged.loaded()
    paged.close()


def test_loading_can_be_cancelled(smollm2_path: Path, small_path: Path) -> None:
    """While what stays is read, which may be many gigabytes: what was not asked for yet is not read."""
    plan = runs.tier_plan(smollm2_path, runs.DENSE, dense_bytes=100 << 20, queue_depth=1, read_bytes=4096)
    paged = PagedWeights(plan)
    with pytest.raises(Cancelled):
        paged.loaded(lambda: True)
    assert 0 < paged.stats().drive_bytes < 1 << 20
    paged.close()


def test_a_load_that_fails_leaves_nothing(small_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step: before llama.cpp loads the model, after that, and while what stays is read."""
    with Engine(least_plan(small_path)) as engine:
        text(engine)
    files, tasks, before = entries("/proc/self/fd"), entries("/proc/self/task"), resident()
    plan = least_plan(small_path, reader="threads")
    original = PagedWeights.loaded

    def unreadable(self: PagedWeights, *_: object) -> None:
        original(self)
        raise LoadError("the drive is gone")

    for _ in range(10):
        monkeypatch.setattr(PagedWeights, "loaded", unreadable)
        with pytest.raises(LoadError, match="the drive is gone"):
            Engine(plan)
        monkeypatch.setattr(PagedWeights, "loaded", original)
        stop = threading.Event()
        stop.set()
        with pytest.raises(Cancelled):
            Engine(plan, cancel=stop)
        with pytest.raises(PlanError, match="n_ctx"):
            Engine(replace(plan, settings=replace(plan.settings, n_ctx=1 << 31)))
    assert entries("/proc/self/fd") <= files
    wait_until(lambda: entries("/proc/self/task") <= tasks)
    assert resident() - before < 32 << 20


# --- plans that cannot be


def test_too_little_room(small_path: Path, smollm2_path: Path) -> None:
    with pytest.raises(LoadError, match=r"the experts of one token in one layer take \d+ bytes"):
        Engine(runs.tier_plan(small_path, expert_bytes=100_000))
    with pytest.raises(LoadError, match=r"the largest weight that passes through takes \d+ bytes"):
        Engine(runs.tier_plan(smollm2_path, runs.DENSE, dense_bytes=100_000))


def test_plans_that_make_no_sense(small_path: Path) -> None:
    plan = least_plan(small_path)
    assert plan.tier is not None
    for wrong, told in (
        (replace(plan, tier=None), 'no section "tier"'),
        (replace(plan, placement=Placement()), "no override sends"),
        (replace(plan, tier=replace(plan.tier, policy="fifo")), "unknown policy 'fifo'"),
        (replace(plan, tier=replace(plan.tier, reader="dma")), "unknown reader 'dma'"),
        (replace(plan, tier=replace(plan.tier, policy="static")), "needs a profile"),
        (
            replace(plan, placement=Placement(overrides=(Override("token_embd", "TIER"),))),
            "token_embd.weight cannot stay on the drive",
        ),
        (
            replace(plan, placement=Placement(overrides=(Override("attn_norm", "TIER"),))),
            "attn_norm.weight cannot stay on the drive",
        ),
    ):
        with pytest.raises(PlanError, match=told):
            Engine(wrong)


def test_a_profile_of_fewer_experts(small_path: Path, tmp_path: Path) -> None:
    """A trace that says it is of this model, but of which the choices do not cover all experts."""
    records = tmp_path / "records"
    np.array([number for layer in range(3) for number in (layer, 1, 1, 0)], "<i4").tofile(records)
    routing.publish(records, tmp_path / "t", gguf.read(small_path), (0, 1, 2), 2, 1)
    plan = least_plan(small_path, policy="static", profile=str(tmp_path / "t"))
    with pytest.raises(UsageError, match="is of layers with 2 experts, not 8"):
        Engine(plan)


def test_a_file_changed_between_header_and_load(copied: Path) -> None:
    plan = least_plan(copied)
    model = gguf.read(copied)
    with copied.open("ab") as file:
        file.write(bytes(4096))
    paged = PagedWeights.__new__(PagedWeights)
    assert plan.tier is not None
    with pytest.raises(LoadError, match="was changed while it was loaded"):
        _open_with(paged, model, plan)


def _open_with(paged: PagedWeights, model: gguf.ModelInfo, plan: Plan) -> None:
    """The constructor with a header that was read before."""
    original = gguf.read
    gguf.read = lambda _path: model  # type: ignore[assignment]
    try:
        PagedWeights.__init__(paged, plan)
    finally:
        gguf.read = original


def test_memory_is_predicted_without_the_data(small_path: Path) -> None:
    rows = {row.device: row for row in memory.predict(least_plan(small_path))}
    tensors = gguf.read(small_path).tensors
    paged = sum(t.nbytes for t in tensors if t.role.is_routed_expert)
    assert rows["TIER"].weights_bytes == paged
    assert rows["TIER"].compute_bytes == rows["TIER"].kv_bytes == 0
    assert rows["CPU"].weights_bytes >= sum(t.nbytes for t in tensors) - paged


# --- nothing is left behind


def resident() -> int:
    """Bytes of this process, without what its allocator keeps although it was freed."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return runs.resident_bytes()


def entries(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


@pytest.mark.parametrize("reader", ["auto", "threads"])
def test_fifty_loads_leak_nothing(reader: str, small_path: Path) -> None:
    def once() -> None:
        with Engine(least_plan(small_path, reader=reader)) as engine:
            text(engine, replace(GREEDY, max_tokens=1))

    for _ in range(5):
        once()
    files, threads, before = entries("/proc/self/fd"), threading.active_count(), resident()
    tasks = entries("/proc/self/task")
    for _ in range(50 if reader == "auto" else 10):
        once()
    assert entries("/proc/self/fd") <= files
    assert threading.active_count() <= threads
    wait_until(
        lambda: entries("/proc/self/task") <= tasks
    )  # they end a moment after those who wait for them go on
    # each load allocates tens of MB
    assert resident() - before < 64 << 20


def test_cancelled_while_reading(moe_path: Path) -> None:
    """At any read: nothing more is computed than what was under way, and nothing is kept for the request."""
    least, _ = runs.expert_bytes(moe_path)
    with Engine(runs.tier_plan(moe_path, expert_bytes=least)) as engine:
        before = text(engine)
        operations = Operations(engine)
        list(engine.complete(PROMPT * 5, Sampling(temperature=0.0, max_tokens=1)))
        of_a_prompt = operations.asked
        files = tasks = held = 0
        for number in range(21):
            with together(engine):
                request = engine.complete(
                    f"{number} {PROMPT * 40}", Sampling(temperature=0.0, grammar=ENDLESS)
                )
                operations.asked, operations.limit = 0, 1 + number * of_a_prompt // 20
                operations.then = request.cancel
            with pytest.raises(Cancelled):
                list(request)
            assert operations.asked < operations.limit + 100
            assert request.stats.completion_tokens == 0
            if number == 0:
                assert text(engine) == before
                files, tasks, held = entries("/proc/self/fd"), entries("/proc/self/task"), resident()
        assert text(engine) == before
        assert entries("/proc/self/fd") <= files
        wait_until(lambda: entries("/proc/self/task") <= tasks)
        assert resident() - held < 16 << 20


def test_closed_in_the_middle_of_a_request(moe_path: Path) -> None:
    least, _ = runs.expert_bytes(moe_path)
    engine = Engine(runs.tier_plan(moe_path, expert_bytes=least))
    pieces = engine.complete(PROMPT, Sampling(temperature=0.0, grammar=ENDLESS))
    next(pieces)
    engine.close()
    with pytest.raises(Cancelled):
        list(pieces)


def test_a_model_without_paged_weights_is_left_alone(tiny_path: Path, small_path: Path) -> None:
    """The device is in every context of the process once it was registered."""
    settings = replace(runs.SETTINGS, repack=True)
    with Engine(least_plan(small_path)) as engine:
        text(engine)
    with runs.stock(tiny_path) as (model, ctx):
        first = runs.generate(model, ctx, steps=2)
    with Engine(Plan(str(tiny_path), settings=settings)) as plain:
        assert {row.device for row in plain.memory} == {"CPU"}
        assert plain.paged is None
    with runs.stock(tiny_path) as (model, ctx):
        assert np.array_equal(runs.generate(model, ctx, steps=2), first)


def test_statistics_add_up(moe_path: Path) -> None:
    _, everything = runs.expert_bytes(moe_path)
    plan = runs.tier_plan(moe_path, expert_bytes=everything // 2)
    with runs.tiered(plan) as (model, ctx, paged):
        runs.generate(model, ctx, steps=5)
        stats = paged.stats()
    # three micro-batches and five tokens, each through all 30 layers
    assert [layer.passes for layer in stats.layers] == [8] * 30
    assert [layer.layer for layer in stats.layers] == list(range(30))
    assert 0 < stats.hit_rate < 1
    one = sum(t.nbytes // 8 for t in gguf.read(moe_path).tensors if t.role.is_routed_expert and t.layer == 0)
    misses = sum(layer.uses - layer.hits for layer in stats.layers)
    assert sum(layer.bytes_read for layer in stats.layers) == misses * one
    assert stats.drive_bytes >= misses * one
    assert stats.direct == runs.reads_directly(moe_path)
    assert stats.stall_seconds > 0
    assert stats.drive_bytes_per_second > 1e6
    assert isinstance(plan.tier, Tier)
