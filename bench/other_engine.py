"""Side by side with another engine that pages experts: same file, text, threads and memory, each in turn.

    python -m bench.other_engine --program PATH [--options TEXT] [--ratio 2] [--tokens 24] [--rounds 2]

The program is a small driver around that engine, built elsewhere; nothing of it is part of this project. It is called

    PROGRAM -m MODEL -t THREADS -n TOKENS --warm TOKENS --ubatch 1 --prompt-ids IDS [--forced-ids IDS]
            --cache-mb MIB OPTIONS

and goes through the prompt, then tokens that are not timed, then those that are: the forced ones, and without them the
likeliest each time. Its last line is JSON: ``decode_seconds``, ``prefill_seconds``, ``load_seconds`` and, of the timed
tokens, ``read_bytes``, ``hits`` and ``lookups`` (of experts); ``likeliest`` holds the token found after the prompt and
after every token since. ``--options`` is what that engine's authors recommend; it may be given more than once, and all
take part.

Both run in a memory control group of the model's size / RATIO with a cold page cache; its cache is what that leaves
beside the weights that are not paged and --outside; another size may be among the options, which come last.
Ceiling: the longer of (bytes read / the drive's speed just before and after) and (the time with everything in memory).
Ours is timed with as many guesses as bench.tier_compare has.

Both take the prompt token by token, so that no layer needs the experts of more than one and both compute the same.
The texts: greedy, which a model of random weights soon repeats, and tokens at random, the worst case for a cache. The
likeliest tokens of both engines are compared at every place. Run it alone; needs root for the group.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench import tier_compare, tier_moe, tier_runs
from tensortier import gguf

OUTSIDE = 136  # MiB of the other program beside its weights and its cache; too little and it is killed


@dataclass(frozen=True)
class Other:
    """What the other program said of its run."""

    decode: float  # tokens/s
    bytes_per_token: float
    hit_rate: float
    load_seconds: float
    others: float  # cores that other programs used meanwhile
    likeliest: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"decode {self.decode:6.2f} tokens/s, read {self.bytes_per_token / 1e6:6.1f} MB/token, "
            f"hits {self.hit_rate:.2f}, load {self.load_seconds:.1f} s"
            + (f", OTHERS USED {self.others:.2f} CORES" if self.others > 0.2 else "")
        )


def cache_mib(path: Path, limit: int, outside: int) -> int:
    """MiB for the other engine's cache of experts."""
    resident = sum(t.nbytes for t in gguf.read(path).tensors if not t.role.is_routed_expert)
    return ((limit - resident) >> 20) - outside


