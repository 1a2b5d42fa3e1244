"""``run --ram``: a mixture that the budget does not hold answers from the drive, as it does from memory, and the
process stays within the budget."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensortier import gguf, hardware
from tensortier.budget import process_bytes
from tensortier.types import Settings
from tests import calibrations
from tests import tier_runs as runs

MIB = 1 << 20
# 700 MB, nearly all of it experts
MIXTURE = {"layers": 12, "n_embd": 512, "n_ff": 1024, "experts": 64, "used": 4, "heads": 8, "kv_heads": 2}
OPTIONS = (
    *("--raw", "--json", "--temp", "0", "-n", "12", "-c", "512", "-b", "64", "-ub", "64", "-t", "1"),
    *("--no-repack", "--no-calibrate"),
)


# The most that a process had resident counts from before it became this program, when it was a copy of its parent;
# so the parent is a small one.
PARENT = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(done.returncode)
"""


def run(model: Path, *options: str) -> tuple[dict[str, Any], int]:
    """(the answer, the most bytes that were resident)"""
    command = [sys.executable, "-m", "tensortier", "run", str(model), "-p", "The sun is", *OPTIONS, *options]
    done = subprocess.run([sys.executable, "-c", PARENT, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer, int(done.stderr.splitlines()[-1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_a_model_larger_than_the_budget(synthetic: Callable[..., Path]) -> None:
    path = synthetic(**MIXTURE)
    assert path.stat().st_size > 650e6
    budget = 560 * MIB
    expected, _ = run(path)
    answer, peak = run(path, "--ram", "560MiB")
    assert answer["text"] == expected["text"]
    assert "on the drive" in answer["reasons"][0]
    rows = {row["device"]: row for row in answer["devices"]}
    assert 0 < rows["TIER"]["allocated"]["weights_bytes"] <= rows["TIER"]["planned"]["weights_bytes"]
    assert rows["CPU"]["allocated"] == rows["CPU"]["planned"]
    assert peak <= 1.05 * budget, f"{peak / MIB:.0f} MiB"
    # what the plan leaves is for the process itself, and what it fills is resident
    model = gguf.read(path)
    one = runs.expert_bytes(path)[0] // MIXTURE["used"]
    told = {what: sum(sum(row[what].values()) for row in rows.values()) for what in ("planned", "allocated")}
    assert 0 <= budget - process_bytes(model, Settings()) - told["planned"] < one
    assert rows["TIER"]["planned"]["weights_bytes"] - rows["TIER"]["allocated"]["weights_bytes"] < one
    assert peak >= told["allocated"], f"{peak / MIB:.0f} MiB"
    tier = answer["tier"]
    assert 0 < tier["hit_rate"] < 1 and tier["drive_bytes"] > 10 * MIB and "layers" not in tier


def test_a_plan_file_with_weights_on_the_drive(synthetic: Callable[..., Path], tmp_path: Path) -> None:
    path = synthetic(**MIXTURE)
    command = [sys.executable, "-m", "tensortier", "plan", str(path), "--ram", "560MiB", "-c", "512"]
    command += ["--no-calibrate", "--json"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    plan = json.loads(made)
    assert {o["device"] for o in plan["placement"]["overrides"]} == {"TIER"}
    (tmp_path / "plan.json").write_text(made)
    command = [sys.executable, "-m", "tensortier", "run", "--plan", str(tmp_path / "plan.json")]
    done = subprocess.run([*command, "-p", "hi", "--raw", "-n", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_beside_another_device(moe_path: Path, rpc_device: str) -> None:
    """Layers on a device, and of the experts that find no room there what RAM does not hold on the drive."""
    options = ("--rpc", rpc_device, "--vram", "1300MiB", "--ram", "320MiB")
    expected, _ = run(moe_path)
    answer, _ = run(moe_path, *options)
    assert answer["text"] == expected["text"]
    rows = {row["device"]: row for row in answer["devices"]}
    assert rows["RPC0"]["allocated"] == rows["RPC0"]["planned"]
    assert rows["RPC0"]["allocated"]["weights_bytes"] > 100 * MIB
    assert 0 < answer["tier"]["hit_rate"] < 1
    assert sum(row["allocated"]["weights_bytes"] for row in rows.values()) < 0.9 * moe_path.stat().st_size


def tensortier(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tensortier", *arguments], capture_output=True, text=True)


def test_a_trace_tells_the_planner_how_often_experts_are_found(
    moe_path: Path, synthetic: Callable[..., Path], tmp_path: Path
) -> None:
    """Of the policy that it chooses, in service on the text that was recorded: what was promised for its second half,
    give or take what a text's halves differ."""
    trace, text = (
        str(tmp_path / "t"),
        "The history of bread begins with grass seeds that were ground and baked.",
    )
    common = ("-p", text, "--raw", "-n", "60", "-c", "512", "-t", "1", "-ub", "1", "-q")
    made = tensortier("trace", str(moe_path), "-o", trace, *common, "--ram", "500MiB")
    assert made.returncode == 0, made.stderr
    environment = calibrations.environment(tmp_path / "cache", hardware.probe())
    command = [sys.executable, "-m", "tensortier", "run", str(moe_path), *common, "-b", "64", "--json"]
    command += ["--temp", "0", "--ram", "460MiB", "--trace", trace]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["estimate"]["provenance"]["hit rate"] == "trace"
    (note,) = [n for n in answer["estimate"]["notes"] if trace in n]
    promised = int(note.split("%")[0]) / 100
    assert promised > 0.3 and abs(answer["tier"]["hit_rate"] - promised) < 0.12, (answer["tier"], note)
    other = synthetic(**MIXTURE)
    refused = tensortier("plan", str(other), "--ram", "560MiB", "--no-calibrate", "--trace", trace)
    assert refused.returncode == 2 and "another model" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
