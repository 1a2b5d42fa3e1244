"""Real routing over the drive: what guesses and a warm start are worth.

    python -m bench.tier_real [guesses|warm] [--shares 0.25,0.5,0.75] [--tokens 96] [--rounds 2]

SmolLM2 as a mixture of 30 layers of 8 experts, 2 used, goes through the part of tests/models/text.txt that its routers
were not fitted to, one token at a time; a share of the experts has room in RAM.

"guesses": with none read ahead, with some, and with the engine's own choice, in turn. Expected: the router of the next
layer names about 0.87 of its experts from this layer's input (bench.moe_quality), and the tokens come faster where
reading them is what takes the time.

"warm": the first 32 tokens after a load, when nothing was kept from the last time and when it was. The text before
them is the same both times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from tests import tier_runs as models
from tests.models import moe

from bench import tier_runs
from bench.tier_runs import Job, Result

PATTERN = r"_exps\.weight"
FIRST = 32  # tokens after a load


def mixture() -> Path:
    path = tier_runs.CACHE / f"smollm2-moe-{moe.VERSION}.gguf"
    return path if path.exists() else moe.build(path)


def show(label: str, results: list[Result]) -> None:
    decode = statistics.median(r.decode for r in results)
    hits = statistics.median(r.hit_rate for r in results)
    print(
        f"  {label:<12} {decode:7.2f} tokens/s ({', '.join(f'{r.decode:.1f}' for r in results)}), hits {hits:.3f}, "
        f"{results[-1].bytes_per_token / 1e6:.1f} MB/token at {results[-1].drive_rate / 1e9:.2f} GB/s, "
        f"stalled {results[-1].stall:.2f}, recall {results[-1].recall:.2f}, "
        f"precision {results[-1].precision:.2f}, load {results[-1].load_seconds:.2f} s"
    )


def guesses(job: Job, rounds: int, numbers: list[int]) -> None:
    found: dict[int, list[Result]] = {number: [] for number in numbers}
    for _ in range(rounds):
        for number in numbers:
            found[number].append(tier_runs.run(replace(job, guesses=number), None))
    for number, results in found.items():
        show("auto" if number < 0 else f"{number} guesses", results)


def warm(job: Job, rounds: int) -> None:
    cold, again = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            os.environ["XDG_CACHE_HOME"] = cache
            first = replace(job, prompt=1, warm=0, tokens=FIRST)
            cold.append(tier_runs.run(first, None))
            tier_runs.run(replace(job, prompt=64, warm_start=True), None)  # leaves what it found hot
            again.append(tier_runs.run(replace(first, warm_start=True), None))
    show("cold", cold)
    show("warm", again)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("guesses", "warm"), nargs="?", default="guesses")
    parser.add_argument("--shares", default="0.25,0.5,0.75")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--numbers", default="0,1,2,-1", help="of guesses; -1: the engine's own choice")
    args = parser.parse_args()
    path = mixture()
    everything = models.expert_bytes(path)[1]
    text = moe.tokens()[moe.FIT_TOKENS :]
    print(f"the drive: {tier_runs.drive_bandwidth(path) / 1e9:.2f} GB/s")
    for share in map(float, args.shares.split(",")):
        job = Job(
            str(path),
            tokens=args.tokens,
            prompt=16,
            expert_bytes=int(everything * share),
            pattern=PATTERN,
            load_mode="none",
            text=tuple(text[-args.tokens - 40 :] if args.what == "guesses" else text),
        )
        print(f"{share:.0%} of the experts in RAM")
        if args.what == "warm":
            warm(job, args.rounds)
        else:
            guesses(job, args.rounds, [int(n) for n in args.numbers.split(",")])


if __name__ == "__main__":
    main()
