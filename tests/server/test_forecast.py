"""What a file of the hub would do here, told from its header: against llama.cpp's own answers once the file is here."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tensortier import hardware, web
from tests import calibrations
from tests.hub_server import Hub
from tests.server.process import PATIENCE, ServerProcess, until

REPO, FILE = "someone/Moe-GGUF", "Moe-Q4_1.gguf"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, moe_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as running:
        (running.folder / REPO).mkdir(parents=True)
        (running.folder / REPO / FILE).symlink_to(moe_path)
        running.put(REPO, "none-Q8_0.gguf", b"GGUF no more" * 100)
        yield running


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, hub: Hub, moe_path: Path) -> Callable[..., ServerProcess]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "moe.gguf").symlink_to(moe_path)

    def start_(*arguments: str, measured: bool = True) -> ServerProcess:
        home = tmp_path_factory.mktemp("home")
        if measured:
            calibrations.measured(home, hardware.probe())
        more = {"HF_ENDPOINT": hub.url}
        return ServerProcess("smollm2", "--threads", "1", *arguments, home=home, models=folder, more=more)

    return start_


@pytest.fixture(scope="module")
def server(start: Callable[..., ServerProcess]) -> Iterator[ServerProcess]:
    with start() as running:
        yield running.ready()
        assert running.stop() == 0, "".join(running.log)
        assert "Traceback" not in "".join(running.log)


def post(server: ServerProcess, path: str, body: object) -> tuple[int, Any]:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as exc:
        return exc.code, json.load(exc)


def told(server: ServerProcess, path: str, body: object) -> Any:
    status, answer = post(server, path, body)
    assert status == 200, answer
    return answer


def held(found: Any, besides: tuple[str, ...] = ()) -> int:
    return sum(sum(sizes) for device, *sizes in found["memory"] if device not in besides)


def test_it_is_what_the_file_does_once_it_is_here(server: ServerProcess, hub: Hub) -> None:
    chosen = {"context": 4096, "kv": "f16", "workload": "chat"}
    hub.clear_log()
    far = told(server, "/api/forecast", {"repo": REPO, "model": FILE, **chosen})
    assert 0 < hub.sent() < 10e6, "no more than the header"
    here = told(server, "/api/plan", {"model": "moe", **chosen})
    assert far["fits"] is True and far["drive"] == 0 and far["context"] == 4096
    assert held(far) == pytest.approx(held(here), rel=0.05)  # formulas, and llama.cpp
    assert far["estimate"]["decode"][0] == pytest.approx(here["estimate"]["decode"][0], rel=0.02)
    assert far["estimate"]["prefill"][0] == pytest.approx(here["estimate"]["prefill"][0], rel=0.02)
    hub.clear_log()
    longer = told(server, "/api/forecast", {"repo": REPO, "model": FILE, "context": 8192, "kv": "f16"})
    assert held(longer) > held(far) and hub.sent() == 0, "the header is kept"


def test_a_model_that_is_larger_than_memory(start: Callable[..., ServerProcess]) -> None:
    with start("--ram", "560MiB") as server:
        far = told(server, "/api/forecast", {"repo": REPO, "model": FILE})
        here = told(server, "/api/plan", {"model": "moe"})
        assert far["fits"] is False and far["drive"] > 50e6
        assert held(far) <= 560 << 20
        assert far["estimate"]["decode"][0] == pytest.approx(here["estimate"]["decode"][0], rel=0.15)
        status, answer = post(server, "/api/forecast", {"repo": REPO, "model": FILE, "context": 1 << 20})
        assert status == 400 and "memory" in answer["error"]["message"]


def test_without_a_measurement_it_tells_what_fits(start: Callable[..., ServerProcess]) -> None:
    with start("--no-calibrate", measured=False) as server:
        far = told(server, "/api/forecast", {"repo": REPO, "model": FILE})
        assert far["fits"] is True and far["estimate"] is None and held(far) > 450e6


def test_what_the_hub_does_not_give(server: ServerProcess, hub: Hub) -> None:
    def asked(repo: str = REPO, model: str = FILE, **more: object) -> tuple[int, str]:
        status, answer = post(server, "/api/forecast", {"repo": repo, "model": model, **more})
        assert set(answer) == {"error"} and "Traceback" not in answer["error"]["message"]
        return status, answer["error"]["message"]

    assert asked(model="nothing.gguf") == (
        502,
        f"hf://{REPO}@main/nothing.gguf: no such file (HTTP 404)",
    )
    assert asked(model="none-Q8_0.gguf")[0] == 502
    try:
        hub.faults(token="hf_secret")
        status, message = asked(revision="0" * 40)
        assert status == 502 and "for a gated model set HF_TOKEN" in message
    finally:
        hub.faults()
    for bad in (
        {"model": "../../secret"},
        {"model": "/etc/passwd"},
        {"repo": "a/b/c"},
        {"repo": "http://x/y"},
    ):
        assert asked(**bad)[0] == 400
    assert asked(revision="main/../../x")[0] == 400
    assert asked(kv="q9")[0] == 400
    assert post(server, "/api/slider", {"model": f"hf://{REPO}/{FILE}"})[0] == 404


def test_a_search_says_what_room_there_is(server: ServerProcess) -> None:
    status, found = server.get("/api/search?q=moe")
    assert status == 200 and found["room"] > 1e6
    (model,) = found["models"]
    assert len(model["revision"]) == 40
    far = told(server, "/api/forecast", {"repo": REPO, "model": FILE, "revision": model["revision"]})
    assert far["fits"] is True


def test_a_server_that_ends_does_not_wait_for_the_hub(start: Callable[..., ServerProcess], hub: Hub) -> None:
    """It ends before it would give up waiting; where the machine is slow, in one of several attempts."""
    seconds: list[float] = []
    while min(seconds, default=web.TIMEOUT) >= web.TIMEOUT:
        assert len(seconds) < 3, seconds
        with start() as server:
            server.ready()
            hub.clear_log()
            hub.faults(stall_at=1000)
            try:
                asking = threading.Thread(target=_ignored, args=(server,))
                asking.start()
                until(hub.sent)
                begun = time.monotonic()
                assert server.stop() == 0
                seconds.append(time.monotonic() - begun)
                asking.join()
            finally:
                hub.faults()


def _ignored(server: ServerProcess) -> None:
    try:
        post(server, "/api/forecast", {"repo": REPO, "model": FILE})
    except (OSError, ValueError):  # the server ended without an answer, or in the middle of one
        return
