"""Does the engine cost anything? Decode speed of ``Engine`` against ``llama_cpp.Llama``, in turn, in one process.

    python -m bench.decode_speed [--rounds 7] [--tokens 128] [model.gguf]

Expected: a ratio of medians of at least 0.98; both call the same library on the same weights, so the ceiling is
1.00. The order changes from round to round, because a machine's speed drifts; run it alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp

from tensortier import library
from tensortier.engine import Engine
from tensortier.placement import threads_for
from tensortier.types import Plan, Sampling, Settings

PROMPT = "Once upon a time there was a lighthouse on a cliff, and the people who kept it"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    path = Path(library.find(args.model))
    threads = threads_for(0)
    settings = Settings(n_ctx=1024, n_batch=512, threads=threads, flash_attention="on", load_mode="mmap")
    engine = Engine(Plan(model=str(path), settings=settings))
    stock = llama_cpp.Llama(
        str(path),
        n_ctx=1024,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
    )

    def ours() -> float:
        request = engine.complete(PROMPT, Sampling(temperature=0.0, max_tokens=args.tokens))
        list(request)
        return request.stats.decode_tokens_per_second

    def theirs() -> float:
        times = []
        for _ in stock.create_completion(PROMPT, temperature=0.0, max_tokens=args.tokens, stream=True):
            times.append(time.perf_counter())
        # the last chunk carries only the finish reason
        return (len(times) - 2) / (times[-2] - times[0])

    runs: dict[str, tuple[Callable[[], float], list[float]]] = {
        "tensortier": (ours, []),
        "llama_cpp": (theirs, []),
    }
    for round_number in range(-1, args.rounds):
        order = list(runs) if round_number % 2 else list(reversed(runs))
        for name in order:
            measure, results = runs[name]
            speed = measure()
            if round_number >= 0:  # the first round warms up
                results.append(speed)
    medians = {name: statistics.median(results) for name, (_, results) in runs.items()}
    for name, (_, results) in runs.items():
        print(f"{name:12} median {medians[name]:7.2f} tokens/s  ({', '.join(f'{r:.1f}' for r in results)})")
    print(
        f"ratio of medians {medians['tensortier'] / medians['llama_cpp']:.3f}  (expected >= 0.98, ceiling 1.00)"
    )
    engine.close()
    stock.close()


if __name__ == "__main__":
    main()
