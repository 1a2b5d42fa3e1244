"""Runs of a model in a process of its own, inside a memory control group, with a cold page cache."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import llama_cpp
import numpy as np
from tests.models import synthetic

from tensortier import gguf, tier
from tensortier.placement import threads_for
from tensortier.types import Override, Placement, Plan, Settings, Tier

CACHE = Path(__file__).parent.parent / ".cache" / "models"
GROUPS = Path("/sys/fs/cgroup/memory")
OUTSIDE = 140 << 20  # Python, its libraries, llama.cpp's own buffers for this size of model; measured
DENSE = 70 << 20  # more of them for the dense model
PROMPT = 64 << 20  # and for its long prompts


@dataclass(frozen=True)
class Job:
    """What the process does."""

    path: str
    tokens: int
    prompt: int
    expert_bytes: int = 0  # 0: stock llama.cpp
    dense_bytes: int = 0
    pattern: str = ""
    policy: str = "lru"
    reader: str = "auto"
    read_bytes: int = Tier.read_bytes
    queue_depth: int = Tier.queue_depth
    guesses: int = Tier.guesses
    load_mode: str = "mmap"
    ubatch: int = 512
    threads: int = 0  # 0: as many as there are cores
    repack: bool = False  # slots have the kernels of weights that are not reordered
    warm_start: bool = False
    warm: int = 4  # tokens before the ones that are timed
    text: tuple[int, ...] = ()  # tokens to go through; none: random ones
    greedy: bool = False  # each token the likeliest after the last


@dataclass(frozen=True)
class Result:
    decode: float  # tokens/s
    prefill: float
    bytes_per_token: float  # read by us while decoding
    prefill_bytes: float
    drive_rate: float  # bytes/s while decoding, when at least one read was under way
    hit_rate: float
    peak: int  # bytes of the control group, or of the process where there is none
    load_seconds: float
    stall: float  # of the decode time
    recall: float  # of guesses
    precision: float
    guessing: bool
    others: float = 0.0  # cores that other programs used meanwhile: a run with many is worth nothing

    def __str__(self) -> str:
        return (
            f"decode {self.decode:6.2f} tokens/s, prefill {self.prefill:7.1f}, "
            f"read {self.bytes_per_token / 1e6:6.1f} MB/token at {self.drive_rate / 1e9:.2f} GB/s, "
            f"hits {self.hit_rate:.2f}, stalled {self.stall:.2f}, peak {self.peak / 1e9:.3f} GB, "
            f"load {self.load_seconds:.1f} s, guesses {'on' if self.guessing else 'off'}: "
            f"recall {self.recall:.2f}, precision {self.precision:.2f}"
            + (f", OTHERS USED {self.others:.2f} CORES" if self.others > 0.2 else "")
        )


def cached(model: synthetic.Synthetic) -> Path:
    path = CACHE / f"synthetic-{model.key()}.gguf"
    return path if path.exists() else synthetic.build(model, path)


def with_tier(job: Job, limit: int) -> Job:
    """The job with as many experts in memory as fit beside everything else."""
    model = gguf.read(Path(job.path))
    resident = sum(t.nbytes for t in model.tensors if not t.role.is_routed_expert)
    room = limit - resident - OUTSIDE
    return replace(job, expert_bytes=room, pattern=r"_exps\.weight", load_mode="none")


def with_dense_tier(job: Job, limit: int) -> Job:
    """The job with as much of the dense weights in memory as fits beside everything else."""
    pattern = r"blk\.\d+\.(ffn_(up|gate|down)|attn_(q|k|v|output))\.weight"
    model = gguf.read(Path(job.path))
    resident = sum(t.nbytes for t in model.tensors if not (t.role.is_dense_ffn or ".attn_" in t.name))
    outside = OUTSIDE + DENSE + (PROMPT if job.prompt > 64 else 0)
    return replace(job, dense_bytes=limit - resident - outside, pattern=pattern, load_mode="none")


def drive_bandwidth(path: Path, seconds: float = 1.0) -> float:
    """Bytes/s of direct reads at random places, of about the size of an expert's part."""
    return tier.drive_bandwidth(path, seconds=seconds)


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A new memory control group (version 1) of its own."""
    group = GROUPS / f"tensortier-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def run(job: Job, limit: int | None) -> Result:
    """Runs the job in a process of its own; in a group of ``limit`` bytes, or free."""
    command = [sys.executable, "-m", "bench.tier_runs", json.dumps(asdict(job))]
    drop_cache(Path(job.path))
    before, started = processor_seconds(), time.perf_counter()
    with contextlib.nullcontext() if limit is None else control_group(limit) as group:
        command += [] if group is None else [str(group)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job}: {done.stderr[-2000:]}")
    others = (processor_seconds() - before) / (time.perf_counter() - started)
    return replace(Result(**json.loads(done.stdout.splitlines()[-1])), others=others)


def processor_seconds() -> float:
    """Of all cores since the machine started, without what children of this process used."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    used = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used - children.ru_utime - children.ru_stime


