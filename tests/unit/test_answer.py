"""What ``run`` says of the drive: differences of counters, against sums done by hand."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from tensortier.cli.answer import Answer, DriveMeter, speed_line, tier_json
from tensortier.types import GenerationStats, TierLayerStats, TierStats

NOTHING = TierStats(
    layers=(TierLayerStats(0, 4, 0, 0, 0, 0, 0.0), TierLayerStats(2, 4, 0, 0, 0, 0, 0.0)),
    memory_bytes=1 << 20, scratch_bytes=0, expert_slots=8, passing_slots=2, resident_bytes=0, ring_bytes=0,
    dense_uses=0, dense_hits=0, dense_bytes_read=0, dense_stall_seconds=0.0, drive_bytes=0, drive_reads=0,
    drive_busy_seconds=0.0, reader="threads", direct=True, locked=False,
)  # fmt: skip


def after(stats: TierStats, hits: int, uses: int, nbytes: int, busy: float, stall: float) -> TierStats:
    """So much more, of which each layer has half."""
    layers = tuple(
        dataclasses.replace(
            row, hits=row.hits + hits // 2, uses=row.uses + uses // 2, stall_seconds=row.stall_seconds + stall / 2
        )
        for row in stats.layers
    )  # fmt: skip
    return dataclasses.replace(
        stats,
        layers=layers,
        drive_bytes=stats.drive_bytes + nbytes,
        drive_busy_seconds=stats.drive_busy_seconds + busy,
    )


class Paged:
    def __init__(self, stats: TierStats) -> None:
        self.now = stats

    def stats(self) -> TierStats:
        return self.now


def meter(paged: Paged | None) -> DriveMeter:
    engine: Any = SimpleNamespace(paged=paged)
    return DriveMeter(engine)


def test_each_answer_has_its_own_figures() -> None:
    paged = Paged(after(NOTHING, 10, 100, 1 << 30, 1.0, 1.0))  # what loading took
    found = meter(paged)
    paged.now = after(paged.now, 60, 80, 3 << 30, 2.0, 0.5)
    assert found.line() == "; drive: 3.0 GiB at 1.6 GB/s, 75% of experts found in RAM, 0.5 s waited"
    paged.now = after(paged.now, 10, 40, 1 << 30, 1.0, 0.25)
    paged.now = dataclasses.replace(paged.now, dense_uses=4, dense_hits=1)
    assert found.line() == (
        "; drive: 1.0 GiB at 1.1 GB/s, 25% of experts found in RAM, 25% of other weights there in time, 0.2 s waited"
    )
    assert found.line() == "; drive: 0 B, 0.0 s waited"


def test_nothing_is_said_of_the_speed_of_a_prompt_that_was_not_finished() -> None:
    stats = GenerationStats(prompt_tokens=1700, prompt_seconds=2.0, completion_tokens=0)
    assert speed_line(Answer("", "cancelled", stats)) == "prompt: 1700 tokens, not finished after 2.0 s"
    assert "850.0 tokens/s" in speed_line(Answer("", "stop", stats))
    begun = dataclasses.replace(stats, completion_tokens=3)
    assert "850.0 tokens/s" in speed_line(Answer("abc", "cancelled", begun))


def test_a_model_in_memory_has_none() -> None:
    assert meter(None).line() == ""


def test_layers_are_told_where_they_were_asked_for() -> None:
    stats = after(NOTHING, 60, 80, 3 << 30, 2.0, 0.5)
    short, long = (tier_json(stats, layers=layers) for layers in (False, True))
    assert (
        "layers" not in short
        and short["hit_rate"] == 0.75
        and short["drive_bytes_per_second"] == 1.5 * (1 << 30)
    )
    assert [row["layer"] for row in long.pop("layers")] == [0, 2]
    assert long == short
