"""The timeline of a model with weights on the drive tells what the totals tell, which are counted apart from it."""

from __future__ import annotations

import time
from pathlib import Path

from tensortier.types import TierStats
from tests import tier_runs as runs


def excess(events: list[tuple[str, float, float, int]], before: TierStats, after: TierStats) -> float:
    """Seconds by which the waits in the timeline are longer than those in the totals; rounded away what sums of
    differences lose."""
    waited = sum(end - begin for what, begin, end, _ in events if what == "wait")
    return round(waited - (after.stall_seconds - before.stall_seconds), 6)


def test_it_has_each_read_wait_and_pass(path: Path) -> None:
    least, _ = runs.expert_bytes(path)
    with runs.tiered(runs.tier_plan(path, expert_bytes=2 * least, read_bytes=16 << 10)) as (
        model,
        ctx,
        paged,
    ):
        runs.generate(model, ctx, steps=1)  # before it: not in it
        before, started = paged.stats(), time.perf_counter()
        paged.start_timeline(100_000)
        runs.generate(model, ctx, steps=4)
        after, taken = paged.stats(), time.perf_counter() - started
        events = paged.timeline()
        assert len([e for e in events if e[0] == "read"]) == after.drive_reads - before.drive_reads > 0
        assert excess(events, before, after) >= 0
        passes = [group for what, _, _, group in events if what == "pass"]
        assert passes == [0, 1] * (len(passes) // 2)
        assert len(passes) == sum(row.passes for row in after.layers) - sum(
            row.passes for row in before.layers
        )
        assert all(0 <= end - begin <= taken for _, begin, end, _ in events)
        assert sum(end - begin for what, begin, end, _ in events if what in ("wait", "compute")) <= taken
        # the two look at the clock one after the other, and another process may come between them: not each time
        excesses = []
        for _ in range(5):
            before, started = paged.stats(), time.perf_counter()
            paged.start_timeline(100_000)
            runs.generate(model, ctx, steps=1)
            taken = time.perf_counter() - started
            excesses.append(excess(paged.timeline(), before, paged.stats()) / taken)
        assert 0 <= min(excesses) < 0.1
        paged.start_timeline(10)  # the first ones only
        runs.generate(model, ctx, steps=1)
        assert len(paged.timeline()) == 10
        paged.start_timeline(0)
        runs.generate(model, ctx, steps=1)
        assert paged.timeline() == []