def drop_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def plan_of(job: Job) -> Plan:
    settings = Settings(
        n_ctx=2048,
        n_batch=max(job.ubatch, 512),
        n_ubatch=job.ubatch,
        threads=job.threads or threads_for(0),
        load_mode=job.load_mode,
        repack=job.repack,
    )
    plan = Plan(job.path, settings=settings)
    if not job.expert_bytes and not job.dense_bytes:
        return plan
    paging = Tier(
        expert_bytes=job.expert_bytes,
        dense_bytes=job.dense_bytes,
        policy=job.policy,
        reader=job.reader,
        read_bytes=job.read_bytes,
        queue_depth=job.queue_depth,
        guesses=job.guesses,
        warm_start=job.warm_start,
    )
    return replace(plan, placement=Placement(overrides=(Override(job.pattern, "TIER"),)), tier=paging)


class Running:
    """A loaded model, fed with tokens through llama.cpp's own interface."""

    def __init__(self, plan: Plan) -> None:
        from tensortier._llama.params import Parameters
        from tensortier.tier import PagedWeights

        started = time.perf_counter()
        self.paged = PagedWeights(plan) if plan.tier else None
        self._parameters = Parameters(plan, self.paged.buffer_type if self.paged else None)
        model = llama_cpp.llama_model_default_params()
        self._parameters.edit_model(model)
        self.model = llama_cpp.llama_model_load_from_file(plan.model.encode(), model)
        if self.paged:
            self.paged.loaded()
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = plan.settings.n_ctx
        self._parameters.edit_context(context)
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.position = 0
        self.load_seconds = time.perf_counter() - started

    def eval(self, tokens: Sequence[int]) -> int:
        """Computes them and returns the likeliest next token."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, self.position + i, i == len(tokens) - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}: {self.paged and self.paged.take_error()}")
        self.position += len(tokens)
        width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (width,))
        return int(logits.argmax())

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)
        if self.paged:
            self.paged.close()


def work(job: Job, group: Path | None) -> Result:
    """What the process does: the prompt, then one token after the other."""
    if group:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    running = Running(plan_of(job))
    tokens = random.Random(1)
    prompt = list(job.text[: job.prompt]) or [tokens.randrange(1000, 40000) for _ in range(job.prompt)]
    rest = iter(job.text[job.prompt :])

    def following(likeliest: int) -> int:
        if job.greedy:
            return likeliest
        return next(rest) if job.text else tokens.randrange(1000, 40000)

    drop_cache(Path(job.path))
    started = time.perf_counter()
    token = running.eval(prompt)
    prefill = job.prompt / (time.perf_counter() - started)
    for _ in range(job.warm):
        token = running.eval([following(token)])
    before = running.paged.stats() if running.paged else None
    started = time.perf_counter()
    for _ in range(job.tokens):
        token = running.eval([following(token)])
    seconds = time.perf_counter() - started
    bytes_per_token = rate = hits = stall = prefill_bytes = 0.0
    guessed = (0.0, 0.0, False)
    if running.paged and before:
        after = running.paged.stats()
        read = after.drive_bytes - before.drive_bytes
        busy = after.drive_busy_seconds - before.drive_busy_seconds
        bytes_per_token, rate = read / job.tokens, read / busy if busy else 0.0
        uses = sum(row.uses for row in after.layers) - sum(row.uses for row in before.layers)
        found = sum(row.hits for row in after.layers) - sum(row.hits for row in before.layers)
        hits = found / uses if uses else 0.0
        stall = (after.stall_seconds - before.stall_seconds) / seconds
        prefill_bytes = float(before.drive_bytes)
        guessed = (after.guess_recall, after.guess_precision, after.guessing)
    peak_file = group / "memory.max_usage_in_bytes" if group else None
    peak = int(peak_file.read_text()) if peak_file else peak_resident()
    running.close()
    return Result(
        job.tokens / seconds,
        prefill,
        bytes_per_token,
        prefill_bytes,
        rate,
        hits,
        min(peak, peak_resident()),
        running.load_seconds,
        stall,
        *guessed,
    )


def peak_resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def parser(description: str) -> argparse.ArgumentParser:
    """The options that the comparisons share."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--ratio", type=float, default=2.0, help="model size / memory")
    made.add_argument("--tokens", type=int, default=24, help="to decode")
    made.add_argument("--prompt", type=int, default=8, help="tokens of the prompt")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--rest", type=float, default=5.0, help="seconds between runs: drives may allow bursts")
    made.add_argument("--policy", default=Tier.policy)
    made.add_argument("--reader", default=Tier.reader)
    made.add_argument("--read-bytes", type=int, default=Tier.read_bytes)
    made.add_argument("--queue-depth", type=int, default=Tier.queue_depth)
    made.add_argument("--guesses", type=int, default=Tier.guesses)
    made.add_argument("--no-stock", action="store_true", help="only ours")
    made.add_argument("--model", type=Path, default=None)
    return made


