"""Memory questions about models that are not here: llama.cpp's answers against formulas worked out by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tensortier import gguf, memory
from tensortier.errors import LoadError, ModelFileError, PlanError, TensortierError
from tensortier.types import Plan, Settings
from tests.models import skeletons

GIB = 1 << 30


def pad(n: int, to: int = 256) -> int:
    return -(-n // to) * to


# KV bytes for 32768 cells of f16, from each model's published dimensions.
KV_32K = {
    # layers x cells x KV heads x (key + value) x bytes
    "qwq-32b-q3_k_m": 64 * 32768 * 8 * 256 * 2,
    "qwq-32b-iq4_xs": 64 * 32768 * 8 * 256 * 2,
    "llama-3.3-70b-q4_k_m": 80 * 32768 * 8 * 256 * 2,
    "mixtral-8x7b-q4_k_m": 32 * 32768 * 8 * 256 * 2,
    "qwen3-30b-a3b-q4_k_m": 48 * 32768 * 4 * 256 * 2,
    # every second layer keeps a window of 4096 and one micro-batch
    "gemma-2-27b-q4_k_m": 23 * 16 * 256 * 2 * (32768 + pad(4096 + 512)),
    # 18 full layers; 18 with a window of 128
    "gpt-oss-120b-mxfp4": 18 * 8 * 128 * 2 * (32768 + pad(128 + 512)),
    # five layers with a window of 1024, then a full one
    "gemma-3-12b-q4_k_m": 8 * 512 * 2 * (8 * 32768 + 40 * pad(1024 + 512)),
    # MLA keeps one latent vector of 512 and 64 rotary values per cell
    "deepseek-v3-q4_k_m": 61 * 32768 * (512 + 64) * 2,
}


@pytest.mark.parametrize("name", sorted(KV_32K))
def test_kv_cache_of_skeletons(name: str, skeleton: Callable[[str], Path]) -> None:
    path = skeleton(name)
    settings = Settings(n_ctx=32768, n_ubatch=512, flash_attention="on", repack=False)
    rows = memory.predict(Plan(model=str(path), settings=settings))
    assert [row.device for row in rows] == ["CPU"]
    assert rows[0].kv_bytes == KV_32K[name]
    weights = gguf.read(path).nbytes
    assert 0 <= rows[0].weights_bytes - weights <= 128 * len(gguf.read(path).tensors)


def test_a_hybrid_keeps_a_state_and_little_kv(skeleton: Callable[[str], Path]) -> None:
    """Qwen3-Next-80B-A3B: 12 of 48 layers have a KV cache (2 heads of 256); the others a state that does not
    grow with the context: 32 heads x 128 x 128 values and 3 columns of convolution, in f32."""
    (name,) = set(skeletons.NAMES) - set(KV_32K)
    path = skeleton(name)
    sizes = {
        n_ctx: memory.predict(Plan(model=str(path), settings=Settings(n_ctx=n_ctx)))[0].kv_bytes
        for n_ctx in (4096, 8192)
    }
    kv = 12 * 4096 * 2 * (256 + 256) * 2
    assert sizes[8192] - sizes[4096] == kv
    state = 36 * 4 * (32 * 128 * 128 + 3 * (2 * 16 * 128 + 32 * 128))
    assert sizes[4096] - kv == state


@pytest.mark.parametrize(
    ("cache_type", "per_32"),
    [("f16", 64), ("q8_0", 34), ("q5_1", 24), ("q5_0", 22), ("q4_1", 20), ("q4_0", 18)],
)
def test_kv_types(cache_type: str, per_32: int, skeleton: Callable[[str], Path]) -> None:
    settings = Settings(n_ctx=40960, type_k=cache_type, type_v=cache_type, flash_attention="on")
    (row,) = memory.predict(Plan(model=str(skeleton("qwq-32b-q3_k_m")), settings=settings))
    assert row.kv_bytes == 64 * 40960 * 8 * 256 * per_32 // 32


def test_one_process_answers_many_questions_quickly(skeleton: Callable[[str], Path]) -> None:
    plan = Plan(model=str(skeleton("llama-3.3-70b-q4_k_m")), settings=Settings(n_ctx=1024))
    with memory.Probe() as probe:
        first = probe.ask(plan)
        process = psutil.Process(probe._process.pid)
        before = process.cpu_times()
        assert all(probe.ask(plan) == first for _ in range(5))
        after = process.cpu_times()
        # of a processor: tens of milliseconds are usual, and other work on the machine does not count
        assert (after.user + after.system - before.user - before.system) / 5 < 0.5


def test_errors_come_back_as_ours_and_the_process_goes_on(tiny_path: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(60))
    with memory.Probe() as probe:
        with pytest.raises(ModelFileError, match=r"bad\.gguf"):
            probe.ask(Plan(model=str(bad)))
        with pytest.raises(PlanError, match="q7"):
            probe.ask(Plan(model=str(tiny_path), settings=Settings(type_k="q7")))
        with pytest.raises(LoadError, match="flash"):
            probe.ask(Plan(model=str(tiny_path), settings=Settings(type_v="q4_0", flash_attention="off")))
        assert probe.ask(Plan(model=str(tiny_path), settings=Settings(n_ctx=256)))


def test_a_header_that_ends_llama_cpp_does_not_end_us(tiny_path: Path, tmp_path: Path) -> None:
    """block_count 0 fails an assertion in llama.cpp, which aborts its process."""
    data = bytearray(tiny_path.read_bytes())
    key = data.index(b"llama.block_count") + len(b"llama.block_count") + 4
    data[key : key + 4] = bytes(4)
    bad = tmp_path / "no_layers.gguf"
    bad.write_bytes(data)
    with memory.Probe() as probe:
        with pytest.raises(TensortierError, match="n_layer_all > 0") as caught:
            probe.ask(Plan(model=str(bad)))
        assert "\n" not in str(caught.value)
        process = probe._process
    assert process.returncode is not None


def test_closing_ends_the_process(tiny_path: Path) -> None:
    with memory.Probe() as probe:
        probe.ask(Plan(model=str(tiny_path), settings=Settings(n_ctx=256)))
        pid = probe._process.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_dead_process_is_said_and_closes_cleanly(tiny_path: Path) -> None:
    """What it did not read is still in the pipe's buffer, which must not fail the second time, at closing."""
    with memory.Probe() as probe:
        probe._process.kill()
        probe._process.wait()
        with pytest.raises(LoadError, match="gives up"):
            probe.ask(Plan(model=str(tiny_path)))
