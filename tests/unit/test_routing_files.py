"""A trace takes its place whole or not at all, and leaves nothing beside it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tensortier import gguf, routing
from tensortier.cli.trace import _records_beside
from tensortier.errors import UsageError
from tensortier.types import ModelInfo

KILLED = """
import os, signal, sys
from pathlib import Path
from tensortier import routing
with routing._becoming(Path(sys.argv[1])) as file:
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def model(synthetic: Callable[..., Path]) -> ModelInfo:
    return gguf.read(synthetic(layers=3, experts=8, used=2, qtype="Q4_0"))


@pytest.fixture(params=["unnamed", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With files that have no name yet, and on a drive that has none."""
    if request.param == "named":
        monkeypatch.setattr(routing, "_unnamed", lambda folder: None)
    return str(request.param)


def records(folder: Path) -> Path:
    """Two tokens in three layers."""
    path = folder / "records"
    np.array([[layer, 1, 2, 0, 5] for _ in range(2) for layer in range(3)], "<i4").tofile(path)
    return path


def publish(source: Path, target: Path, model: ModelInfo) -> routing.Trace:
    return routing.publish(source, target, model, (0, 1, 2), 8, 2)


def test_it_takes_its_place(way: str, tmp_path: Path, model: ModelInfo) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    source, target = records(tmp_path), folder / ("x" * 255)  # as long as a name may be
    for old in (None, "old"):
        if old is not None:
            target.write_text(old)
        publish(source, target, model)
        assert routing.read(target).tokens == 2
        assert list(folder.iterdir()) == [target]
    mask = os.umask(0)
    os.umask(mask)
    if sys.platform != "win32":
        assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask, "as any file that a program writes"


def test_what_fails_leaves_what_was_there(
    way: str, tmp_path: Path, model: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    target = folder / "x.trace"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(routing.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        publish(records(tmp_path), target, model)
    assert target.read_text() == "old" and list(folder.iterdir()) == [target]
    with pytest.raises(OSError):
        publish(records(tmp_path), tmp_path / "none" / "x.trace", model)


@pytest.mark.skipif(sys.platform == "win32", reason="files have names there")
def test_a_drive_that_is_full_is_named(tmp_path: Path) -> None:
    target = tmp_path / "x.trace"
    told = f"cannot write what is recorded beside {target}: full"
    with pytest.raises(UsageError, match=f"^{re.escape(told)}$"), _records_beside(target) as path:
        path.write_bytes(b"record")
        assert path.read_bytes() == b"record" and list(tmp_path.iterdir()) == []
        raise UsageError(f"cannot write {path}: full")


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="this system has no files without a name")
def test_a_process_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    if (probe := routing._unnamed(tmp_path)) is None:
        pytest.skip("this file system has no files without a name")
    probe.close()
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "x.trace")], check=False)
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []
