"""Tensor-level placement on a second device: the RPC server stands for a GPU, with memory of its own.

Everything through the command line, in processes of its own: a registered server stays with a process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tensortier import gguf

PROMPT = "The three laws of thermodynamics say that"


def run(model: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tensortier", "run", str(model), "-p", PROMPT, "--raw", "--json"]
    command += ["--temperature", "0", "-n", "16", "-c", "512", "-t", "1", "-fa", "on", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def weights(answer: dict[str, Any], kind: str = "allocated") -> dict[str, int]:
    return {row["device"]: row[kind]["weights_bytes"] for row in answer["devices"]}


@pytest.mark.parametrize("fixture", ["smollm2_path", "moe_path"])
def test_override_moves_exactly_what_it_matches(
    fixture: str, rpc_device: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(fixture)
    base = run(path, "--device", "none", "--load-mode", "none")
    full = run(path, "--rpc", rpc_device, "-ngl", "99")
    split = run(path, "--rpc", rpc_device, "-ngl", "99", "-ot", "ffn_up=CPU")
    matched = sum(t.nbytes for t in gguf.read(path).tensors if "ffn_up" in t.name)
    assert matched > 10_000_000
    assert weights(split)["CPU"] - weights(full)["CPU"] == matched
    assert weights(full)["RPC0"] - weights(split)["RPC0"] == matched
    for answer in (base, full, split):
        assert weights(answer) == weights(answer, "planned")
        assert [r["allocated"] for r in answer["devices"]] == [r["planned"] for r in answer["devices"]]
        assert answer["text"] == base["text"]
    # the KV cache goes with the layers, not with their weights
    kv = {row["device"]: row["allocated"]["kv_bytes"] for row in split["devices"]}
    assert kv.get("CPU", 0) == 0
    assert kv["RPC0"] > 0


def test_layers_and_kv(smollm2_path: Path, rpc_device: str) -> None:
    """10 of 31 layers: 9 blocks and the output, which brings a second copy of the tied embedding."""
    answer = run(smollm2_path, "--rpc", rpc_device, "-ngl", "10")
    rows = {row["device"]: row["allocated"] for row in answer["devices"]}
    assert rows["RPC0"]["kv_bytes"] * 21 == rows["CPU"]["kv_bytes"] * 9
    by_layer = [t for t in gguf.read(smollm2_path).tensors if t.layer is not None and t.layer >= 21]
    outside = [
        t for t in gguf.read(smollm2_path).tensors if t.name in ("token_embd.weight", "output_norm.weight")
    ]
    assert rows["RPC0"]["weights_bytes"] == sum(t.nbytes for t in (*by_layer, *outside))
    kept = run(smollm2_path, "--rpc", rpc_device, "-ngl", "10", "--no-kv-offload")
    assert {row["device"]: row["allocated"]["kv_bytes"] for row in kept["devices"]}.get("RPC0", 0) == 0
    assert kept["text"] == answer["text"]


def test_by_itself_it_uses_the_device(smollm2_path: Path, rpc_device: str) -> None:
    answer = run(smollm2_path, "--rpc", rpc_device)
    rows = {row["device"]: row["allocated"] for row in answer["devices"]}
    assert rows["RPC0"]["weights_bytes"] > 60_000_000
    assert rows["CPU"]["kv_bytes"] == 0


def test_a_pattern_that_matches_nothing_is_said(smollm2_path: Path, rpc_device: str) -> None:
    answer = run(smollm2_path, "--rpc", rpc_device, "-ot", "no_such_tensor=CPU")
    assert answer["warnings"] == ["the pattern 'no_such_tensor' matches no tensor of this model"]
