"""The peak of a process with weights on the drive: at most its budget and a twentieth more, at every size."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import tier_runs as runs

GROUPS = Path("/sys/fs/cgroup/memory")

# A process of its own: loads, computes a prompt and some tokens, and says what it took.
PROGRAM = """
import json, sys
from pathlib import Path
from tests import tier_runs as runs

def field(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0]) * 1024

path, experts, dense, pattern, group = sys.argv[1:]
if group:
    (Path(group) / "cgroup.procs").write_text(str(__import__("os").getpid()))
plan = runs.tier_plan(Path(path), pattern, expert_bytes=int(experts), dense_bytes=int(dense), guesses=2)
with runs.tiered(plan) as (model, ctx, paged):
    runs.generate(model, ctx)
    stats = paged.stats()
print(json.dumps({"peak": field("VmHWM"), "memory": stats.memory_bytes, "scratch": stats.scratch_bytes}))
"""


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Path | None]:
    """A memory control group of that size (version 1), or none where this user may make none."""
    group = GROUPS / f"tensortier-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        remove(group)


def remove(group: Path, seconds: float = 60.0) -> None:
    """The kernel may be busy with a process that has just ended in it."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            group.rmdir()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        else:
            return


def peak(path: Path, experts: int, dense: int, pattern: str, group: Path | None) -> int:
    """Bytes resident at most, files that are mapped included."""
    arguments = [str(path), str(experts), str(dense), pattern, str(group or "")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["memory"] <= experts + dense
    return int(found["peak"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_of_experts(synthetic: Callable[..., Path]) -> None:
    """What the process takes beside the slots is the same at every size, and the whole is at most a twentieth more than
    the slots and that."""
    path = synthetic(arch="qwen3moe", layers=6, n_embd=512, n_ff=512, experts=32, used=4, qtype="Q8_0")
    least, everything = runs.expert_bytes(path)
    outside = peak(path, least, 0, r"_exps\.weight", None) - least
    for budget in (everything // 8, everything // 2, everything):
        allowed = budget + outside
        with control_group(int(allowed * 1.05)) as group:  # it ends the process when it takes more
            assert peak(path, budget, 0, r"_exps\.weight", group) <= allowed * 1.05, budget


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_of_dense_weights(smollm2_path: Path) -> None:
    outside = peak(smollm2_path, 0, 3 << 20, runs.DENSE, None) - (3 << 20)
    for budget in (10 << 20, 60 << 20, 100 << 20):
        allowed = budget + outside
        with control_group(int(allowed * 1.05)) as group:
            assert peak(smollm2_path, 0, budget, runs.DENSE, group) <= allowed * 1.05, budget
