"""A model that fits in RAM: stock llama.cpp with its best settings beside our backend with room for everything.

    python -m bench.tier_fits [--tokens 48] [--rounds 3]

The planner leaves nothing on the drive then (tests/unit/test_paging.py), so the first row is what `tensortier run`
does. The last row says what would be lost if it did: slots have the plain kernels. Expected: no gap between plain stock
and the backend; reordered weights ("repack") may be faster or slower than both (see the lab log).
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

from tests import tier_runs as models

from bench import tier_moe, tier_runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    path = tier_runs.cached(tier_moe.MODEL)
    plain = tier_runs.Job(str(path), tokens=args.tokens, prompt=args.prompt, load_mode="none", warm=24)
    everything = models.expert_bytes(path)[1]
    jobs = {
        "stock, repacked": replace(plain, repack=True),
        "stock, plain": plain,
        "backend": replace(plain, expert_bytes=everything, pattern=r"_exps\.weight"),
    }
    found: dict[str, list[tier_runs.Result]] = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, job in jobs.items():
            found[name].append(tier_runs.run(job, None))
    for name, results in found.items():
        decode = statistics.median(r.decode for r in results)
        prefill = statistics.median(r.prefill for r in results)
        print(
            f"{name:<16} decode {decode:6.2f} tokens/s, prefill {prefill:6.1f}, hits {results[-1].hit_rate:.2f}"
        )


if __name__ == "__main__":
    main()
