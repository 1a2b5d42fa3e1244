"""``tensortier serve`` from its start to its end: addresses, keys, models that take turns, signals."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tensortier.server.limits import Settings
from tests.server.process import PATIENCE, HeldLoading, ServerProcess, until

OPTIONS = ("--no-calibrate", "--threads", "1", "--context", "2048")
KEY = "a secret"
NEVER_ENDS = {"0": -100, "2": -100}  # the tokens that end a text
STOP_SECONDS = Settings.stop_seconds


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as made:
            made.bind(("::", 0))
    except OSError:
        return False
    return True


NEEDS_IPV6 = pytest.mark.skipif(not _has_ipv6(), reason="there is no IPv6 here")


def refused(*arguments: str, home: Path) -> tuple[int, str]:
    """Exit code and standard error of a server that does not start."""
    done = subprocess.run(
        [sys.executable, "-m", "tensortier", "serve", *arguments],
        env={
            **os.environ,
            **{"HOME": str(home), "TENSORTIER_API_KEY": ""},
            "RES_OPTIONS": "timeout:1 attempts:1",  # where nobody answers questions for names
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert not done.stdout and done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


def test_a_port_in_use_is_one_clear_line(server: ServerProcess, tmp_path: Path) -> None:
    code, text = refused("--port", str(server.port), home=tmp_path)
    assert code == 1 and f"port {server.port} of 127.0.0.1 is in use" in text and "--port" in text


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--host", "0.0.0.0", "--port", "0"], 2, "--api-key"),
        pytest.param(["--host", "::", "--port", "0"], 2, "--api-key", marks=NEEDS_IPV6),
        (["--host", "no.such.host.invalid"], 2, "--host"),
        (["--host", "192.0.2.1", "--port", "0"], 2, "--host"),
        (["--api-key", "", "--port", "0"], 2, "API key"),
        (["--allow-origin", "example.org", "--port", "0"], 2, "--allow-origin"),
        (["--port", "70000"], 2, "--port"),
        (["--parallel", "0"], 2, "--parallel"),
        (["no-such-model", "--port", "0"], 2, "no-such-model"),
        ([__file__, "--port", "0"], 1, "GGUF"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], code: int, word: str, tmp_path: Path) -> None:
    found, text = refused(*arguments, home=tmp_path)
    assert found == code and word in text


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, models_folder: Path) -> Iterator[ServerProcess]:
    """Open to the network, with a key and one allowed page; "tiny" and smollm2 do not fit in its memory together."""
    arguments = ["tiny", *OPTIONS, "--host", "0.0.0.0", "--allow-origin", "https://chat.example.org"]
    arguments += ["--ram", "500MiB", "--parallel", "2"]
    home = tmp_path_factory.mktemp("home")
    with ServerProcess(
        *arguments, home=home, models=models_folder, more={"TENSORTIER_API_KEY": KEY}
    ) as running:
        yield running.ready()
        assert running.stop(signal.SIGINT) == 0


def test_the_key_is_asked_for_everywhere_but_on_the_page(keyed: ServerProcess) -> None:
    for path in (
        "/v1/models",
        "/v1/models/tiny",
        "/v1/nothing",
        "/stats",
        "/metrics",
        "/api/models",
        "/api/machine",
    ):
        status, body = keyed.get(path)
        assert status == 401 and body["error"]["code"] == "invalid_api_key", path
        assert keyed.get(path, Authorization="Bearer wrong")[0] == 401
        assert keyed.get(path, Authorization="Basic " + KEY)[0] == 401
        found = keyed.get(path, Authorization="Bearer " + KEY)[0]
        assert found == (404 if path.endswith("nothing") else 200)
    assert keyed.get("/v1/models", **{"X-Api-Key": KEY})[0] == 200
    assert keyed.get("/health") == (200, {"status": "ok"})
    assert "<html" in keyed.get("/")[1]
    # with a key, any name for this machine will do
    assert keyed.get("/health", Host="my-pc.example")[0] == 200


def test_an_allowed_page_may_use_it_and_no_other(keyed: ServerProcess) -> None:
    def preflight(origin: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", keyed.port, timeout=PATIENCE)
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        headers["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang"
        connection.request("OPTIONS", "/v1/chat/completions", headers=headers)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer

    answer = preflight("https://chat.example.org")
    assert (
        answer.status == 204 and answer.headers["Access-Control-Allow-Origin"] == "https://chat.example.org"
    )
    # OpenAI's client for browsers sends headers of its own
    assert answer.headers["Access-Control-Allow-Headers"] == "authorization,content-type,x-stainless-lang"
    answer = preflight("https://evil.example.org")
    assert answer.status == 403 and "Access-Control-Allow-Origin" not in answer.headers
    allowed = {"Origin": "https://chat.example.org", "Authorization": "Bearer " + KEY}
    assert keyed.get("/v1/models", **allowed)[0] == 200
    assert keyed.get("/v1/models", **{**allowed, "Origin": "https://chat.example.org.evil.example"})[0] == 403


def test_models_that_do_not_fit_together_take_turns(keyed: ServerProcess) -> None:
    import urllib.request

    def ask(model: str) -> int:
        body = json.dumps({"model": model, "prompt": "x", "max_tokens": 2}).encode()
        request = urllib.request.Request(
            keyed.url + "/v1/completions", body, {"Authorization": "Bearer " + KEY}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            assert json.loads(answer.read())["model"] == model
            return int(answer.status)

    for model in ("smollm2", "tiny", "smollm2"):
        assert ask(model) == 200
        loaded = keyed.quiet(Authorization="Bearer " + KEY)["models"]
        assert [m["name"] for m in loaded if m["phase"] == "ready"] == [model]
        (row,) = [row for row in loaded[0]["memory"] if row["device"] == "CPU"]
        assert row["allocated_bytes"] == row["planned_bytes"] < 500 << 20


def begin(running: ServerProcess, **body: Any) -> http.client.HTTPConnection:
    """A completion that is asked for; its end tokens are left out, so it is as long as it may be."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)
    connection.sock = socket.socket()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)  # little is sent before it is read
    connection.sock.settimeout(PATIENCE)
    connection.sock.connect(("127.0.0.1", running.port))
    connection.request("POST", "/v1/completions", json.dumps({"logit_bias": NEVER_ENDS, **body}))
    return connection


