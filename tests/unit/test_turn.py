"""Processes that fill RAM load one after the other."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tensortier import paths
from tensortier.cli import turn
from tensortier.cli.common import note

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nobody waits there")

HOLDER = """
import time
from tensortier.cli.turn import loading_turn
with loading_turn():
    print("inside", flush=True)
    time.sleep(600)
"""


def test_the_second_waits_for_the_first_and_no_longer_than_it_lives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "inside\n"
        killed = threading.Event()

        def kill() -> None:
            killed.set()
            first.kill()

        def told(text: str) -> None:
            note(text)
            threading.Timer(0.3, kill).start()  # a while later, not before it waits

        monkeypatch.setattr(turn, "note", told)
        with turn.loading_turn():
            assert killed.is_set()
            assert first.wait(60) == -signal.SIGKILL
    assert capsys.readouterr().err.count("waiting for another tensortier") == 1
    with turn.loading_turn():
        pass
    assert capsys.readouterr().err == ""


def test_where_the_cache_cannot_be_written_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(paths, "cache_dir", lambda: tmp_path / "file" / "cache")
    with turn.loading_turn():
        pass
    assert capsys.readouterr().err == ""
