"""Whatever a drive does, nobody computes with what has not been read, and no read gets memory that another still needs.

The drive of these tests ends a read only while somebody waits for one, one each time, in a chosen order; until then
the read's memory holds what is no number in any format (native/held_reads.cpp). So the moments that a quick drive
hides are met in each run: reads that nobody needs any more are under way when others want their place, and what was
asked for last is there first. Nothing depends on time.
"""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from tensortier._llama.tierlib import tier_library
from tensortier.errors import Cancelled, LoadError
from tensortier.tier import PagedWeights
from tensortier.types import Plan
from tests import tier_runs as runs
from tests.models import llamacpp

FIRST, LAST = 0, 1  # which read ends; all others: one at random, the same in each run
ORDERS = (FIRST, LAST, 2)
STEPS = 3

DENSE = r"ffn_(up|gate|down)_shexp|attn_(q|k|v|output)\.weight"
BOTH = rf"_exps\.weight|{DENSE}"


@pytest.fixture(scope="module")
def expected(path: Path) -> runs.Floats:
    with runs.stock(path) as (model, ctx):
        return runs.generate(model, ctx, steps=STEPS)


SHORT = runs.PROMPT[:3]  # where only the moment counts


@pytest.fixture(scope="module")
def short(path: Path) -> runs.Floats:
    with runs.stock(path) as (model, ctx):
        return runs.generate(model, ctx, SHORT, steps=STEPS)


def hold(paged: PagedWeights, order: int) -> None:
    library = tier_library()
    library.tt_tier_hold.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    library.tt_tier_hold.restype = None
    library.tt_tier_hold(paged._open_handle(), order)


@contextmanager
def nothing_misused() -> Iterator[None]:
    """No memory of a read under way is read into, written to or freed meanwhile."""
    library = tier_library()
    library.tt_reads_misused.restype = ctypes.c_int64
    before = library.tt_reads_misused()
    yield
    assert library.tt_reads_misused() == before


@contextmanager
def held(plan: Plan, order: int, **context: Any) -> Iterator[tuple[Any, Any, PagedWeights]]:
    with nothing_misused(), runs.tiered(plan, **context) as (model, ctx, paged):
        hold(paged, order)
        yield model, ctx, paged


class Stop:
    """An abort callback that says so when it is asked for the ``limit``-th time; 0: never."""

    def __init__(self) -> None:
        self.asked = self.limit = 0
        self.callback = llama_cpp.ggml_abort_callback(self._stop)

    def _stop(self, _: object) -> bool:
        self.asked += 1
        return 0 < self.limit < self.asked

    def at(self, limit: int) -> None:
        self.asked, self.limit = 0, limit


def budgets(path: Path) -> tuple[int, ...]:
    least, everything = runs.expert_bytes(path)
    return least, (least + everything) // 3, (least + everything) * 2 // 3


@pytest.mark.parametrize("order", ORDERS)
def test_loading_that_is_given_up_and_begun_again(order: int, path: Path) -> None:
    plan = runs.tier_plan(path, DENSE, dense_bytes=100 << 20, queue_depth=4, read_bytes=16 << 10)
    with nothing_misused():
        paged = PagedWeights(plan)
        hold(paged, order)
        with pytest.raises(Cancelled):
            paged.loaded(lambda: True)
        paged.inject_fault(-errno.EIO, after=3)
        with pytest.raises(LoadError, match="Input/output error"):
            paged.loaded()
        paged.loaded()
        paged.close()


@pytest.mark.parametrize("order", ORDERS)
def test_closed_while_reads_are_under_way(order: int, path: Path, expected: runs.Floats) -> None:
    for what in (BOTH, DENSE, runs.EXPERTS):
        stop = Stop()
        plan = runs.tier_plan(path, what, expert_bytes=budgets(path)[1], dense_bytes=200 << 10, guesses=8)
        with held(plan, order, abort_callback=stop.callback) as (_, ctx, _paged):
            stop.at(2)
            assert runs.decode(ctx, [300]) == 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", ["experts", "guesses", "dense", "both"])
def test_given_up(order: int, what: str, path: Path, short: runs.Floats) -> None:
    """At any operation: the next request meets the reads of the one before."""
    pattern = {"dense": DENSE, "both": BOTH}.get(what, runs.EXPERTS)
    for budget in (0,) if what == "dense" else budgets(path):
        stop = Stop()
        plan = runs.tier_plan(
            path, pattern, expert_bytes=budget, dense_bytes=200 << 10, guesses=8 * (what == "guesses")
        )
        with held(plan, order, abort_callback=stop.callback) as (model, ctx, paged):
            given_up = 0
            for limit in range(13, 49, 3):
                for other in range(4):  # one after the other, so that each meets the reads of those before
                    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
                    stop.at(limit + other)
                    given_up += runs.decode(ctx, [300 + 5 * limit + other]) == 2
                stop.at(0)
                assert np.array_equal(runs.generate(model, ctx, SHORT, 1), short[:4]), (budget, limit)
            assert given_up > 20
            assert paged.take_error() == ""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", ["experts", "guesses", "dense", "both"])
