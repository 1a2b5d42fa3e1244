"""One server for all tests that do not end it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.process import PATIENCE, ServerProcess

PARALLEL, QUEUE = 8, 64
REQUEST_SECONDS = 5.0  # much longer than a client of a test may be held up between two steps


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    """A folder with the model "tiny", and one with "broken" beside it."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny.gguf").symlink_to(tiny_path)
    (folder / "broken.gguf").write_bytes(b"GGUF no more")
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, models_folder: Path) -> Iterator[ServerProcess]:
    """Serves smollm2; "tiny" and "broken" are there too."""
    arguments = ["smollm2", "--no-calibrate", "--threads", "1", "--context", "8192"]
    arguments += [
        "-fa",
        "off",
        "-ctk",
        "f16",
        "-ctv",
        "f16",
        "--ubatch",
        "512",
    ]  # as llama-cpp-python has them
    arguments += f"--parallel {PARALLEL} --queue {QUEUE} --request-timeout {REQUEST_SECONDS}".split()
    with ServerProcess(*arguments, home=tmp_path_factory.mktemp("home"), models=models_folder) as running:
        running.ready()
        for model in ("smollm2", "tiny"):  # what is made once is there when leaks are looked for
            body = json.dumps({"model": model, "prompt": "x", "max_tokens": 1}).encode()
            urllib.request.urlopen(running.url + "/v1/completions", body, timeout=PATIENCE).close()
        yield running
        assert running.stop() == 0, "".join(running.log)
        assert "Traceback" not in "".join(running.log)
