"""Stock llama.cpp with a mapped file that memory does not hold: is what it reads and takes as predicted?

    python -m bench.validate_mapped [--only TEXT] [--ratio R ...] [--read-ahead KIB ...] [--tokens 4] [--warm 2]

Each model runs in a process of its own inside a memory control group of its size / ratio, after ``warm`` tokens that
are not counted. Bytes are those that the kernel counts for the drive while tokens are decoded. ``--read-ahead`` sets
the drive's for the run, and puts back what was there. The prediction is ``mapped.reads`` by the kept calibration of
kernels, and by the drive's speed measured right before. Wanted: speeds within a factor of 1.5. Run it alone, as root.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import llama_cpp

from bench import tier_dense, tier_moe, tier_runs
from tensortier import calibrate, cost, gguf, hardware, mapped, rates, tier
from tensortier.placement import threads_for
from tensortier.types import Plan, Settings, Workload

MODELS = {"64 experts, 8 used, Q4_K": tier_moe.MODEL, "dense Q8_0": tier_dense.MODEL}
BESIDE = 150 << 20  # bytes of the group that hold no file: the process, page tables; seen in memory.stat
BLOCK, SMALL = 1 << 20, 256 << 10


@dataclasses.dataclass(frozen=True)
class Seen:
    decode: float  # tokens/s
    nbytes: float  # per token
    faults: float  # that waited, per token
    others: float  # cores that other programs used


def queue_of(path: Path) -> Path:
    """Where the read-ahead of a file's drive is set."""
    device = path.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    return (block.parent if (block / "partition").exists() else block) / "queue" / "read_ahead_kb"


@contextlib.contextmanager
def read_ahead(path: Path, kib: int) -> Iterator[None]:
    setting = queue_of(path)
    before = setting.read_text()
    try:
        setting.write_text(str(kib))
        yield
    finally:
        setting.write_text(before)


def read_bytes(path: Path) -> int:
    """Of the file's drive, since the machine started."""
    sectors = (queue_of(path).parent.parent / "stat").read_text().split()[2]
    return int(sectors) * 512


def faults() -> int:
    return int(Path("/proc/vmstat").read_text().partition("\npgmajfault ")[2].split()[0])


def work(path: Path, tokens: int, warm: int, group: Path) -> Seen:
    """In a process of its own."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    running = tier_runs.Running(tier_runs.plan_of(tier_runs.Job(str(path), tokens, 8)))
    any_token = random.Random(1)
    for n in (8, *([1] * warm)):
        running.eval([any_token.randrange(1000, 40000) for _ in range(n)])
    own = sum(os.times()[:2])
    all_cores, nbytes, waited = tier_runs.processor_seconds(), read_bytes(path), faults()
    started = time.perf_counter()
    for _ in range(tokens):
        running.eval([any_token.randrange(1000, 40000)])
    seconds = time.perf_counter() - started
    others = (tier_runs.processor_seconds() - all_cores - (sum(os.times()[:2]) - own)) / seconds
    seen = Seen(tokens / seconds, (read_bytes(path) - nbytes) / tokens, (faults() - waited) / tokens, others)
    running.close()
    return seen


def run(path: Path, limit: int, tokens: int, warm: int) -> Seen:
    tier_runs.drop_cache(path)
    with tier_runs.control_group(limit) as group:
        arguments = [str(path), str(tokens), str(warm), str(group)]
        done = subprocess.run(
            [sys.executable, "-m", "bench.validate_mapped", "--work", *arguments],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return Seen(**json.loads(done.stdout.splitlines()[-1]))


def predicted(
    path: Path, limit: int, kib: int, found: rates.Rates, bandwidth: float, latency: float
) -> tuple[mapped.Read, float]:
    """What a token reads, and its seconds."""
    model = gguf.read(path)
    settings = Settings(n_ctx=2048, threads=threads_for(0), repack=False)
    whole = cost.estimate(model, Plan(str(path), settings=settings), found, Workload("", 8, 8, 0), {})
    read = mapped.reads(model, model.tensors, limit - BESIDE, kib << 10)
    return read, read.seconds(1 / whole.decode_tokens_per_second, bandwidth, latency)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="models whose name holds this text")
    parser.add_argument("--ratio", type=float, nargs="*", default=[1.33, 2.0, 4.0])
    parser.add_argument("--read-ahead", type=int, nargs="*", help="KiB; default: as it is set")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--warm", type=int, default=2)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the drive's setting is put back then too
    machine = hardware.probe()
    calibration = calibrate.load(machine)
    if calibration is None:
        raise SystemExit("measure this machine first: tensortier hardware --calibrate")
    found = rates.from_calibration(calibration, machine, Settings(threads=threads_for(0), repack=False))
    for name, synthetic in MODELS.items():
        if args.only not in name:
            continue
        path = tier_runs.cached(synthetic)
        for ratio in args.ratio:
            limit = int(path.stat().st_size / ratio)
            for kib in args.read_ahead or [int(queue_of(path).read_text())]:
                bandwidth = tier.drive_bandwidth(path, block=BLOCK, depth=24, seconds=0.5)
                single = tier.drive_bandwidth(path, block=SMALL, depth=1, seconds=0.3)
                latency = max(0.0, SMALL / single - SMALL / bandwidth)
                with read_ahead(path, kib):
                    seen = run(path, limit, args.tokens, args.warm)
                read, seconds = predicted(path, limit, kib, found, bandwidth, latency)
                print(
                    f"{name} at {ratio}, read-ahead {kib} KiB: {read.nbytes / 1e6:.0f} MB/token predicted, "
                    f"{seen.nbytes / 1e6:.0f} read; {1 / seconds:.3f} tokens/s predicted, {seen.decode:.3f} measured: "
                    f"{1 / seconds / seen.decode:.2f}; drive {bandwidth / 1e9:.2f} GB/s after "
                    f"{latency * 1e6:.0f} us, {seen.faults:.0f} faults waited, others used {seen.others:.2f} cores",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        file, count, before, folder = sys.argv[2:]
        print(json.dumps(dataclasses.asdict(work(Path(file), int(count), int(before), Path(folder)))))
    else:
        main()