def test_the_page_is_there_while_a_model_is_loaded(tmp_path: Path, models_folder: Path) -> None:
    held = HeldLoading(tmp_path / "held")
    with ServerProcess(
        "tiny", *OPTIONS, home=tmp_path, models=models_folder, more=held.environment
    ) as running:
        for _ in range(2):
            assert "<html" in running.get("/")[1]
            status, health = running.get("/health")
            assert status == 503 and health["status"] == "loading"
        waiting = begin(running, prompt="x", max_tokens=3)
        until(lambda: running.stats()["answers"])
        held.release()
        running.ready()
        answer = waiting.getresponse()
        assert answer.status == 200 and json.loads(answer.read())["usage"]["completion_tokens"] == 3


def test_the_end_is_orderly(tmp_path: Path, models_folder: Path) -> None:
    """Answers are completed: one whose client has not read it yet, and those that are computed."""
    with ServerProcess(
        "smollm2", *OPTIONS, "--parallel", "2", home=tmp_path, models=models_folder
    ) as running:
        running.ready()
        events = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)
        events.request("GET", "/api/events")
        assert events.getresponse().status == 200
        children = psutil.Process(running.process.pid).children(recursive=True)

        # more than the system takes: it is under way until somebody reads it
        asked: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 500, "logprobs": 20}
        unread = begin(running, **asked, stream=True).getresponse()
        assert unread.status == 200 and unread.read(100)
        until(lambda: not sum(m["activity"]["active"] for m in running.stats()["models"]))  # all is computed
        assert running.stats()["answers"] == 1
        asked = {"prompt": "1, 2, 3,", "max_tokens": 24, "temperature": 0}
        whole = begin(running, **asked)
        until(lambda: running.stats()["answers"] == 2 or select.select([whole.sock], [], [], 0)[0])
        stream = begin(running, **asked, stream=True).getresponse()
        assert stream.status == 200
        new = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)
        new.connect()  # before the socket is closed
        running.process.send_signal(signal.SIGTERM)
        until(lambda: running.get("/health")[1]["status"] == "stopping")
        new.request("POST", "/v1/completions", json.dumps({"prompt": "x"}))
        late = new.getresponse()
        assert late.status == 503 and late.headers["Retry-After"]
        answer = whole.getresponse()
        assert answer.status == 200 and json.loads(answer.read())["usage"]["completion_tokens"] == 24
        assert stream.read().endswith(b"data: [DONE]\n\n")
        rest = unread.read()
        assert rest.endswith(b"data: [DONE]\n\n") and len(rest) > 400_000
        assert running.wait() == 0
        assert not psutil.wait_procs(children, PATIENCE)[1]
        assert len(running.log) == 1, running.log  # only where it serves


def test_a_second_signal_ends_answers_at_once(tmp_path: Path) -> None:
    with ServerProcess(*OPTIONS, home=tmp_path) as running:
        running.ready()
        answer: Any = begin(running, prompt="x", max_tokens=1800, stream=True).getresponse()
        answer.read(100)
        first = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        until(lambda: running.get("/health")[1]["status"] == "stopping")
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGINT)
        last = json.loads(answer.read().decode().strip().rsplit("data: ", 1)[1])
        assert last["error"]["code"] == "cancelled"
        assert time.monotonic() - first < STOP_SECONDS, "the first signal alone would have done it by now"
        assert running.wait() == 0
        assert len(running.log) == 1, running.log


def test_a_signal_while_a_model_is_loaded(tmp_path: Path) -> None:
    with ServerProcess(*OPTIONS, home=tmp_path) as running:
        assert running.stop() == 0
        assert len(running.log) == 1, running.log
