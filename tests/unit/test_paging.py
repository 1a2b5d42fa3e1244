"""What stays on the drive: the byte arithmetic against sums over the tensors, the speed against its bounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tensortier import gguf, memory, paging, placement
from tensortier.types import Plan, Settings, Workload
from tests.unit.test_cost import RATES

GIB = 1 << 30
WORK = Workload("", 256, 64, 0)


def planned(path: Path, ram: int) -> tuple[Plan | None, Plan]:
    model = gguf.read(path)
    plan = Plan(str(path), settings=Settings(n_ctx=4096, threads=4))
    rows = memory.Formulas(model, {}).ask(plan)
    return paging.on_the_drive(model, plan, rows, ram, {}), plan


@pytest.mark.parametrize("ram", [4 * GIB, 8 * GIB, 16 * GIB])
def test_experts_go_first_and_ram_is_filled_not_more(ram: int, skeleton: Callable[[str], Path]) -> None:
    """Qwen3-30B, 18.6 GB: experts on the drive, everything else and as many experts as possible in RAM."""
    path = skeleton("qwen3-30b-a3b-q4_k_m")
    made, _ = planned(path, ram)
    assert made is not None and made.tier is not None
    model = gguf.read(path)
    where = placement.resolve(model, made.placement, {})
    assert {t.name for t in model.tensors if where[t.name] == "TIER"} == {
        t.name for t in model.tensors if t.role.is_routed_expert
    }
    rows = {row.device: row for row in made.memory}
    others = sum(t.nbytes for t in model.tensors if not t.role.is_routed_expert)
    assert rows["CPU"].weights_bytes == pytest.approx(others, abs=1 << 20)
    held = sum(row.total_bytes for row in made.memory)
    assert 0.98 * ram < held <= ram
    assert made.tier.dense_bytes == 0


def test_a_dense_model_leaves_whole_matrices(skeleton: Callable[[str], Path]) -> None:
    made, _ = planned(skeleton("llama-3.3-70b-q4_k_m"), 24 * GIB)
    assert made is not None and made.tier is not None
    assert made.tier.expert_bytes == 0
    assert 18 * GIB < made.tier.dense_bytes < 24 * GIB
    assert {o.device for o in made.placement.overrides} == {"TIER"}


def test_too_little_ram_for_what_cannot_leave_it(skeleton: Callable[[str], Path]) -> None:
    made, _ = planned(skeleton("llama-3.3-70b-q4_k_m"), 1 * GIB)
    assert made is None


def test_more_ram_is_never_slower_and_never_beats_all_in_memory(skeleton: Callable[[str], Path]) -> None:
    path = skeleton("qwen3-30b-a3b-q4_k_m")
    model = gguf.read(path)
    speeds = []
    for ram in (3, 4, 6, 8, 12, 16):
        made, plan = planned(path, ram * GIB)
        assert made is not None
        found = paging.estimate(model, made, RATES, WORK, {})
        # a token reads at least what it misses, at the drive's speed
        experts, _ = paging.paged_bytes(model, made, {})
        assert made.tier is not None
        missed = (experts - made.tier.expert_bytes) * model.n_expert_used / model.n_expert
        assert found.decode_tokens_per_second <= 1.5e9 / missed
        low, high = found.decode_interval
        assert low <= found.decode_tokens_per_second <= high
        speeds.append(found.decode_tokens_per_second)
    assert speeds == sorted(speeds)
    from tensortier import cost

    assert speeds[-1] < cost.estimate(model, plan, RATES, WORK, {}).decode_tokens_per_second
