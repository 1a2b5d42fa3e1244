"""Experts on the drive: decode and prefill of a mixture bigger than its memory, against stock llama.cpp's mmap.

    python -m bench.tier_moe [--ratio 2] [--tokens 24] [--prompt 8] [--policy lru] [--rounds 2]

The model is synthetic: 64 experts, 8 used, fresh random weights, so routing is near uniform, which is the worst
case for a cache. Both engines run in turn, each in a new process, in one memory control group of the model's
size / RATIO, with a cold page cache.

Printed beside the speeds is the ceiling: a token takes at least the longer of (bytes read for it / the drive's
bandwidth) and (its time with everything in memory), both measured here. Expected: at least 0.8 of the ceiling,
and 6 (ratio 1.33), 15 (2) and 10 (4) times stock llama.cpp's speed. Run it alone; needs root for the group.
"""

from __future__ import annotations

from tests.models.synthetic import Synthetic

from bench import tier_runs

MODEL = Synthetic(
    layers=12, n_embd=2048, n_ff=1024, heads=16, kv_heads=4, experts=64, used=8, qtype="Q4_K", arch="qwen3moe"
)


def main() -> None:
    args = tier_runs.parser(__doc__ or "").parse_args()
    tier_runs.compare(args.model or tier_runs.cached(MODEL), args, tier_runs.with_tier)


if __name__ == "__main__":
    main()
