"""What the page asks: curves and plans against llama.cpp's own answers, gguf-py and the model's file."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from tensortier import hardware, memory, pageable, planfile
from tensortier.types import Plan
from tests import calibrations
from tests.server.process import PATIENCE, ServerProcess

CODES = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
SKELETON = "qwen3-30b-a3b-q4_k_m"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, moe_path: Path, skeleton: Callable[[str], Path]) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "moe.gguf").symlink_to(moe_path)
    (folder / "large.gguf").symlink_to(skeleton(SKELETON))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[ServerProcess]:
    """A measured machine that serves smollm2."""
    home = calibrations.measured(tmp_path_factory.mktemp("home"), hardware.probe())
    with ServerProcess("smollm2", "--threads", "1", home=home, models=models) as running:
        yield running.ready()
        assert running.stop() == 0, "".join(running.log)
        assert "Traceback" not in "".join(running.log)


def post(server: ServerProcess, path: str, body: object, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(
        server.url + path,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as exc:
        return exc.code, json.load(exc)


def told(server: ServerProcess, path: str, body: object) -> Any:
    status, answer = post(server, path, body)
    assert status in (200, 202), answer
    return answer


def in_ram(rows: list[list[Any]]) -> int:
    return sum(sum(sizes) for _, *sizes in rows)


# --- the curve without a GPU


def test_everything_in_ram_is_what_llama_cpp_says(page: ServerProcess, smollm2_path: Path) -> None:
    curve = told(page, "/api/slider", {"model": "smollm2", "context": 2048, "kv": "f16"})
    assert curve["kind"] == "ram" and curve["measured"]
    found = {row[0]: row[1:] for row in curve["steps"][-1]["tensors"]["memory"]}
    settings = planfile.from_dict(
        {"tensortier_plan": 1, "model": str(smollm2_path), "settings": curve["settings"]}
    ).settings
    (row,) = memory.predict(Plan(str(smollm2_path), settings=settings))
    assert found["CPU"] == [row.weights_bytes, row.kv_bytes, row.compute_bytes]
    assert curve["needed"] == row.total_bytes + sum(found["process"])


def test_the_curve_of_ram(page: ServerProcess) -> None:
    curve = told(page, "/api/slider", {"model": "moe"})
    steps = curve["steps"]
    assert len(steps) == 21 and all(step["fits"] for step in steps)
    budgets = [step["budget"] for step in steps]
    assert budgets == sorted(set(budgets)) and budgets[-1] == curve["needed"] <= curve["free"]
    for step in steps:
        assert in_ram(step["tensors"]["memory"]) <= step["budget"] * 1.001
        for side in ("tensors", "layers"):
            middle, low, high = step[side]["decode"]
            assert low <= middle <= high
        assert step["tensors"]["seconds"] <= step["layers"]["seconds"]
    for side in ("tensors", "layers"):
        speeds = [step[side]["decode"][0] for step in steps]
        assert all(b >= a * 0.999 for a, b in itertools.pairwise(speeds))
        assert speeds[0] < speeds[-1]
    assert steps[-1]["tensors"]["drive"] == 0 < steps[0]["tensors"]["drive"]


def test_the_map_names_every_tensor_of_the_file(page: ServerProcess, moe_path: Path) -> None:
    curve = told(page, "/api/slider", {"model": "moe"})
    reader = GGUFReader(moe_path)
    assert [(t[0], t[3]) for t in curve["tensors"]] == [(t.name, int(t.n_bytes)) for t in reader.tensors]
    seen: set[str] = set()
    for step in curve["steps"]:
        side = step["tensors"]
        assert len(side["map"]) == len(curve["tensors"])
        on_drive = 0
        for (name, role, _, size, _), code in zip(curve["tensors"], side["map"], strict=True):
            device, reason = side["places"][CODES.index(code)]
            seen.add(device)
            assert reason.endswith(".") and len(reason) > 20
            if device == pageable.DEVICE:
                on_drive += size
                assert name not in ("token_embd.weight",) and role != "norm"
                assert "drive" in reason
        held = sum(sum(sizes) for device, *sizes in side["memory"] if device == pageable.DEVICE)
        if held:  # what is on the drive is either kept in RAM or read as it is needed
            assert side["drive"] == pytest.approx(max(0, on_drive - held), abs=on_drive * 0.05)
    assert seen == {"CPU", pageable.DEVICE}


def test_a_longer_context_takes_more(page: ServerProcess) -> None:
    short = told(page, "/api/slider", {"model": "smollm2", "context": 2048, "kv": "f16"})
    long = told(page, "/api/slider", {"model": "smollm2", "context": 8192, "kv": "f16"})
    small = told(page, "/api/slider", {"model": "smollm2", "context": 8192, "kv": "q8_0"})

    def kv(curve: Any) -> int:
        return next(row[2] for row in curve["steps"][-1]["tensors"]["memory"] if row[0] == "CPU")

    assert kv(long) == 4 * kv(short)
    assert kv(small) * 64 == kv(long) * 34  # bytes per 32 values


def test_another_workload_is_another_curve(page: ServerProcess) -> None:
    chat = told(page, "/api/slider", {"model": "smollm2", "workload": "chat"})
    code = told(page, "/api/slider", {"model": "smollm2", "workload": "512:64:4096"})
    assert code["workload"]["depth"] == 4096 and code["context"] >= 4096 + 512 + 64
    assert code["steps"][-1]["tensors"]["decode"] != chat["steps"][-1]["tensors"]["decode"]


def test_a_named_workload_is_made_to_fit_in_the_context(page: ServerProcess) -> None:
    """The page always sends one, and offers contexts that are shorter."""
    for name in ("chat", "agent", "long-document"):
        curve = told(page, "/api/slider", {"model": "smollm2", "workload": name, "context": 2048})
        load = curve["workload"]
        assert load["depth"] + load["prompt"] + load["output"] == 2048 == curve["context"]


# --- plans


def test_the_plan_of_a_position_is_the_curves(page: ServerProcess, moe_path: Path) -> None:
    asked = {"model": "moe", "context": 4096, "kv": "f16"}
    curve = told(page, "/api/slider", asked)
    for index in (5, 12, 20):
        step = curve["steps"][index]
        plan = told(page, "/api/plan", {**asked, "budget": step["budget"]})
        assert in_ram(plan["memory"]) <= step["budget"]
        assert plan["estimate"]["decode"][0] == pytest.approx(step["tensors"]["decode"][0], rel=0.02)
        assert plan["reasons"]
        status, text = page.get(f"/api/plans/{plan['id']}")
        found = planfile.from_dict(text)
        assert status == 200 and Path(found.model).samefile(moe_path)
        assert (found.tier is None) == (step["tensors"]["drive"] == 0)


def test_a_plan_that_was_saved_is_what_run_takes(page: ServerProcess, tmp_path: Path) -> None:
    asked = {"model": "moe", "context": 2048, "kv": "f16"}
    curve = told(page, "/api/slider", asked)
    plan = told(page, "/api/plan", {**asked, "budget": curve["steps"][8]["budget"]})
    saved = tmp_path / "plan.json"
    saved.write_text(json.dumps(page.get(f"/api/plans/{plan['id']}")[1], indent=2))
    command = [sys.executable, "-m", "tensortier", "run", "--plan", str(saved), "-p", "Say hi"]
    command += ["-n", "4", "--temperature", "0"]
    ran = subprocess.run(command, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr
    assert "on the drive" in ran.stderr


def test_exports_of_a_plan(page: ServerProcess) -> None:
    plan = told(page, "/api/plan", {"model": "smollm2", "context": 4096})
    _, targets = page.get("/api/targets")
    for target in targets["targets"]:
        status, made = page.get(f"/api/export/{target['name']}?plan={plan['id']}")
        assert status == 200 and (made["command"] or made["files"]), target
    _, made = page.get(f"/api/export/llama-server?plan={plan['id']}")
    assert made["command"].startswith("llama-server ") and " -c 4096 " in made["command"]
    assert page.get(f"/api/export/llamafile?plan={plan['id']}")[0] == 400
    assert page.get("/api/export/llama-server?plan=none")[0] == 400


def events(server: ServerProcess) -> Iterator[tuple[str, Any]]:
    with urllib.request.urlopen(server.url + "/api/events", timeout=PATIENCE) as stream:
        end, event = time.monotonic() + PATIENCE, ""
        for line in stream:
            text = line.decode().rstrip("\r\n")
            if text.startswith("event:"):
                event = text[6:].strip()
            elif text.startswith("data:"):
                yield event, json.loads(text[5:])
            assert time.monotonic() < end, "nothing of it was told"


def test_loading_a_plan_is_told(page: ServerProcess) -> None:
    asked = {"model": "smollm2", "context": 2048, "kv": "f16"}
    curve = told(page, "/api/slider", asked)
    plan = told(page, "/api/plan", {**asked, "budget": curve["steps"][10]["budget"]})
    assert told(page, "/api/load", {"plan": plan["id"]}) == {"model": "smollm2"}
    phases: list[str] = []
    for event, value in events(page):
        mine = [m for m in value.get("models", ()) if event == "state" and m["plan"] == plan["id"]]
        phases += [m["phase"] for m in mine]
        if "ready" in phases:
            assert mine[-1]["context"] == 2048
            break
    # the same again is told too, however little time it takes
    first = mine[-1]["loading"]
    told(page, "/api/load", {"plan": plan["id"]})
    for event, value in events(page):
        if event == "state" and any(m["loading"] > first and m["phase"] == "ready" for m in value["models"]):
            break
    asked = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}]}
    answer = told(page, "/v1/chat/completions", {**asked, "max_tokens": 4, "temperature": 0})
    assert answer["usage"]["completion_tokens"] > 0
    for event, value in events(page):
        if event == "stats" and value["models"] and value["models"][0]["tokens"] > 0:
            drive = value["models"][0]["drive"]
            assert drive is not None and drive["bytes"] > 0  # half of its weights are on the drive
            break


# --- while it works, and when it cannot


def test_planning_does_not_hold_up_the_server(page: ServerProcess) -> None:
    """While it plans, it answers others before it has computed for half a second more. It is asked so often that once
    nothing else on the machine comes between a question and its answer."""

    def slowest(context: int) -> float:
        """CPU seconds of the server between a question and its answer, the most of all while it plans."""
        ended, most, answered = threading.Event(), 0.0, 0
        with ThreadPoolExecutor(1) as threads:
            planning = threads.submit(told, page, "/api/slider", {"model": "large", "context": context})
            planning.add_done_callback(lambda _: ended.set())
            while not ended.is_set():
                before = page.cpu_seconds()
                assert page.get("/health")[0] == 200
                most, answered = max(most, page.cpu_seconds() - before), answered + 1
            planning.result()
        assert answered > 1
        return most

    found: list[float] = []
    for context in (8192, 16384, 32768, 65536, 131072):
        found.append(slowest(context))
        if found[-1] < 0.5:
            return
    raise AssertionError(found)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/slider", {"model": "nothing"}, 404),
        ("/api/slider", {"model": "../../etc/passwd"}, 404),
        ("/api/slider", {"model": "/etc/passwd"}, 404),
        ("/api/slider", {"model": "hf://owner/repo/file.gguf"}, 404),
        ("/api/slider", {"model": "smollm2", "kv": "q9"}, 400),
        ("/api/slider", {"model": "smollm2", "context": 7}, 400),
        ("/api/slider", {"model": "smollm2", "context": "many"}, 400),
        ("/api/slider", {"model": "smollm2", "unknown": 1}, 400),
        ("/api/slider", {"model": "smollm2", "workload": "sleeping"}, 400),
        ("/api/slider", {"model": "smollm2", "workload": "4096:4096:4096", "context": 512}, 400),
        ("/api/slider", [], 400),
        ("/api/plan", {"model": "smollm2", "budget": -1}, 400),
        ("/api/plan", {"model": "smollm2", "budget": 1000}, 400),
        ("/api/load", {"plan": "0" * 20}, 400),
        ("/api/load", {}, 400),
        ("/api/downloads", {"repo": "../..", "file": "x.gguf"}, 400),
    ],
)
def test_what_cannot_be_is_refused(page: ServerProcess, path: str, body: object, status: int) -> None:
    got, answer = post(page, path, body)
    assert got == status, answer
    assert set(answer) == {"error"} and answer["error"]["message"]
    assert "Traceback" not in answer["error"]["message"]


def test_models_and_machine(page: ServerProcess, models: Path) -> None:
    _, found = page.get("/api/models")
    assert {"smollm2", "moe", "large"} <= {m["id"] for m in found["models"]}
    assert found["served"] == "smollm2" and found["downloads"]
    large = next(m for m in found["models"] if m["id"] == "large")
    assert large["size"] == (models / "large.gguf").stat().st_size
    _, machine = page.get("/api/machine")
    here = hardware.probe()
    assert machine["ram_total"] == here.ram_limit and machine["measured"] is True
    assert set(machine["workloads"]) == {"chat", "code", "long-document", "agent"}


def test_a_machine_that_was_not_measured_has_no_curve(tmp_path: Path) -> None:
    with ServerProcess("smollm2", "--threads", "1", "--no-calibrate", home=tmp_path) as server:
        server.ready()
        curve = told(server, "/api/slider", {"model": "smollm2"})
        assert curve["measured"] is False and curve["steps"] == []
        plan = told(server, "/api/plan", {"model": "smollm2"})
        assert plan["estimate"] is None and in_ram(plan["memory"]) > 90e6
        assert server.get("/api/machine")[1]["measured"] is False


def test_the_key_is_for_what_the_page_asks_not_for_the_page(tmp_path: Path) -> None:
    with ServerProcess(
        "smollm2", "--threads", "1", "--no-calibrate", "--api-key", "secret", home=tmp_path
    ) as server:
        assert server.get("/")[0] == server.get("/app.js")[0] == server.get("/style.css")[0] == 200
        for path in ("/api/models", "/api/machine", "/api/events", "/api/plans/x"):
            assert server.get(path)[0] == 401
        assert server.get("/api/models", Authorization="Bearer secret")[0] == 200
        assert post(server, "/api/slider", {"model": "smollm2"})[0] == 401
