"""What stayed in RAM when a model was closed is read first when it is loaded again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tensortier import gguf, warmstart
from tensortier.errors import Cancelled
from tensortier.tier import PagedWeights
from tensortier.types import Plan, TierStats
from tests import tier_runs as runs


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    yield tmp_path


def plan_of(path: Path, policy: str = "lru", *, warm_start: bool = True) -> Plan:
    half = runs.expert_bytes(path)[1] // 2
    return runs.tier_plan(path, expert_bytes=half, policy=policy, warm_start=warm_start)


def first_tokens(plan: Plan) -> tuple[runs.Floats, TierStats, list[tuple[int, int]]]:
    """Logits of a few tokens one by one, statistics, and what stays in the end."""
    with runs.tiered(plan) as (model, ctx, paged):
        rows = [runs.logits(model, ctx, [token], i) for i, token in enumerate(runs.PROMPT[:8])]
        return np.concatenate(rows), paged.stats(), paged.residents()


@pytest.mark.parametrize("policy", ["lru", "global-lru", "lfu", "second-touch"])
def test_what_stayed_is_there_again(policy: str, moe_path: Path) -> None:
    plan = plan_of(moe_path, policy)
    expected, cold, stayed = first_tokens(plan)
    assert cold.warm_experts == 0
    with runs.tiered(plan) as (_model, _ctx, paged):
        assert sorted(paged.residents()) == sorted(stayed)
        if policy != "global-lru":  # of one layer after the other there
            assert paged.residents() == stayed  # in the order in which they will leave
        assert paged.stats().warm_experts == len(stayed) > 0
    found, warm, _ = first_tokens(plan)
    assert np.array_equal(found, expected)
    assert warm.hit_rate > cold.hit_rate + 0.05


def test_it_is_a_matter_of_choice(moe_path: Path) -> None:
    plan = plan_of(moe_path, warm_start=False)
    first_tokens(plan)
    assert not warmstart.file_of(gguf.read(moe_path)).exists()
    assert first_tokens(plan)[1].warm_experts == 0


def test_a_file_that_is_not_right_is_as_good_as_none(moe_path: Path) -> None:
    model = gguf.read(moe_path)
    shape = (30, 8)
    assert warmstart.write(model, shape, [(0, 1), (29, 7), (0, 0)])
    assert warmstart.read(model, shape) == [(0, 1), (29, 7), (0, 0)]
    path = warmstart.file_of(model)
    good = json.loads(path.read_text())
    damaged = [
        {**good, "model": "another"},
        {**good, "tensortier_warm_start": 2},
        {**good, "shape": [30, 9]},
        {**good, "experts": [[0, 8]]},
        {**good, "experts": [[30, 0]]},
        {**good, "experts": [[0, -1]]},
        {**good, "experts": [[0, True]]},
        {**good, "experts": [[0, 1.0]]},
        {**good, "experts": [[0, 1], [0, 1]]},
        {**good, "experts": [[0]]},
        {**good, "experts": {"0": 1}},
        [],
    ]
    for text in (*map(json.dumps, damaged), "", "{", path.read_text()[:-5], "[" * 100_000, "\0"):
        path.write_text(text)
        assert warmstart.read(model, shape) == [], text[:60]
    path.write_bytes(b"\xff\xfe")
    assert warmstart.read(model, shape) == []
    assert first_tokens(plan_of(moe_path))[1].warm_experts == 0
    path.unlink()
    assert warmstart.read(model, shape) == []


def test_nothing_is_left_half_written(moe_path: Path, cache: Path) -> None:
    model = gguf.read(moe_path)
    path = warmstart.file_of(model)
    path.parent.mkdir(parents=True)
    path.mkdir()  # what cannot be replaced
    assert not warmstart.write(model, (30, 8), [(0, 1)])
    assert list(path.parent.iterdir()) == [path]


def test_it_can_be_cancelled(moe_path: Path) -> None:
    """The experts may be many gigabytes."""
    plan = plan_of(moe_path)
    stayed = first_tokens(plan)[2]
    assert plan.tier is not None
    slow = replace(plan, tier=replace(plan.tier, queue_depth=1, read_bytes=4096))
    paged = PagedWeights(slow)
    asked = iter([False, True])
    with pytest.raises(Cancelled):
        paged.loaded(lambda: next(asked, True))
    assert 0 < paged.stats().drive_bytes < sum(t.nbytes for t in gguf.read(moe_path).tensors) // 20
    paged.close()
    assert warmstart.read(gguf.read(moe_path), (30, 8)) == stayed  # for the next time