def compare(path: Path, args: argparse.Namespace, tiered: Callable[[Job, int], Job]) -> None:
    """Runs both engines in turn and prints their speeds beside the ceiling."""
    job = Job(
        str(path),
        tokens=args.tokens,
        prompt=args.prompt,
        policy=args.policy,
        reader=args.reader,
        read_bytes=args.read_bytes,
        queue_depth=args.queue_depth,
        guesses=args.guesses,
    )
    size = path.stat().st_size
    limit = int(size / args.ratio)
    full = run(replace(job, load_mode="none"), None)
    print(f"{path.name}: {size / 1e9:.2f} GB in {limit / 1e9:.2f} GB")
    print(f"all in memory: decode {full.decode:.2f} tokens/s, prefill {full.prefill:.1f}")
    ours: list[Result] = []
    stock: list[Result] = []
    shares = []
    for _ in range(args.rounds):
        time.sleep(args.rest)
        bandwidth = drive_bandwidth(path)
        time.sleep(args.rest)
        ours.append(run(tiered(job, limit), limit))
        bandwidth = (
            bandwidth + drive_bandwidth(path)
        ) / 2  # before and after: it changes from minute to minute
        ceiling = 1 / max(ours[-1].bytes_per_token / bandwidth, 1 / full.decode)
        seen = 1 / max(ours[-1].bytes_per_token / max(ours[-1].drive_rate, 1.0), 1 / full.decode)
        shares.append(ours[-1].decode / ceiling)
        print(f"  tier  {ours[-1]}")
        print(
            f"        ceiling {ceiling:.2f} at the drive's {bandwidth / 1e9:.2f} GB/s: {shares[-1]:.2f} of it; "
            f"{seen:.2f} at the rate seen: {ours[-1].decode / seen:.2f}"
        )
        if not args.no_stock:
            time.sleep(args.rest)
            stock.append(run(job, limit))
            print(f"  stock {stock[-1]}")
    decode = statistics.median(r.decode for r in ours)
    print(f"median {decode:.2f} tokens/s, {statistics.median(shares):.2f} of the ceiling")
    if stock:
        theirs = statistics.median(r.decode for r in stock)
        prompts = statistics.median(r.prefill for r in ours) / statistics.median(r.prefill for r in stock)
        print(
            f"stock llama.cpp {theirs:.2f} tokens/s: {decode / theirs:.1f} times; prefill {prompts:.1f} times"
        )


if __name__ == "__main__":
    asked = Job(**json.loads(sys.argv[1]))
    print(json.dumps(asdict(work(asked, Path(sys.argv[2]) if len(sys.argv) > 2 else None))))
