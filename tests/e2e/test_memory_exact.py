"""What a plan is predicted to take is what llama.cpp allocates: models x context x KV type x micro-batch x placement.

The prediction comes from the probe, which allocates nothing; the allocation from loading the plan for real in another
process, whose own account is compared. On the CPU, and with the RPC device as a card.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tensortier import memory, planfile
from tensortier.types import DeviceMemory, Override, Placement, Plan, Settings

SETTINGS = [
    Settings(n_ctx=ctx, n_ubatch=ubatch, type_k=kv, type_v=kv, flash_attention="on", threads=1, load_mode="none")
    for (ctx, kv), ubatch in zip(
        itertools.product((512, 2048, 6144), ("f16", "q8_0", "q4_0")), itertools.cycle((64, 512, 1024))
    )
]  # fmt: skip
PLACEMENTS = [
    Placement(("RPC0",), -1),
    Placement(("RPC0",), 2),
    Placement(("RPC0",), -1, overrides=(Override(r"\.ffn_(up|down)", "CPU"),)),
    Placement(("RPC0",), -1, kv_on_device=False),
]


@pytest.fixture(scope="module")
def models(smollm2_path: Path, moe_path: Path, synthetic: Callable[..., Path]) -> list[Path]:
    """Dense, mixtures, shared experts, merged gate and up with linear attention."""
    small = {"layers": 4, "n_embd": 256, "n_ff": 256, "heads": 4, "kv_heads": 2, "experts": 4, "used": 2}
    return [
        smollm2_path,
        moe_path,
        synthetic(**small, arch="qwen3moe"),
        synthetic(**small, arch="qwen2moe", shared=256),
        synthetic(**small, arch="qwen3next", shared=256, merged=True, qtype="Q8_0"),
    ]


def allocated(plans: list[Plan]) -> list[tuple[DeviceMemory, ...]]:
    lines = "".join(json.dumps(planfile.to_dict(plan)) + "\n" for plan in plans)
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.allocations"],
        input=lines,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(DeviceMemory(**row) for row in json.loads(line)) for line in done.stdout.splitlines()]


def compare(plans: list[Plan]) -> None:
    with memory.Probe() as probe:
        predicted = [probe.ask(plan) for plan in plans]
    found = allocated(plans)
    assert len(found) == len(plans)
    for plan, said, real in zip(plans, predicted, found, strict=True):
        assert said == real, f"{Path(plan.model).name} {plan.placement} {plan.settings}"


def test_on_the_cpu(models: list[Path]) -> None:
    """45 configurations."""
    compare([Plan(str(path), settings=settings) for path in models for settings in SETTINGS])


def test_several_sequences(models: list[Path], synthetic: Callable[..., Path]) -> None:
    """24 configurations: 4 and 16 sequences that share the cells, a sliding window and recurrent states among them."""
    small = {"layers": 4, "n_embd": 256, "n_ff": 256, "heads": 4, "kv_heads": 2, "experts": 4, "used": 2}
    window = synthetic(**small, arch="gpt-oss", qtype="Q8_0")
    compare(
        [
            Plan(str(path), settings=dataclasses.replace(settings, n_seq_max=n_seq))
            for path in (*models, window)
            for n_seq in (4, 16)
            for settings in SETTINGS[n_seq % 3 :: 5]
        ]
    )


def test_with_a_second_device(models: list[Path], rpc_device: str) -> None:
    """40 configurations: everything there, some layers, feed-forward tensors in RAM, KV cache in RAM."""
    plans = []
    for (path, place), settings in zip(
        itertools.product(models, PLACEMENTS), itertools.cycle(SETTINGS), strict=False
    ):
        plans.append(Plan(str(path), place, settings, rpc=(rpc_device,)))
        plans.append(Plan(str(path), place, dataclasses.replace(settings, n_ubatch=256), rpc=(rpc_device,)))
    assert len(plans) == 40
    compare(plans)
