"""Dense weights on the drive: decode of a model bigger than its memory, against stock llama.cpp's mmap.

    python -m bench.tier_dense [--ratio 2] [--tokens 24] [--rounds 2]

The model is synthetic, Q8_0. Both engines run in turn, each in a new process, in one memory control group of the
model's size / RATIO, with a cold page cache. What fits stays in RAM; the rest is read for each token, the next
weights while one is computed.

The ceiling is as in bench.tier_moe. Expected: at least 0.85 of it at ratios 1.33 and 2, and 5 times stock
llama.cpp's speed. Run it alone; needs root for the group.
"""

from __future__ import annotations

from tests.models.synthetic import Synthetic

from bench import tier_runs

MODEL = Synthetic(layers=20, n_embd=3072, n_ff=8192, heads=24, kv_heads=8, experts=0, qtype="Q8_0")


def main() -> None:
    args = tier_runs.parser(__doc__ or "").parse_args()
    tier_runs.compare(args.model or tier_runs.cached(MODEL), args, tier_runs.with_dense_tier)


if __name__ == "__main__":
    main()
