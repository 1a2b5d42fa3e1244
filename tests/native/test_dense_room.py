"""How much of weights that are used whole stays in RAM: what the planner counts against what the store keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tensortier import gguf, slots, tier
from tests import tier_runs as runs

WHOLE = r"blk\.\d+\.(ffn_(up|gate|down)|attn_(q|k|v|output))\.weight|output\.weight"


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.99, 1.01])
def test_the_planner_counts_as_the_store(
    share: float, synthetic: Callable[..., Path], smollm2_path: Path
) -> None:
    """With matrices of one size for all purposes, and of very different ones."""
    wide = synthetic(layers=2, n_embd=64, n_ff=128, experts=0, qtype="F16", embedding="F16")
    for path, pattern in ((smollm2_path, runs.DENSE), (smollm2_path, WHOLE), (wide, WHOLE)):
        bare = runs.tier_plan(path, pattern)
        tensors = tier.paged_tensors(gguf.read(path), bare)
        largest = max(t.nbytes for t in tensors)
        budget = max(int(share * sum(t.nbytes for t in tensors)), 2 * largest + 8192)
        paged = tier.PagedWeights(runs.tier_plan(path, pattern, dense_bytes=budget))
        try:
            kept = paged.stats().resident_bytes
        finally:
            paged.close()
        counted = [
            slots.dense_stays(tensors, budget, sector) for sector in (512, 4096, 1)
        ]  # the drive's affair
        sectors = 2 * 4096 * len(tensors)
        assert any(0 <= kept - found <= sectors for found in counted), (path.name, pattern, kept, counted)
        assert kept <= budget
