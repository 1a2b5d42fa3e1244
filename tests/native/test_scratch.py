"""What computing with weights from the drive takes beside their room: counted beforehand, and what it really took."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tensortier import gguf, scratch
from tensortier._llama.tierlib import tier_library
from tensortier.types import Plan
from tests import tier_runs as runs
from tests.models.synthetic import Synthetic, build

ROOT = Path(__file__).parents[2]
SHAPE = Synthetic(layers=2, n_embd=512, n_ff=3584, experts=8, used=2, vocab=256)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every token chooses the same experts: the routers are zero, and of equal scores the same ones win."""
    path = build(SHAPE, tmp_path_factory.mktemp("alike") / "model.gguf")
    with path.open("r+b") as file:
        for tensor in gguf.read(path).tensors:
            if "ffn_gate_inp" in tensor.name:
                file.seek(tensor.offset)
                file.write(bytes(tensor.nbytes))
    return path


def wide_plan(path: Path, tokens: int, expert_bytes: int) -> Plan:
    plan = runs.tier_plan(path, expert_bytes=expert_bytes)
    return replace(plan, settings=replace(plan.settings, n_ctx=1024, n_batch=tokens, n_ubatch=tokens))


def gathered(path: Path, tokens: int, expert_bytes: int) -> int:
    """Bytes of rows that were gathered, where experts arrive one by one."""
    library = tier_library()
    library.tt_tier_hold.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    library.tt_tier_hold.restype = None
    plan = wide_plan(path, tokens, expert_bytes)
    with runs.tiered(plan, n_ctx=1024, n_batch=tokens, n_ubatch=tokens) as (model, ctx, paged):
        library.tt_tier_hold(paged._open_handle(), 0)
        prompt = [i % 256 for i in range(tokens)]
        runs.logits(model, ctx, prompt)
        return paged.stats().scratch_bytes


@pytest.mark.parametrize("tokens", [1, 64, 700])
def test_gathered_rows(tokens: int, alike: Path, synthetic: Callable[..., Path]) -> None:
    """As many as were counted: all tokens at one expert are the most there can be."""
    model = gguf.read(alike)
    experts = [t for t in model.tensors if t.role.is_routed_expert]
    counted = scratch.gathered_bytes(model, experts, wide_plan(alike, tokens, 0).settings)
    for path in (alike, synthetic(**{**SHAPE.__dict__, "context": 4096})):
        found = gathered(path, tokens, runs.expert_bytes(path)[0])
        assert 0 < found <= counted, path
        if path == alike and tokens == 700:
            assert found > 0.99 * counted


# A process of its own: what it holds before it computes, at most while it does, and what llama.cpp tells of that.
PROGRAM = """
import json, sys
from pathlib import Path
import llama_cpp
from tensortier._llama.memory import allocated
from tests import tier_runs as runs
from tests.native.test_scratch import wide_plan

def field(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0]) * 1024

path, tokens = Path(sys.argv[1]), int(sys.argv[2])
plan = wide_plan(path, tokens, runs.expert_bytes(path)[0])
with runs.tiered(plan, n_ctx=1024, n_batch=tokens, n_ubatch=tokens) as (model, ctx, paged):
    told = sum(row.kv_bytes + row.compute_bytes for row in allocated(ctx))
    Path("/proc/self/clear_refs").write_text("5")
    before = field("VmRSS")
    for width in (tokens, tokens // 2, 1, tokens, 64, tokens * 2 // 3, 2, tokens):  # holes are not used again
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
        assert runs.decode(ctx, [i % 256 for i in range(width)]) == 0
    print(json.dumps({"took": field("VmHWM") - before, "told": told}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_process_takes(alike: Path) -> None:
    """At most llama.cpp's own buffers, and what was counted; however wide the batches were before."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(alike), "700"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    model = gguf.read(alike)
    experts = [t for t in model.tensors if t.role.is_routed_expert]
    counted = scratch.scratch_bytes(model, experts, wide_plan(alike, 700, 0).settings)
    assert found["took"] <= found["told"] + counted
