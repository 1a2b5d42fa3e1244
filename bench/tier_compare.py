"""Against the scheme of the best other engine that pages experts on the CPU (BigMoeOnEdge), on equal terms.

    python -m bench.tier_compare [--ratios 2,4] [--tokens 24] [--rounds 1]

Its scheme, run by our own backend: one LRU over all layers, eight threads that block in reads past the page cache,
nothing read ahead. Two things of ours stay on, both in its favour: experts that are there are computed while others
arrive, and the LRU's guard against finding nothing at all.
So the ratio printed is less than what the whole difference would be.

The model is that of bench.tier_moe, in a control group of its size / RATIO. The text is the same for both: greedy
text, which a model of random weights soon repeats, and forced tokens at random, the worst case. Expected: ours at least
1.5 times as fast at each.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

from bench import tier_moe, tier_runs

GUESSES = 4  # what the engine finds to be faster here, after a trial that takes longer than these runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratios", default="2,4")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    path = tier_runs.cached(tier_moe.MODEL)
    for ratio in map(float, args.ratios.split(",")):
        limit = int(path.stat().st_size / ratio)
        for text, greedy in (("greedy", True), ("forced", False)):
            job = tier_runs.Job(str(path), args.tokens, prompt=8, greedy=greedy, warm=8, guesses=GUESSES)
            ours = tier_runs.with_tier(job, limit)
            theirs = replace(ours, policy="global-lru", reader="threads", queue_depth=8, guesses=0)
            found: dict[str, list[tier_runs.Result]] = {"ours": [], "theirs": []}
            for _ in range(args.rounds):
                for name, each in (("ours", ours), ("theirs", theirs)):
                    found[name].append(tier_runs.run(each, limit))
            print(f"{ratio:g} times the memory, {text} text")
            for name, results in found.items():
                print(f"  {name:<7} {results[-1]}")
            speeds = [statistics.median(r.decode for r in found[name]) for name in ("ours", "theirs")]
            print(f"  {speeds[0] / speeds[1]:.2f} times")


if __name__ == "__main__":
    main()
