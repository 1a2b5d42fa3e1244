"""The formulas against llama.cpp's own answers: every skeleton, contexts, KV types and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

from tensortier import formulas, gguf, memory, planner
from tensortier.types import Placement, Plan, Settings
from tests.models import skeletons


@pytest.fixture(scope="module")
def probe() -> Iterator[memory.Probe]:
    with memory.Probe() as probe:
        yield probe


@pytest.mark.parametrize("name", skeletons.NAMES)
def test_skeletons(name: str, skeleton: Callable[[str], Path], probe: memory.Probe) -> None:
    """KV to the byte; the total within 1 %."""
    path = skeleton(name)
    model = gguf.read(path)
    for n_ctx, kv, n_ubatch in product((4096, 33000), ("f16", "q8_0"), (512, 2048)):
        settings = Settings(
            n_ctx=n_ctx, type_k=kv, type_v=kv, n_ubatch=n_ubatch, flash_attention="on", repack=False
        )
        (told,) = probe.ask(Plan(model=str(path), settings=settings))
        assert sum(formulas.kv_bytes(model, settings)) == told.kv_bytes, settings
        total = model.nbytes + told.kv_bytes + formulas.compute_bytes(model, settings)
        assert total == pytest.approx(told.total_bytes, rel=0.01), settings


def test_without_flash_attention(skeleton: Callable[[str], Path], probe: memory.Probe) -> None:
    path = skeleton("llama-3.3-70b-q4_k_m")
    settings = Settings(n_ctx=32768, flash_attention="off", repack=False)
    (told,) = probe.ask(Plan(model=str(path), settings=settings))
    assert formulas.compute_bytes(gguf.read(path), settings) == pytest.approx(told.compute_bytes, rel=0.05)


@pytest.mark.parametrize(
    "name",
    ["gemma-3-12b-q4_k_m", "qwen3-next-80b-a3b-q4_k_m", "deepseek-v3-q4_k_m", "gpt-oss-120b-mxfp4"],
)
def test_several_sequences(name: str, skeleton: Callable[[str], Path], probe: memory.Probe) -> None:
    path = skeleton(name)
    model = gguf.read(path)
    for n_ctx, n_seq in product((3000, 16384), (2, 5)):
        settings = Settings(n_ctx=n_ctx, n_seq_max=n_seq, flash_attention="on")
        (told,) = probe.ask(Plan(model=str(path), settings=settings))
        assert sum(formulas.kv_bytes(model, settings)) == told.kv_bytes, settings
        total = model.nbytes + told.kv_bytes + formulas.compute_bytes(model, settings)
        assert total == pytest.approx(told.total_bytes, rel=0.01), settings


@pytest.mark.parametrize("fixture", ["smollm2_path", "moe_path"])
def test_small_models(fixture: str, probe: memory.Probe, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(fixture)
    model = gguf.read(path)
    for n_ctx, types in product((0, 100, 1024), (("q4_0", "q5_1"), ("bf16", "f32"))):
        settings = Settings(n_ctx=n_ctx, type_k=types[0], type_v=types[1], flash_attention="on")
        (told,) = probe.ask(Plan(model=str(path), settings=settings))
        assert sum(formulas.kv_bytes(model, settings)) == told.kv_bytes, settings


@pytest.mark.parametrize("name", skeletons.NAMES)
def test_placements(name: str, skeleton: Callable[[str], Path], probe: memory.Probe, rpc_device: str) -> None:
    """Split between the CPU and a device: weights but for alignment, KV to the byte, the total within 1 % or
    100 MiB, against llama.cpp's layout on the RPC device."""
    path = skeleton(name)
    model = gguf.read(path)
    odd = [
        t for t in model.tensors if (t.role.is_routed_expert or t.role.is_dense_ffn) and (t.layer or 0) % 2
    ]
    settings = Settings(n_ctx=16384, flash_attention="on", repack=False)
    for place in (
        Placement(("RPC0",), -1),
        Placement(("RPC0",), -1, overrides=planner.to_cpu(odd)),
        Placement(("RPC0",), 20),
        Placement(("RPC0",), 20, kv_on_device=False),
    ):
        plan = Plan(str(path), place, settings, rpc=(rpc_device,))
        told = {row.device: row for row in probe.ask(plan)}
        ours = {row.device: row for row in memory.Formulas(model, {}).ask(plan)}
        assert told.keys() == ours.keys()
        for device, row in told.items():
            assert abs(row.weights_bytes - ours[device].weights_bytes) <= 256 * len(model.tensors)
            assert ours[device].kv_bytes == row.kv_bytes
            assert ours[device].total_bytes == pytest.approx(row.total_bytes, rel=0.01, abs=100 << 20)
