"""Is the predicted speed of weights on the drive the measured one? Mixtures and a dense model in little memory.

    python -m bench.validate_drive [--only TEXT] [--ratio R ...] [--tokens 24] [--prompt 256] [--rounds 1]

Each model runs in a memory control group of its size / ratio, as bench.tier_moe runs it. The prediction is that of the
planner for the same settings and the same room, by the kept calibration of kernels, and by the drive's speed measured
right before: drives of virtual machines differ by a factor from minute to minute, and that is not what is judged here.
Where routing is random the planner's prior (even use) holds; for real weights it is told the hit rate that is then
seen, as a trace would. The prompt is the first thing that is computed, so it finds nothing in RAM. Prints both speeds,
the relative error of each, and medians. Wanted: a median error of about 10 %. Run it alone; needs root for the group.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from tests.models import moe
from tests.models.synthetic import Synthetic

from bench import tier_dense, tier_moe, tier_runs
from tensortier import calibrate, gguf, hardware, paging, rates, slots
from tensortier.placement import threads_for
from tensortier.types import Estimate, Override, Placement, Plan, Settings, Tier, Workload

Q8 = Synthetic(
    layers=8, n_embd=1024, n_ff=512, heads=16, kv_heads=4, head_dim=64, experts=32, used=4, vocab=49152,
    qtype="Q8_0", embedding="Q8_0",
)  # fmt: skip
RATIOS = (1.33, 2.0, 4.0)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    path: Path
    dense: bool = False
    real: bool = False  # weights, so that experts are not used evenly


class Seen:
    """The hit rate of a run, as a trace would have told it."""

    source, profile, policies = "seen", None, ("lru",)

    def __init__(self, rate: float) -> None:
        self._rate = rate

    def rate(self, policy: str, capacity: Sequence[int], layers: Sequence[int]) -> float:
        return self._rate


def cases() -> list[Case]:
    return [
        Case("64 experts, 8 used, Q4_K", tier_runs.cached(tier_moe.MODEL)),
        Case("32 experts, 4 used, Q8_0", tier_runs.cached(Q8)),
        Case("SmolLM2 as 8 experts, Q8_0", tier_runs.CACHE / f"smollm2-moe-{moe.VERSION}.gguf", real=True),
        Case("dense Q8_0", tier_runs.cached(tier_dense.MODEL), dense=True),
    ]


def predicted(job: tier_runs.Job, found: rates.Rates, hits: Seen | None = None) -> Estimate:
    """As the planner would for this job."""
    model = gguf.read(Path(job.path))
    settings = Settings(
        n_ctx=2048, n_batch=512, n_ubatch=job.ubatch, threads=threads_for(0), load_mode="none", repack=False
    )
    plan = Plan(
        job.path,
        Placement(overrides=(Override(job.pattern, "TIER"),)),
        settings,
        tier=Tier(job.expert_bytes, job.dense_bytes, job.policy),
    )
    return paging.estimate(model, plan, found, Workload("", job.prompt, job.tokens, 0), {}, hits)


def _least(job: tier_runs.Job) -> int:
    """Bytes for the experts that one token uses in one layer, of the room there is."""
    if not job.expert_bytes:
        return 0
    model = gguf.read(Path(job.path))
    paged = [t for t in model.tensors if t.role.is_routed_expert]
    largest = max(layer.slot_bytes for layer in slots.layers_of(model, paged))
    return min(job.expert_bytes, largest * model.n_expert_used)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="models whose name holds this text")
    parser.add_argument("--ratio", type=float, nargs="*", default=RATIOS)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--read-bytes", type=int, help="instead of the calibration's")
    parser.add_argument("--queue-depth", type=int, help="instead of the calibration's")
    parser.add_argument(
        "--guesses", type=int, default=0, help="experts read ahead; -1: where it proves faster"
    )
    args = parser.parse_args()
    machine = hardware.probe()
    calibration = calibrate.load(machine)
    if calibration is None:
        raise SystemExit("measure this machine first: tensortier hardware --calibrate")
    kept = rates.from_calibration(calibration, machine, Settings(threads=threads_for(0), repack=False))
    reads = kept.reads or rates.Reads(Tier.queue_depth, Tier.read_bytes)
    depth, size = args.queue_depth or reads.queue_depth, args.read_bytes or reads.read_bytes
    errors: dict[str, list[float]] = {"decode": [], "prefill": []}
    for case in [c for c in cases() if args.only in c.name]:
        tiered = tier_runs.with_dense_tier if case.dense else tier_runs.with_tier
        for ratio in args.ratio:
            limit = int(case.path.stat().st_size / ratio)
            job = tier_runs.Job(
                str(case.path),
                args.tokens,
                args.prompt,
                guesses=args.guesses,
                read_bytes=size,
                queue_depth=depth,
            )
            job = tiered(job, limit)
            if max(job.expert_bytes, job.dense_bytes) <= 0:
                print(f"{case.name} at {ratio}: nothing is left for weights")
                continue
            for _ in range(args.rounds):
                speed = tier_runs.tier.drive_bandwidth(case.path, block=size, depth=depth, seconds=1.0)
                now = dataclasses.replace(kept, drive=rates.Speed(speed, 0.1))
                seen = tier_runs.run(job, limit)
                told = predicted(job, now, Seen(seen.hit_rate) if case.real else None)
                cold = predicted(dataclasses.replace(job, expert_bytes=_least(job)), now)
                pairs = {
                    "decode": (told.decode_tokens_per_second, seen.decode),
                    "prefill": (cold.prefill_tokens_per_second, seen.prefill),
                }
                for what, (ours, theirs) in pairs.items():
                    errors[what].append(abs(ours / theirs - 1))
                told_of = " ".join(f"{k} {v * 1e3:.1f}" for k, v in told.decode_seconds.items())
                print(
                    f"{case.name} at {ratio}: "
                    + ", ".join(
                        f"{what} {ours:.2f} predicted {theirs:.2f} measured {ours / theirs - 1:+.1%}"
                        for what, (ours, theirs) in pairs.items()
                    )
                    + f"; drive {speed / 1e9:.2f} GB/s, seen {seen.drive_rate / 1e9:.2f}, hits {seen.hit_rate:.2f}, "
                    f"{seen.bytes_per_token / 1e6:.0f} MB/token, stalled {seen.stall:.2f} ({told_of} ms)",
                    flush=True,
                )
    for what, found in errors.items():
        if found:
            print(f"{what}: median error {statistics.median(found):.1%}, worst {max(found):.1%}")


if __name__ == "__main__":
    main()
