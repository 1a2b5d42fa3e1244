"""Is the predicted speed the measured one? Decode and prefill of many configurations on this machine.

    python -m bench.validate_time [--only TEXT] [--rpc] [--keep] [--json FILE]

Calibrates first (``--keep``: takes the kept calibration). Prints predicted and measured speeds of each configuration,
the median and 90th percentile of the relative error of decode, and how many pairs that differ by more than 10 % are
predicted in the right order. ``--rpc`` adds configurations with ggml's RPC server on this machine as a second device.
Run it alone: about seven minutes on two cores. The physical ceiling is the calibration itself: no plan is faster than
its weights can be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.backend_fixtures import rpc_server
from tests.models import moe, smollm2, synthetic

from tensortier import calibrate, cost, gguf, hardware, placement, rates
from tensortier._llama import decode
from tensortier.types import Override, Placement, Plan, Settings, Workload

CACHE = Path(".cache/models")
PROMPT, OUTPUT = 256, 24


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    path: Path
    settings: Settings
    depth: int = 0
    n_gpu_layers: int = 0
    overrides: tuple[Override, ...] = ()


def _build(**options: object) -> Path:
    model = synthetic.Synthetic(**options)  # type: ignore[arg-type]
    path = CACHE / f"synthetic-{model.key()}.gguf"
    return path if path.exists() else synthetic.build(model, path)


def _dense(kind: str, layers: int = 8) -> Path:
    return _build(
        layers=layers, n_embd=2048, n_ff=6144, heads=16, kv_heads=4, head_dim=128, experts=0, used=0, vocab=49152,
        qtype=kind, embedding=kind,
    )  # fmt: skip


def _mixture(kind: str, experts: int, used: int) -> Path:
    return _build(
        layers=8, n_embd=1024, n_ff=512, heads=16, kv_heads=4, head_dim=64, experts=experts, used=used,
        vocab=49152, qtype=kind, embedding=kind,
    )  # fmt: skip


def cases() -> list[Case]:
    """Real and synthetic models, weight types, threads, depths, KV types and micro-batches."""
    real = smollm2.path()
    mixture = CACHE / f"smollm2-moe-{moe.VERSION}.gguf"
    if not mixture.exists():
        moe.build(mixture)
    base = Settings(n_ctx=2048, threads=2, flash_attention="on")
    one = dataclasses.replace(base, threads=1)
    deep = dataclasses.replace(base, n_ctx=10240)
    found = [
        Case("SmolLM2 Q4_1", real, base),
        Case("SmolLM2 MoE Q8_0", mixture, base),
        Case("SmolLM2 1 thread", real, one),
        Case("MoE 1 thread", mixture, one),
        Case("SmolLM2 ubatch 64", real, dataclasses.replace(base, n_ubatch=64)),
    ]
    for depth in (1024, 4096, 8192):
        found.append(Case(f"SmolLM2 depth {depth}", real, deep, depth))
    for kv in ("q8_0", "q4_0"):
        settings = dataclasses.replace(deep, type_k=kv, type_v=kv)
        found.append(Case(f"SmolLM2 KV {kv} depth 1024", real, settings, 1024))
    found.append(Case("MoE depth 4096", mixture, deep, 4096))
    for kind in ("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q4_0", "Q5_0", "IQ4_XS", "IQ4_NL"):
        found.append(Case(f"dense {kind}", _dense(kind), base))
        if kind in ("Q4_K", "Q4_0"):
            found.append(Case(f"dense {kind} plain", _dense(kind), dataclasses.replace(base, repack=False)))
        if kind in ("Q4_K", "Q4_0", "Q8_0"):
            found.append(Case(f"dense {kind} 1 thread", _dense(kind), one))
    found.append(Case("dense Q4_K depth 4096", _dense("Q4_K"), deep, 4096))
    for kind, experts, used in (("Q4_0", 16, 2), ("Q8_0", 32, 4), ("Q4_K", 64, 8)):
        found.append(Case(f"MoE {experts}x{used} {kind}", _mixture(kind, experts, used), base))
    return found


def remote_cases() -> list[Case]:
    """With the RPC server (one thread) as a second device, one thread on this side."""
    mixture = CACHE / f"smollm2-moe-{moe.VERSION}.gguf"
    one = Settings(n_ctx=2048, threads=1, flash_attention="on", load_mode="none")
    up = (Override(r"\.ffn_up", "CPU"),)
    ffn = (Override(r"\.ffn_(up|down|gate)", "CPU"),)
    return [
        Case("RPC: SmolLM2 all", smollm2.path(), one, n_gpu_layers=99),
        Case("RPC: SmolLM2 15 layers", smollm2.path(), one, n_gpu_layers=15),
        Case("RPC: SmolLM2 ffn_up on CPU", smollm2.path(), one, n_gpu_layers=99, overrides=up),
        Case("RPC: SmolLM2 MoE all", mixture, one, n_gpu_layers=99),
        Case("RPC: SmolLM2 MoE experts on CPU", mixture, one, n_gpu_layers=99, overrides=ffn),
        Case("RPC: dense Q8_0 all", _dense("Q8_0"), one, n_gpu_layers=99),
        Case("RPC: dense Q8_0 4 layers", _dense("Q8_0"), one, n_gpu_layers=4),
        Case("RPC: dense Q4_K ffn on CPU", _dense("Q4_K"), one, n_gpu_layers=99, overrides=ffn),
    ]


def measure(case: Case, plan: Plan) -> tuple[float, float]:
    """(prefill, decode) in tokens/s, medians of three after a warm-up: ``PROMPT`` tokens behind ``depth`` others, then
    ``OUTPUT`` single ones."""
    prefill, single = [], []
    with decode.timer(plan) as timer:
        timer.fill(case.depth)
        for i in range(4):
            timer.forget(case.depth)
            seconds = timer.compute(PROMPT)
            each = timer.single(OUTPUT)
            if i:
                prefill.append(PROMPT / seconds)
                single.append(1 / each)
    return statistics.median(prefill), statistics.median(single)


def run(chosen: list[Case], rpc: tuple[str, ...], *, keep: bool) -> list[dict[str, object]]:
    machine = hardware.probe(rpc=rpc)
    calibration = calibrate.load(machine) if keep else None
    if calibration is None:
        calibration = calibrate.calibrate(machine, rpc=rpc)
        calibrate.save(machine, calibration)
    free = {d.name: d.memory_free for d in machine.devices}
    devices = tuple(d.name for d in placement.gpus(machine)) if rpc else ()
    rows: list[dict[str, object]] = []
    for case in chosen:
        model = gguf.read(case.path)
        place = Placement(devices if case.n_gpu_layers else (), case.n_gpu_layers, overrides=case.overrides)
        plan = Plan(str(case.path), place, case.settings, rpc=rpc)
        found = rates.from_calibration(calibration, machine, case.settings)
        predicted = cost.estimate(model, plan, found, Workload("", PROMPT, OUTPUT, case.depth), free)
        prefill, single = measure(case, plan)
        row: dict[str, object] = {
            "name": case.name,
            "decode": single,
            "decode_predicted": predicted.decode_tokens_per_second,
            "prefill": prefill,
            "prefill_predicted": predicted.prefill_tokens_per_second,
            "interval": predicted.decode_interval,
        }
        rows.append(row)
        parts = " ".join(f"{k} {v * 1e3:.2f}" for k, v in predicted.decode_seconds.items())
        print(
            f"{case.name:32} decode {predicted.decode_tokens_per_second:7.1f} predicted {single:7.1f} measured "
            f"{predicted.decode_tokens_per_second / single - 1:+6.1%}   prefill "
            f"{predicted.prefill_tokens_per_second:7.0f} {prefill:7.0f} "
            f"{predicted.prefill_tokens_per_second / prefill - 1:+6.1%}   ({parts})",
            flush=True,
        )
    return rows


def summary(rows: list[dict[str, object]]) -> str:
    """Errors and order, as the figures are judged."""

    def errors(what: str) -> list[float]:
        return sorted(abs(float(r[f"{what}_predicted"]) / float(r[what]) - 1) for r in rows)  # type: ignore[arg-type]

    def at(values: list[float], q: float) -> float:
        return values[min(len(values) - 1, int(q * len(values)))]

    speeds = [(float(r["decode_predicted"]), float(r["decode"])) for r in rows]  # type: ignore[arg-type]
    pairs = [(a, b) for a, b in itertools.combinations(speeds, 2) if max(a[1], b[1]) > 1.1 * min(a[1], b[1])]
    right = sum((a[0] > b[0]) == (a[1] > b[1]) for a, b in pairs)
    inside = sum(r["interval"][0] <= r["decode"] <= r["interval"][1] for r in rows)  # type: ignore[index,operator]
    lines = [
        f"{len(rows)} configurations: decode error median {statistics.median(errors('decode')):.1%}, 90th percentile "
        f"{at(errors('decode'), 0.9):.1%} (wanted: 8 %, 20 %); {inside} inside the predicted interval",
        f"prefill error median {statistics.median(errors('prefill')):.1%}, 90th percentile "
        f"{at(errors('prefill'), 0.9):.1%}",
        f"order right in {right} of {len(pairs)} pairs, {right / max(1, len(pairs)):.1%} (wanted: 95 %)",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="configurations whose name holds this text")
    parser.add_argument("--rpc", action="store_true", help="also with the RPC server as a second device")
    parser.add_argument("--keep", action="store_true", help="use the kept calibration")
    parser.add_argument("--json", type=Path, help="write every figure there")
    args = parser.parse_args()
    rows = run([c for c in cases() if args.only in c.name], (), keep=args.keep)
    if args.rpc:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            endpoint = stack.enter_context(rpc_server(folder / "server.log"))
            rows += run([c for c in remote_cases() if args.only in c.name], (endpoint,), keep=args.keep)
    print(summary(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
