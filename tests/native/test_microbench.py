"""The microbenchmarks measure what they say: time grows with the work, and what is not there is told apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from tensortier._llama import microbench
from tensortier.errors import LibraryError

F16, Q4_0, Q8_0, Q4_K = 1, 2, 8, 12


def products(**options: int) -> Callable[[], list[float]]:
    arguments = {"k": 512, "n": 512, "count": 4, "runs": 10, **options}
    return partial(microbench.mul_mat, "CPU", arguments.pop("type", F16), **arguments)  # type: ignore[arg-type]


def best(*kinds: Callable[[], list[float]]) -> list[float]:
    """The fastest run of each, as other processes only ever add time; in turn, so that a slow moment of the machine is
    one for all of them."""
    return [min(times) for times in zip(*([min(kind()) for kind in kinds] for _ in range(4)), strict=True)]


def test_time_grows_with_the_work() -> None:
    """Sixteen times the operations, and 256 times."""
    once, larger, more = best(products(), products(n=4096, k=1024), products(batch=256))
    assert larger > 4 * once
    assert more > 8 * once


def test_every_run_is_timed() -> None:
    seconds = microbench.mul_mat("CPU", Q8_0, k=256, n=64, count=2, runs=7)
    assert len(seconds) == 7
    assert all(0 < s < 60 for s in seconds)


@pytest.mark.parametrize("type_id", [0, F16, Q4_0, Q8_0, Q4_K, 10, 11, 13, 14, 20, 23, 39])
def test_weight_types(type_id: int) -> None:
    assert len(microbench.mul_mat("CPU", type_id, k=256, n=64, count=1, runs=2)) == 2


def test_experts() -> None:
    """Four times the experts used is more work than one; those not used are free."""
    one, four = best(*(products(experts=8, used=used, count=2, n=2048) for used in (1, 4)))
    assert four > 1.5 * one


def test_repacking_exists_for_some_types_only() -> None:
    assert microbench.mul_mat("CPU", F16, k=256, n=64, count=1, repack=True, runs=1) == []


def test_attention_grows_with_the_cache() -> None:
    shape = {"head_dim": 64, "heads": 8, "kv_heads": 2, "count": 2, "runs": 10}
    short, long = best(
        *(partial(microbench.attention, "CPU", F16, cells=cells, **shape) for cells in (512, 8192))  # type: ignore[arg-type]
    )
    assert long > 3 * short


def test_small_operations() -> None:
    """Ten times as many take longer; each less than a millisecond even on a machine at work."""
    few, many = best(*(partial(microbench.small_ops, "CPU", count=n, width=2048, runs=10) for n in (60, 600)))
    assert 3 * few < many < 600 * 1e-3


def test_what_is_not_there() -> None:
    with pytest.raises(LibraryError, match="no device GPU9"):
        microbench.small_ops("GPU9", count=3, width=64)
    with pytest.raises(LibraryError, match="no device GPU9"):
        microbench.mul_mat("GPU9", F16, k=64, n=64, count=1)
    with pytest.raises(LibraryError, match="no device GPU9"):
        microbench.attention("GPU9", F16, head_dim=64, heads=1, kv_heads=1, cells=256, count=1)
