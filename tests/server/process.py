"""A real server in a process of its own, and what the system knows of that process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

PATIENCE = 120.0  # seconds, where a test only waits for something: against hanging, no claim about speed
_LOAD_IS_HELD = """
import os, sys, time
from pathlib import Path


class Gate:
    def find_spec(self, name, path=None, target=None):
        while name == "tensortier.engine" and not Path(os.environ["RELEASE"]).exists():
            time.sleep(0.01)


sys.meta_path.insert(0, Gate())
"""


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "what the test waits for does not happen"
        time.sleep(0.01)


class HeldLoading:
    """A server with ``more=environment`` does not get past the beginning of its first loading before ``release``.

    Loading imports the engine in its thread; Python runs a ``sitecustomize`` at its start, which has that wait.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(_LOAD_IS_HELD)
        self._release = folder / "release"
        self.environment = {"PYTHONPATH": str(folder), "RELEASE": str(self._release)}

    def release(self) -> None:
        self._release.touch()


class ServerProcess:
    """``tensortier serve`` with these arguments on a free port of 127.0.0.1.

    ``home``: an empty folder; nothing is read from or written to the user's own one. ``more``: for the environment.
    """

    def __init__(
        self, *arguments: str, home: Path, models: Path | None = None, more: dict[str, str] | None = None
    ) -> None:
        env = {
            k: v for k, v in os.environ.items() if not k.startswith(("TENSORTIER_", "HF_", "XDG_", "LLAMA_"))
        }
        env |= {"HOME": str(home), "PYTHONUNBUFFERED": "1"}
        if models is not None:
            env["TENSORTIER_MODELS"] = str(models)
        env |= more or {}
        command = [sys.executable, "-m", "tensortier", "serve", *arguments]
        if "--port" not in arguments:
            command += ["--port", "0"]
        self.process = subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        self.log: list[str] = []
        self.url = ""
        self._told = threading.Event()
        self._readers = [
            threading.Thread(target=self._read, args=(stream,), daemon=True)
            for stream in (self.process.stdout, self.process.stderr)
        ]
        for reader in self._readers:
            reader.start()
        if not self._told.wait(PATIENCE) or not self.url:
            self.process.kill()
            raise AssertionError("the server did not start:\n" + "".join(self.log))

    def _read(self, stream: Any) -> None:
        for line in stream:
            self.log.append(line)
            if found := re.search(r"serving .* at (http://\S+)", line):
                self.url = found[1]
                self._told.set()
        stream.close()
        self._told.set()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        """Status and JSON, or text where it is none."""
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                status, body = answer.status, answer.read()
        except urllib.error.HTTPError as exc:
            status, body = exc.code, exc.read()
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body.decode()

    def stats(self, **headers: str) -> dict[str, Any]:
        status, found = self.get("/stats", **headers)
        assert status == 200
        return found

    def ready(self, seconds: float = PATIENCE) -> ServerProcess:
        """Wait until the model is loaded."""
        end = time.monotonic() + seconds
        while (found := self.get("/health"))[0] != 200:
            assert time.monotonic() < end and found[1]["status"] == "loading", found
            time.sleep(0.05)
        return self

    def quiet(self, seconds: float = PATIENCE, **headers: str) -> dict[str, Any]:
        """Wait until nothing goes on, neither in the server nor in the engines; fails where something stays."""
        end = time.monotonic() + seconds
        while True:
            found = self.stats(**headers)
            busy = [found["answers"], *(m["users"] for m in found["models"])]
            for model in found["models"]:
                if "activity" in model:
                    busy += [model["activity"]["active"], model["activity"]["waiting"]]
            if not any(busy):
                return found
            assert time.monotonic() < end, found
            time.sleep(0.02)

    def files(self) -> int:
        """Open file descriptors of the process."""
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def threads(self) -> int:
        """Of the process, those of libraries included; but not those of pools, which stay for a while."""
        while True:
            pooled = self._pooled()
            found = sum(1 for _ in Path(f"/proc/{self.process.pid}/task").iterdir())
            if pooled == self._pooled():  # none began or ended between the two looks
                return found - pooled

    def _pooled(self) -> int:
        return sum(name.startswith(("AnyIO", "asyncio_")) for name in self.stats()["threads"])

    def cpu_seconds(self) -> float:
        """What the process has computed so far. Unlike a clock's, its differences do not grow with what else goes on
        on the machine."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code."""
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(PATIENCE)
        return code

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.wait()
