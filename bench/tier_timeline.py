"""A picture of a few layers' time: reads of the drive beside computing, from a run that was timed.

    python -m bench.tier_timeline [--ratio 2] [--guesses 0,4] [--layers 4] [--out docs/timeline.svg]

The model and its control group are those of bench.tier_moe. For each number of guesses one row of pictures: consecutive
layers, from the moment a layer's experts are known, in a token whose time is the median of the tokens timed. Printed
beside it: the share of the time with no read under way, with computing, and waiting.
Run it alone; needs root for the group.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench import tier_moe, tier_runs

Event = tuple[str, float, float, int]

LAYERS = tier_moe.MODEL.layers
WARM, TIMED = 16, 9  # tokens
LEFT, WIDTH, LANE, BAR = 96, 840, 7, 12  # of the picture, in pixels
COLOURS = {"compute": "#c2571a", "wait": "#d9d4c7", "read": "#2f6f9f"}


def record(job: tier_runs.Job) -> list[Event]:
    running = tier_runs.Running(tier_runs.plan_of(job))
    assert running.paged
    tokens = random.Random(1)
    running.eval([tokens.randrange(1000, 40000) for _ in range(job.prompt)])
    for _ in range(WARM):
        running.eval([tokens.randrange(1000, 40000)])
    running.paged.start_timeline(100_000)
    for _ in range(TIMED):
        running.eval([tokens.randrange(1000, 40000)])
    events = running.paged.timeline()
    running.close()
    return events


def overlap(event: Event, begin: float, end: float) -> float:
    return max(0.0, min(event[2], end) - max(event[1], begin))


def shares(events: Sequence[Event], begin: float, end: float) -> dict[str, float]:
    """Of the time between: computing with experts, waiting, and with no read under way."""
    found = {
        what: sum(overlap(e, begin, end) for e in events if e[0] == what) / (end - begin)
        for what in ("compute", "wait")
    }
    idle, at = 0.0, begin
    for event in sorted((e for e in events if e[0] == "read"), key=lambda e: e[1]):
        idle += max(0.0, min(event[1], end) - at)
        at = max(at, min(event[2], end))
    return {**found, "no read": (idle + max(0.0, end - at)) / (end - begin)}


def typical(events: Sequence[Event], layers: int) -> tuple[float, float]:
    """Begin and end of the first layers in the token whose time is the median."""
    passes = [e for e in events if e[0] == "pass"]
    begins = [i for i, e in enumerate(passes) if e[3] == 0 and i + LAYERS < len(passes)]
    middle = sorted(begins, key=lambda i: passes[i + LAYERS][1] - passes[i][1])[len(begins) // 2]
    first = middle + LAYERS // 3
    return passes[first][1], passes[first + layers][1]


def lanes(reads: Sequence[Event]) -> list[tuple[int, Event]]:
    """Each read in the first row that is free when it begins."""
    free: list[float] = []
    placed = []
    for event in sorted(reads, key=lambda e: e[1]):
        row = next((i for i, until in enumerate(free) if until <= event[1]), len(free))
        free[row:] = [event[2], *free[row + 1 :]]
        placed.append((row, event))
    return placed


def draw(runs: Sequence[tuple[str, list[Event]]], layers: int) -> str:
    """An SVG with one strip for each run, all at the same scale."""
    spans = [typical(events, layers) for _, events in runs]
    scale = WIDTH / max(end - begin for begin, end in spans)
    body, y = [], 30
    for (label, events), (begin, end) in zip(runs, spans, strict=True):
        total = shares(events, begin, end)

        def box(event: Event, top: float, height: float, begin: float = begin, end: float = end) -> str:
            x = LEFT + (max(event[1], begin) - begin) * scale
            width = max((min(event[2], end) - max(event[1], begin)) * scale, 0.4)
            return f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height}" fill="{COLOURS[event[0]]}"/>'

        title = (
            f"{label}: {(end - begin) * 1e3 / layers:.1f} ms per layer; no read under way {total['no read']:.0%} of "
            f"the time, computing experts {total['compute']:.0%}"
        )
        body.append(f'<text x="{LEFT}" y="{y}" class="h">{title}</text>')
        y += 10
        inside = [e for e in events if e[2] > begin and e[1] < end]
        body.append(f'<text x="8" y="{y + 11}">experts</text>')
        body += [box(e, y, BAR) for e in inside if e[0] in ("wait", "compute")]
        y += BAR + 6
        placed = lanes([e for e in inside if e[0] == "read"])
        depth = 1 + max(row for row, _ in placed)
        body.append(f'<text x="8" y="{y + 11}">reads</text>')
        body += [box(e, y + row * LANE, LANE - 1) for row, e in placed]
        bottom = y + depth * LANE
        for event in inside:
            if event[0] == "pass":
                x = LEFT + (event[1] - begin) * scale
                body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - BAR - 8}" y2="{bottom}" class="p"/>')
        y = bottom + 34
    ticks = int(WIDTH / scale * 1e3 / 10) + 1
    for tick in range(ticks):
        x = LEFT + tick * 0.01 * scale
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 24}" y2="{y - 18}" class="p"/>')
        body.append(f'<text x="{x:.1f}" y="{y - 6}" text-anchor="middle">{tick * 10} ms</text>')
    x = LEFT + WIDTH - 400
    for what, label in (
        ("compute", "computing experts"),
        ("wait", "waiting for the drive"),
        ("read", "one read"),
    ):
        body.append(f'<rect x="{x}" y="{y + 6}" width="10" height="10" fill="{COLOURS[what]}"/>')
        body.append(f'<text x="{x + 14}" y="{y + 15}">{label}</text>')
        x += 146
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 24} {y + 26}" font-family="sans-serif" '
        'font-size="11"><style>.h{font-weight:bold}.p{stroke:#333;stroke-width:.8}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratio", type=float, default=2.0)
    parser.add_argument("--guesses", default="0,4")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)  # the process inside the group
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        (args.group / "cgroup.procs").write_text(str(os.getpid()))
        print("\n" + json.dumps(record(tier_runs.Job(**json.loads(args.job)))))
        return
    path = tier_runs.cached(tier_moe.MODEL)
    limit = int(path.stat().st_size / args.ratio)
    runs: list[tuple[str, list[Event]]] = []
    for number in map(int, args.guesses.split(",")):
        job = tier_runs.Job(str(path), tokens=TIMED, prompt=8, guesses=number)
        job = tier_runs.with_tier(job, limit)
        with tier_runs.control_group(limit) as group:
            command = [sys.executable, "-m", "bench.tier_timeline", "--group", str(group)]
            out = subprocess.run(
                [*command, "--job", json.dumps(asdict(job))], stdout=subprocess.PIPE, check=True
            )
        events: list[Event] = [tuple(e) for e in json.loads(out.stdout.splitlines()[-1])]
        passes = [e for e in events if e[0] == "pass"]
        whole = shares(events, passes[0][1], passes[-1][1])
        told = ", ".join(f"{name} {share:.2f}" for name, share in whole.items())
        each = (passes[-1][1] - passes[0][1]) / (len(passes) - 1)
        print(f"{number} guesses: {each * 1e3:.2f} ms per layer: {told}")
        runs.append((f"{number} experts read ahead" if number else "nothing read ahead", events))
    if args.out:
        args.out.write_text(draw(runs, args.layers), encoding="utf-8")


if __name__ == "__main__":
    main()
