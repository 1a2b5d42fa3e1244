"""``tensortier plan`` and ``run --plan`` on real models, with the RPC device as GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def tensortier(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tensortier", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def test_the_file_that_plan_prints_runs(moe_path: Path, rpc_device: str, tmp_path: Path) -> None:
    """Written by ``plan``, obeyed by ``run``: what was planned is what is allocated."""
    options = ("--rpc", rpc_device, "-ot", "_exps=CPU", "-c", "512", "-t", "1")
    planned = tensortier("plan", moe_path, *options, "--json")
    assert planned.returncode == 0, planned.stderr
    file = tmp_path / "plan.json"
    file.write_text(planned.stdout)
    plan = json.loads(planned.stdout)
    assert plan["placement"]["overrides"] == [{"pattern": "_exps", "device": "CPU"}]
    answer = tensortier("run", "--plan", file, "--raw", "-p", "The sun", "-n", "4", "--temp", "0", "--json")
    assert answer.returncode == 0, answer.stderr
    devices = {row["device"]: row["allocated"] for row in json.loads(answer.stdout)["devices"]}
    for row in plan["memory"]:
        assert devices[row.pop("device")] == row


def test_budgets(smollm2_path: Path, rpc_device: str) -> None:
    def used(size: str) -> int:
        answer = tensortier("plan", smollm2_path, "--rpc", rpc_device, "-c", "512", "--vram", size, "--json")
        assert answer.returncode == 0, answer.stderr
        rows = {row["device"]: row for row in json.loads(answer.stdout)["memory"]}
        return sum(rows.get("RPC0", {"x": 0})[k] for k in rows.get("RPC0", {"x": 0}) if k != "device")

    small, large = used("1100MiB"), used("8GiB")
    assert small <= 100 << 20 < large


def test_a_model_of_80_billion_is_planned_in_seconds(skeleton: Callable[[str], Path]) -> None:
    answer = tensortier("plan", skeleton("qwen3-next-80b-a3b-q4_k_m"), "--ram", "16GiB")
    assert answer.returncode == 0, answer.stderr
    assert "45." in answer.stdout and "GiB" in answer.stdout
    assert "warning: CPU has 16.00 GiB free" in answer.stdout


@pytest.mark.parametrize("target", ["llama-server", "koboldcpp", "ollama"])
def test_for_other_engines(smollm2_path: Path, target: str) -> None:
    answer = tensortier("plan", smollm2_path, "--for", target)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(f"# {target}")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["smollm2", "--for", "llamaserver"], 2, "did you mean llama-server?"),
        (["smollm2", "--for", "ollama", "--json"], 2, "--json and --for"),
        (["smollm2", "--vram", "8GiB"], 2, "no GPU here"),
        (["smollm2", "--ram", "-3GiB"], 2, "-3GiB"),
        (["smollm2", "--ram", "lots"], 2, "lots"),
        (["smollm2", "-c", "-1"], 2, "greater than or equal to 0"),
        (["no-such-model"], 2, "no-such-model"),
    ],
)
def test_bad_requests(arguments: list[str], code: int, told: str) -> None:
    answer = tensortier("plan", *arguments)
    assert (answer.returncode, answer.stdout) == (code, "")
    assert told in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not JSON"),
        ("{}", "not a tensortier plan"),
        ('{"tensortier_plan": 1}', "'model' is missing"),
        ('{"tensortier_plan": 1, "model": "/nowhere.gguf"}', "no file /nowhere.gguf"),
        ('{"tensortier_plan": 1, "model": 3}', "plan.model"),
    ],
)
def test_bad_plan_files(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    answer = tensortier("run", "--plan", file, "-p", "x")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert told in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_plan_is_given_alone(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text('{"tensortier_plan": 1, "model": "x.gguf"}')
    answer = tensortier("run", "--plan", file, "-p", "x", "-c", "99")
    assert answer.returncode == 2
    assert "give it alone" in answer.stderr


ELSEWHERE = ("--gpu", "RTX 4060 8GB", "--ram", "32GiB", "--cpu-bandwidth", "60")


def test_a_machine_that_is_not_here(skeleton: Callable[[str], Path]) -> None:
    """A mixture of 18 GB on a card of 8: attention, KV cache and the first experts on the card, within it."""
    path = skeleton("qwen3-30b-a3b-q4_k_m")
    answer = tensortier("plan", path, *ELSEWHERE, "-c", "16384", "--json")
    assert answer.returncode == 0, answer.stderr
    plan = json.loads(answer.stdout)
    rows = {row["device"]: row for row in plan["memory"]}
    assert rows["CPU"]["kv_bytes"] == 0
    assert rows["CUDA0"]["kv_bytes"] == 48 * 16384 * 4 * 256 * 2
    used = sum(v for k, v in rows["CUDA0"].items() if k != "device")
    assert 6.0 * 2**30 < used < 7.2 * 2**30
    assert all("_exps" in o["pattern"] for o in plan["placement"]["overrides"])


def test_a_model_that_is_not_here(skeleton: Callable[[str], Path]) -> None:
    """Only the header of the remote file is read: here under 1 % of its bytes, counted by the server."""
    import http.server
    import threading

    path = skeleton("qwen3-30b-a3b-q4_k_m")
    size = path.stat().st_size
    sent = 0

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal sent
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            end = min(int(last), size - 1)
            with path.open("rb") as file:
                file.seek(int(first))
                data = file.read(end - int(first) + 1)
            sent += len(data)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{end}/{size}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answer = tensortier("plan", f"http://127.0.0.1:{server.server_port}/model.gguf", *ELSEWHERE)
        server.shutdown()
    assert answer.returncode == 0, answer.stderr
    assert "17.3 GiB of weights" in answer.stdout
    assert 0 < sent < size / 100


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "RTX 4060 8GB"], "--ram"),
        (["--gpu", "RTX 4060 8GB", "--ram", "32GiB"], "bandwidth"),
        (["--gpu", "RTX 4061", "--ram", "32GiB", "--cpu-bandwidth", "60"], "RTX 4060"),
        (["--cpu-bandwidth", "60"], "--gpu"),
        ([*ELSEWHERE, "--rpc", "127.0.0.1:1"], "--rpc"),
    ],
)
def test_bad_machines(arguments: list[str], told: str) -> None:
    answer = tensortier("plan", "smollm2", *arguments)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert told in answer.stderr
    assert len(answer.stderr.splitlines()) == 1