def run_other(program: Path, options: str, job: tier_runs.Job, cache: int, limit: int) -> Other:
    """Runs the other program once; raises SystemExit with its last words when it fails or is killed."""
    command = [str(program), "-m", job.path, "-t", str(job.threads), "-n", str(job.tokens)]
    command += ["--warm", str(job.warm), "--ubatch", str(job.ubatch)]
    command += ["--prompt-ids", ids(job.text[: job.prompt])]
    command += [] if job.greedy else ["--forced-ids", ids(job.text[job.prompt :])]
    command += ["--cache-mb", str(cache), *shlex.split(options)]
    tier_runs.drop_cache(Path(job.path))
    before, started = tier_runs.processor_seconds(), time.perf_counter()
    with tier_runs.control_group(limit) as group:
        # The shell enters the group, then becomes the program: its memory counts from the first byte.
        enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")]
        done = subprocess.run(enter + command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}: ended with {done.returncode}: {done.stderr[-1000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return Other(
        job.tokens / said["decode_seconds"],
        said["read_bytes"] / job.tokens,
        said["hits"] / said["lookups"] if said["lookups"] else 0.0,
        said["load_seconds"],
        (tier_runs.processor_seconds() - before) / (time.perf_counter() - started),
        tuple(said["likeliest"]),
    )


def ids(tokens: Sequence[int]) -> str:
    return ",".join(map(str, tokens))


def likeliest(job: tier_runs.Job) -> list[int]:
    """The likeliest token after the prompt and after every token since, as the job's engine finds it."""
    running = tier_runs.Running(tier_runs.plan_of(job))
    found = [running.eval(job.text[: job.prompt])]
    for i in range(job.warm + job.tokens):
        found.append(running.eval([found[-1] if job.greedy else job.text[job.prompt + i]]))
    running.close()
    return found


def likeliest_in_group(job: tier_runs.Job, limit: int) -> tuple[int, ...]:
    """The same, in a process of its own with ``limit`` bytes."""
    with tier_runs.control_group(limit) as group:
        command = [sys.executable, "-m", "bench.other_engine", json.dumps(asdict(job)), str(group)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job}: {done.stderr[-1000:]}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Whether they are the same, else where they part."""
    if tuple(ours) == tuple(theirs):
        return f"equal ({len(ours)} tokens)"
    first = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    same = sum(a == b for a, b in zip(ours, theirs, strict=False))
    return f"NOT equal: {same} of {len(ours)} tokens are the same, the first that differs is number {first}"


def compare(program: Path, options: Sequence[str], job: tier_runs.Job, args: argparse.Namespace) -> None:
    """Runs all in turn, round after round, and prints them beside the ceiling."""
    path = Path(job.path)
    limit = int(path.stat().st_size / args.ratio)
    cache = cache_mib(path, limit, args.outside)
    ours = tier_runs.with_tier(job, limit)
    full = tier_runs.run(replace(job, load_mode="none"), None)
    kind = "greedy" if job.greedy else "forced"
    print(f"{kind} text, cache of the other {cache} MiB; all in memory {full.decode:.2f} tokens/s")
    speeds: dict[str, list[float]] = {name: [] for name in ("tier", *options)}
    text: tuple[int, ...] = ()
    for _ in range(args.rounds):
        for name in speeds:
            time.sleep(args.rest)
            bandwidth = tier_runs.drive_bandwidth(path)
            found: tier_runs.Result | Other
            if name == "tier":
                found = tier_runs.run(ours, limit)
            else:
                found = run_other(program, name, job, cache, limit)
                text = found.likeliest
            bandwidth = (bandwidth + tier_runs.drive_bandwidth(path)) / 2
            ceiling = 1 / max(found.bytes_per_token / bandwidth, 1 / full.decode)
            speeds[name].append(found.decode)
            print(f"  {name}: {found}")
            print(
                f"    ceiling {ceiling:.2f} at {bandwidth / 1e9:.2f} GB/s: {found.decode / ceiling:.2f} of it"
            )
    print(f"  likeliest tokens of both: {agreement(likeliest_in_group(ours, limit), text)}")
    tier = statistics.median(speeds.pop("tier"))
    name, best = max(((n, statistics.median(s)) for n, s in speeds.items()), key=lambda pair: pair[1])
    print(f"  {tier:.2f} tokens/s against {best:.2f} ({name}): {tier / best:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--options", action="append", default=None, help="for the program, in one word")
    parser.add_argument("--ratio", type=float, default=2.0, help="model size / memory")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--warm", type=int, default=8, help="tokens before those that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--rest", type=float, default=3.0, help="seconds between runs: drives may allow bursts"
    )
    parser.add_argument("--text", choices=("greedy", "forced", "both"), default="both")
    parser.add_argument("--outside", type=int, default=OUTSIDE, help="MiB beside the program's weights")
    parser.add_argument("--model", type=Path, default=None)
    args = parser.parse_args()
    path = args.model or tier_runs.cached(tier_moe.MODEL)
    random_ids = random.Random(1)
    text = tuple(random_ids.randrange(1000, 40000) for _ in range(args.prompt + args.warm + args.tokens))
    job = tier_runs.Job(str(path), args.tokens, args.prompt, ubatch=1, threads=args.threads)
    job = replace(job, warm=args.warm, text=text, guesses=tier_compare.GUESSES)
    print(
        f"{path.name}: {path.stat().st_size / 1e9:.2f} GB in 1/{args.ratio:g} of it, {args.threads} threads"
    )
    for greedy in (True, False):
        if args.text in ("both", "greedy" if greedy else "forced"):
            compare(args.program, args.options or [""], replace(job, greedy=greedy), args)


def in_group(job: tier_runs.Job, group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
    print(json.dumps(likeliest(job)))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].startswith("{"):
        in_group(tier_runs.Job(**json.loads(sys.argv[1])), Path(sys.argv[2]))
    else:
        main()
