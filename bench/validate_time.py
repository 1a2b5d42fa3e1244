"""Is the predicted speed the measured one? Decode and prefill of many configurations on this machine.

    python -m bench.validate_time [--quick]

Calibrates first if nothing valid is kept. Prints predicted and measured speeds of each configuration, the median
and 90th percentile of the relative error of decode, and how many pairs that differ by more than 10 % are predicted
in the right order. Run it alone. The physical ceiling is the calibration itself: no plan is faster than its weights
can be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from pathlib import Path

from tests.models import moe, smollm2, synthetic

from bench import time_model
from tensortier import calibrate, gguf, hardware, planner
from tensortier.engine import Engine
from tensortier.types import Placement, Plan, Settings

CACHE = Path(".cache/models")


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    path: Path
    settings: Settings
    depth: int = 0


def cases() -> list[Case]:
    """Real and synthetic models, weight types, threads, depths, KV types and micro-batches."""

    def build(**options: object) -> Path:
        model = synthetic.Synthetic(**options)  # type: ignore[arg-type]
        path = CACHE / f"synthetic-{model.key()}.gguf"
        return path if path.exists() else synthetic.build(model, path)

    real = smollm2.path()
    mixture = CACHE / f"smollm2-moe-{moe.VERSION}.gguf"
    if not mixture.exists():
        moe.build(mixture)
    base = Settings(n_ctx=2048, flash_attention="on")
    found = [Case("SmolLM2 Q4_1", real, base), Case("SmolLM2 MoE Q8_0", mixture, base)]
    found += [
        Case("SmolLM2 1 thread", real, dataclasses.replace(base, threads=1)),
        Case("MoE 1 thread", mixture, dataclasses.replace(base, threads=1)),
        Case("SmolLM2 ubatch 64", real, dataclasses.replace(base, n_ubatch=64)),
    ]
    deep = dataclasses.replace(base, n_ctx=10240)
    for depth in (1024, 4096, 8192):
        found.append(Case(f"SmolLM2 depth {depth}", real, deep, depth))
    for kv in ("q8_0", "q4_0"):
        settings = dataclasses.replace(deep, type_k=kv, type_v=kv)
        found.append(Case(f"SmolLM2 KV {kv} depth 4096", real, settings, 4096))
    shape = {
        "layers": 8,
        "n_embd": 2048,
        "n_ff": 6144,
        "heads": 16,
        "kv_heads": 4,
        "head_dim": 128,
        "experts": 0,
    }
    for kind in ("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q4_0", "Q5_0", "IQ4_XS", "IQ4_NL"):
        if kind not in synthetic.QTYPES:
            continue
        path = build(**shape, used=0, vocab=49152, qtype=kind, embedding=kind)
        found.append(Case(f"dense {kind}", path, base))
        if kind in ("Q4_K", "Q4_0"):
            found.append(Case(f"dense {kind} plain", path, dataclasses.replace(base, repack=False)))
            found.append(Case(f"dense {kind} 1 thread", path, dataclasses.replace(base, threads=1)))
    for kind, experts, used in (("Q4_0", 16, 2), ("Q8_0", 32, 4), ("Q4_K", 64, 8)):
        if kind not in synthetic.QTYPES:
            continue
        path = build(
            layers=8, n_embd=1024, n_ff=512, heads=16, kv_heads=4, head_dim=64, experts=experts, used=used,
            vocab=49152, qtype=kind, embedding=kind,
        )  # fmt: skip
        found.append(Case(f"MoE {experts}x{used} {kind}", path, base))
    return found


def measure(case: Case, plan: Plan) -> tuple[float, float]:
    """(prefill, decode) in tokens/s, medians of three after a warm-up: 256 tokens behind ``depth`` others, then 24
    single ones. Token numbers are made up; sampling is not part of it."""
    prefill, decode = [], []
    with Engine(plan) as engine:
        llama = engine._llama
        tokens = [1000 + i * 7 % 30000 for i in range(case.depth + 256 + 24)]
        llama.reset()
        if case.depth:
            llama.eval(tokens[: case.depth])
        for i in range(4):
            llama.n_tokens = case.depth  # the next computation drops what lies beyond
            start = time.perf_counter()
            llama.eval(tokens[case.depth : case.depth + 256])
            middle = time.perf_counter()
            for token in tokens[-24:]:
                llama.eval([token])
            if i:
                prefill.append(256 / (middle - start))
                decode.append(24 / (time.perf_counter() - middle))
    return statistics.median(prefill), statistics.median(decode)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="every third configuration")
    args = parser.parse_args()
    machine = hardware.probe()
    calibration = calibrate.load(machine)
    if calibration is None:
        calibration = calibrate.calibrate(machine)
        calibrate.save(calibration)
    rows = []
    for case in cases()[:: 3 if args.quick else 1]:
        model = gguf.read(case.path)
        plan = planner.manual_plan(model, machine, case.settings, Placement())
        workload = time_model.Workload(prompt=256, output=24, depth=case.depth)
        predicted = time_model.estimate(model, calibration, plan, workload)
        if predicted is None:
            print(f"{case.name:28} not predicted")
            continue
        prefill, decode = measure(case, plan)
        error = predicted.decode_tokens_per_second / decode - 1
        prefill_error = predicted.prefill_tokens_per_second / prefill - 1
        rows.append((predicted.decode_tokens_per_second, decode, abs(error), abs(prefill_error)))
        print(
            f"{case.name:28} decode {predicted.decode_tokens_per_second:7.1f} predicted {decode:7.1f} measured "
            f"{error:+6.1%}   prefill {predicted.prefill_tokens_per_second:7.0f} {prefill:7.0f} {prefill_error:+6.1%}",
            flush=True,
        )
    errors = sorted(r[2] for r in rows)
    pairs = [(a, b) for a, b in itertools.combinations(rows, 2) if max(a[1], b[1]) > 1.1 * min(a[1], b[1])]
    right = sum((a[0] > b[0]) == (a[1] > b[1]) for a, b in pairs)
    print(f"{len(rows)} configurations: decode error median {statistics.median(errors):.1%}, ", end="")
    print(f"90th percentile {errors[int(0.9 * (len(errors) - 1))]:.1%} (wanted: 8 %, 20 %)")
    print(f"prefill error median {statistics.median(r[3] for r in rows):.1%}")
    print(f"order right in {right} of {len(pairs)} pairs, {right / max(1, len(pairs)):.1%} (wanted: 95 %)")


if __name__ == "__main__":
    main()
