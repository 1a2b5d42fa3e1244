"""What batching brings: 64 requests one after the other, and all at once, in turn, with the same engine.

    python -m bench.batching [--parallel 16] [--requests 64] [--tokens 64] [--rounds 1] [model.gguf]

Each request asks about its own number, and its answer is bound to that number by a grammar; a lost or mixed one ends
the run. Expected on SmolLM2 with two cores: at least 2 times the tokens/s of the sequential run. The ceiling is the
number of sequences where reading the weights is all that takes time; a processor's ceiling is lower: it is what
llama.cpp itself gains from a batch of that size (``llama-batched-bench``), which the last line measures.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from pathlib import Path

from tensortier import library
from tensortier._llama.decode import timer
from tensortier.engine import Engine, Request
from tensortier.placement import threads_for
from tensortier.types import Plan, Sampling, Settings


def ask(engine: Engine, number: int, tokens: int) -> Request:
    sampling = Sampling(
        temperature=0.8,
        seed=number,
        max_tokens=tokens,
        grammar=f'root ::= "Number {number}: " [^\\x00]*',
    )
    return engine.complete(f"Write a sentence about the number {number}.\n", sampling)


def check(number: int, request: Request) -> int:
    """Tokens of the answer, which must be the right one."""
    text = "".join(piece.text for piece in request)
    head = f"Number {number}: "
    if request.stats.finish_reason not in ("length", "stop") or not (
        text.startswith(head) or head.startswith(text)
    ):
        raise SystemExit(f"the answer to request {number} is {text!r}")
    return request.stats.completion_tokens


def sequential(engine: Engine, args: argparse.Namespace) -> float:
    """Tokens/s."""
    started = time.perf_counter()
    tokens = sum(check(i, ask(engine, i, args.tokens)) for i in range(args.requests))
    return tokens / (time.perf_counter() - started)


def together(engine: Engine, args: argparse.Namespace) -> float:
    counts: dict[int, int] = {}

    def client(number: int) -> None:
        counts[number] = check(number, ask(engine, number, args.tokens))

    started = time.perf_counter()
    threads = [threading.Thread(target=client, args=(i,)) for i in range(args.requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if sorted(counts) != list(range(args.requests)):
        raise SystemExit(f"answers were lost: only {sorted(counts)} came")
    return sum(counts.values()) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    path = Path(library.find(args.model))
    settings = Settings(n_ctx=4096, n_seq_max=args.parallel, threads=threads_for(0))
    results: dict[str, list[float]] = {"sequential": [], "together": []}
    with Engine(Plan(str(path), settings=settings)) as engine:
        for round_number in range(args.rounds):
            runs = (sequential, together) if round_number % 2 else (together, sequential)
            for run in runs:
                results[run.__name__].append(run(engine, args))
                print(f"{run.__name__:10} {results[run.__name__][-1]:7.1f} tokens/s", flush=True)
    one, many = (statistics.median(results[name]) for name in ("sequential", "together"))
    print(f"{args.parallel} sequences: {many / one:.2f} times the sequential speed  (expected >= 2)")
    with timer(Plan(str(path), settings=Settings(n_ctx=4096, threads=threads_for(0)))) as clock:
        clock.fill(64)
        single, batch = clock.single(16), min(clock.compute(args.parallel) for _ in range(8))
    print(
        f"llama.cpp alone computes {args.parallel} tokens together {args.parallel * single / batch:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