def test_failed(order: int, what: str, path: Path, short: runs.Floats) -> None:
    """One read fails while others are under way."""
    pattern = {"dense": DENSE, "both": BOTH}.get(what, runs.EXPERTS)
    for budget in (0,) if what == "dense" else budgets(path):
        plan = runs.tier_plan(
            path, pattern, expert_bytes=budget, dense_bytes=200 << 10, guesses=8 * (what == "guesses")
        )
        with held(plan, order) as (model, ctx, paged):
            failed = 0
            for after in range(12):
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
                paged.inject_fault(-errno.EIO, after=after)
                failed += runs.decode(ctx, [300 + after]) < 0
                paged.inject_fault(0, count=0)
                paged.take_error()
                assert np.array_equal(runs.generate(model, ctx, SHORT, 1), short[:4]), (budget, after)
            assert failed > 1


@pytest.mark.parametrize("order", ORDERS)
def test_what_was_under_way_when_a_read_failed_is_kept(order: int, path: Path) -> None:
    """Of two experts of a token, the one that could be read."""
    with held(runs.tier_plan(path, expert_bytes=budgets(path)[2]), order) as (_, ctx, paged):
        paged.inject_fault(-errno.EIO)
        assert runs.decode(ctx, [300]) < 0
        assert "Input/output error" in paged.take_error()
        assert len(paged.residents()) == 1


def test_one_context_at_a_time(path: Path, expected: runs.Floats, short: runs.Floats) -> None:
    """Another thread that computes with the same weights waits, also while this one waits for the drive."""
    asked = when = 0
    threads: list[threading.Thread] = []
    found: list[runs.Floats] = []

    @llama_cpp.ggml_abort_callback
    def meanwhile(_: object) -> bool:
        nonlocal asked
        asked += 1
        if asked == when:
            threads.append(
                threading.Thread(target=lambda: found.append(runs.generate(model, second, SHORT, 1)))
            )
            threads[-1].start()
            threads[-1].join(0.3)  # time for it to go wrong; nothing is expected to happen in it
        return False

    plan = runs.tier_plan(path, BOTH, expert_bytes=budgets(path)[0], dense_bytes=200 << 10)
    with (
        nothing_misused(),
        runs.tiered_model(plan) as (model, paged),
        llamacpp.context(model, **runs.CONTEXT, abort_callback=meanwhile) as first,
        llamacpp.context(model, **runs.CONTEXT) as second,
    ):
        hold(paged, LAST)
        assert np.array_equal(runs.generate(model, first, steps=STEPS), expected)
        total = asked
        for when in range(total // 9, total, total // 9):
            asked = 0
            assert np.array_equal(runs.generate(model, first, steps=STEPS), expected), when
        for thread in threads:
            thread.join()
    assert len(found) == len(threads) >= 8
    for logits in found:
        assert np.array_equal(logits, short[:4])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("guesses", [0, 8])
def test_interrupted_by_another_context(order: int, guesses: int, path: Path, short: runs.Floats) -> None:
    """Between two operations of a layer, whose experts are under way or wait to be computed."""
    inside = False
    other: list[Any] = []
    count = when = 0

    @llama_cpp.ggml_backend_sched_eval_callback
    def between(_tensor: int, ask: bool, _: object) -> bool:
        nonlocal inside, count
        if inside:
            return not ask
        if ask:
            count += 1
            return count == when
        inside = True
        other.append(runs.generate(model, second, SHORT[:2], steps=1))
        inside = False
        return True

    with runs.stock(path) as (model, ctx):
        other_expected = runs.generate(model, ctx, SHORT[:2], steps=1)
    for budget in budgets(path)[:2]:
        plan = runs.tier_plan(path, BOTH, expert_bytes=budget, dense_bytes=200 << 10, guesses=guesses)
        with (
            nothing_misused(),
            runs.tiered_model(plan) as (model, paged),
            llamacpp.context(model, **runs.CONTEXT, cb_eval=between) as first,
            llamacpp.context(model, **runs.CONTEXT) as second,
        ):
            hold(paged, order)
            count = when = 0
            assert np.array_equal(runs.generate(model, first, SHORT, 1), short[:4])
            total = count
            for when in range(total // 7, total, total // 17):
                count = 0
                assert np.array_equal(runs.generate(model, first, SHORT, 1), short[:4]), (budget, when)
            assert len(other) > 10
            for found in other:
                assert np.array_equal(found, other_expected)
            other.clear()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", ["lru", "second-touch"])
def test_read_ahead(order: int, policy: str, path: Path, short: runs.Floats) -> None:
    """Guesses, wrong ones too, whose reads are under way when what is needed wants their place."""
    ahead = 0
    for budget in budgets(path)[:2]:
        for guesses, depth in ((2, 32), (8, 2)):  # with a short queue, only a piece of a guess is under way
            plan = runs.tier_plan(
                path,
                expert_bytes=budget,
                policy=policy,
                guesses=guesses,
                queue_depth=depth,
                read_bytes=16 << 10,
            )
            with held(plan, order) as (model, ctx, paged):
                for _ in range(3):
                    assert np.array_equal(runs.generate(model, ctx, SHORT, 3), short)
                ahead += sum(layer.guess_reads for layer in paged.stats().layers)
    assert ahead > 10


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", ["lru", "global-lru", "second-touch"])
def test_results_are_the_same(order: int, policy: str, path: Path, expected: runs.Floats) -> None:
    for budget in budgets(path):
        plan = runs.tier_plan(path, BOTH, expert_bytes=budget, dense_bytes=200 << 10, policy=policy)
        with held(plan, order) as (model, ctx, _):
            for _ in range(2):
                assert np.array_equal(runs.generate(model, ctx, steps=STEPS), expected)
