"""``tensortier plan`` and ``run --plan`` on real models, with the RPC device as GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensortier import calibrate, gguf, hardware
from tensortier.calibrate.records import Calibration
from tensortier.cli import main
from tensortier.errors import LibraryError
from tensortier.types import Hardware, Role
from tests import calibrations
from tests.backend_fixtures import rpc_server

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def tensortier(tmp_path_factory: pytest.TempPathFactory, rpc_device: str) -> Command:
    """The command, on this machine with and without the RPC device, both measured before (nobody waits for it)."""
    machines = (hardware.probe(), hardware.probe(rpc=(rpc_device,)))
    environment = calibrations.environment(tmp_path_factory.mktemp("cache"), *machines)

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tensortier", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, env=environment
        )

    return call


def refusal(answer: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The one line of a command that was refused, after checking that there is nothing else."""
    assert (answer.returncode, answer.stdout) == (code, ""), answer.stderr
    assert len(answer.stderr.splitlines()) == 1, answer.stderr
    assert answer.stderr.startswith("tensortier: error: ")
    return answer.stderr


def test_the_file_that_plan_prints_runs(
    tensortier: Command, moe_path: Path, rpc_device: str, tmp_path: Path
) -> None:
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
    assert plan["memory"].pop()["device"] == "process"  # the program itself, no device
    for row in plan["memory"]:
        assert devices[row.pop("device")] == row


def test_budgets(tensortier: Command, smollm2_path: Path, rpc_device: str) -> None:
    def used(size: str) -> int:
        answer = tensortier("plan", smollm2_path, "--rpc", rpc_device, "-c", "512", "--vram", size, "--json")
        assert answer.returncode == 0, answer.stderr
        rows = {row["device"]: row for row in json.loads(answer.stdout)["memory"]}
        return sum(rows.get("RPC0", {"x": 0})[k] for k in rows.get("RPC0", {"x": 0}) if k != "device")

    small, large = used("1100MiB"), used("8GiB")
    assert small <= 100 << 20 < large


def test_a_model_of_80_billion_is_planned_in_seconds(
    tensortier: Command, skeleton: Callable[[str], Path]
) -> None:
    answer = tensortier("plan", skeleton("qwen3-next-80b-a3b-q4_k_m"), "--ram", "8GiB")
    assert answer.returncode == 0, answer.stderr
    assert "45." in answer.stdout and "GiB" in answer.stdout
    # five times the memory that it may use: the rest has to come from the drive, and that is said
    assert "decode is bound by reading weights from the drive" in answer.stdout


@pytest.mark.parametrize("target", ["llama-server", "koboldcpp", "ollama"])
def test_for_other_engines(tensortier: Command, smollm2_path: Path, target: str) -> None:
    answer = tensortier("plan", smollm2_path, "--for", target)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(f"# {target}")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["smollm2", "--vram", "8GiB"], "no GPU here"),
        (["smollm2", "--ram", "0"], "--ram 0 leaves nothing"),
        (["smollm2", "--ram", "4096TiB"], "more than this machine has"),
        (["no-such-model"], "no-such-model"),
    ],
)
def test_what_this_machine_refuses(tensortier: Command, arguments: list[str], told: str) -> None:
    assert told in refusal(tensortier("plan", *arguments))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not JSON"),
        ("{}", "not a tensortier plan"),
        ('{"tensortier_plan": 1}', "'model' is missing"),
        ('{"tensortier_plan": 1, "model": "/nowhere.gguf"}', "no longer there (/nowhere.gguf)"),
        ('{"tensortier_plan": 1, "model": "x.gg', "not JSON"),
        ('{"tensortier_plan": 7, "model": "x.gguf"}', "version 7"),
        ('{"tensortier_plan": 1, "model": "x.gguf", "settings": {"n_ctx": "long"}}', "plan.settings.n_ctx"),
        ("[" * 100000, "nested"),
        ('{"tensortier_plan": 1, "model": 3}', "plan.model"),
    ],
)
def test_bad_plan_files(tensortier: Command, text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    told_instead = refusal(tensortier("run", "--plan", file, "-p", "x"))
    assert told in told_instead and (str(file) in told_instead or "no longer there" in told_instead)


def test_a_plan_is_given_alone(tensortier: Command, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text('{"tensortier_plan": 1, "model": "x.gguf"}')
    answer = tensortier("run", "--plan", file, "-p", "x", "-c", "99")
    assert answer.returncode == 2
    assert "give it alone" in answer.stderr


ELSEWHERE = ("--gpu", "RTX 4060 8GB", "--ram", "32GiB", "--cpu-bandwidth", "60")


def test_a_machine_that_is_not_here(tensortier: Command, skeleton: Callable[[str], Path]) -> None:
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


def test_a_model_that_is_not_here(tensortier: Command, skeleton: Callable[[str], Path]) -> None:
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


# --- speeds and their reasons


def test_the_plan_file_holds_what_was_predicted(
    tensortier: Command, moe_path: Path, rpc_device: str, tmp_path: Path
) -> None:
    options = ("--rpc", rpc_device, "--vram", "1400MiB", "-t", "1", "--workload", "200:50:1000", "--json")
    answer = tensortier("plan", moe_path, *options)
    assert answer.returncode == 0, answer.stderr
    plan = json.loads(answer.stdout)
    assert plan["workload"] == {"name": "200:50:1000", "prompt": 200, "output": 50, "depth": 1000}
    for row in plan["memory"]:
        assert set(row) == {"device", "weights_bytes", "kv_bytes", "compute_bytes"}
    found = plan["estimate"]
    for phase in ("prefill", "decode"):
        low, high = found[f"{phase}_interval"]
        assert 0 < low < found[f"{phase}_tokens_per_second"] < high
    assert found["provenance"] == {"CPU": "measured", "RPC0": "measured"}
    # every weight is read once per token, so no plan is faster than all of it on the faster device
    share = 2 / 8
    read = sum(
        t.nbytes * (share if t.role.is_routed_expert else 1)
        for t in gguf.read(moe_path).tensors
        if t.role is not Role.EMBEDDING
    )
    assert found["decode_tokens_per_second"] < calibrations.GPU_BYTES_PER_SECOND / read
    file = tmp_path / "plan.json"
    file.write_text(answer.stdout)
    ran = tensortier("run", "--plan", file, "-p", "x", "-n", "2", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["estimate"] == found


def test_explain_and_speeds(tensortier: Command, smollm2_path: Path) -> None:
    short = tensortier("plan", smollm2_path)
    assert short.returncode == 0, short.stderr
    assert "workload chat: 256 tokens of prompt" in short.stdout and "--workload changes it" in short.stdout
    assert "context 4096 (chosen)" in short.stdout and "micro-batch 512 (chosen)" in short.stdout
    assert re.search(r"decode [\d.]+ tokens/s \([\d.]+ to [\d.]+\); measured on this machine", short.stdout)
    assert "decode is bound by" in short.stdout
    assert "Where the time goes" not in short.stdout
    long = tensortier("plan", smollm2_path, "--explain", "-c", "2048", "-ub", "512", "-w", "100:100:0")
    assert long.returncode == 0, long.stderr
    assert "(chosen)" not in long.stdout.split("KV cache")[0]
    assert "Where the time goes" in long.stdout and "reading weights on CPU" in long.stdout
    assert "as given" in long.stdout


def test_without_a_measurement_no_speed_is_promised(
    tensortier: Command, smollm2_path: Path, rpc_device: str, tmp_path: Path
) -> None:
    """In an empty cache: nothing is measured, and the plan is made all the same."""
    environment = calibrations.environment(tmp_path)
    command = [sys.executable, "-m", "tensortier", "plan", str(smollm2_path), "--no-calibrate"]
    for more in ([], ["--rpc", rpc_device], ["--rpc", rpc_device, "--vram", "1100MiB"]):
        answer = subprocess.run(
            [*command, *more], capture_output=True, text=True, timeout=300, env=environment, check=False
        )
        assert (answer.returncode, answer.stderr) == (0, "")
        assert "no speeds are predicted" in answer.stdout
        assert "tokens/s" not in answer.stdout
    assert not list((tmp_path / "tensortier").glob("calibration*"))


def test_a_machine_is_measured_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], smollm2_path: Path, tmp_path: Path
) -> None:
    """Asked for once, said so, and kept; what measuring itself does is tested elsewhere."""
    calls: list[Hardware] = []

    def measure(machine: Hardware, **_options: object) -> Calibration:
        calls.append(machine)
        return calibrations.made_up(machine)

    monkeypatch.setattr(calibrate, "calibrate", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for told in (True, False):
        assert main(["plan", str(smollm2_path)]) == 0
        captured = capsys.readouterr()
        assert ("measuring this machine once" in captured.err) == told
        assert "measured on this machine" in captured.out
    assert len(calls) == 1
    # a measurement of another machine counts as none
    (kept,) = (tmp_path / "tensortier").glob("calibration*")
    data = json.loads(kept.read_text())
    kept.write_text(json.dumps({**data, "fingerprint": "another"}))
    assert main(["plan", str(smollm2_path)]) == 0
    assert len(calls) == 2


def test_what_cannot_be_measured_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], smollm2_path: Path, tmp_path: Path
) -> None:
    def fail(machine: Hardware, **_options: object) -> Calibration:
        raise LibraryError("the device is gone")

    monkeypatch.setattr(calibrate, "calibrate", fail)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["plan", str(smollm2_path)]) == 0
    captured = capsys.readouterr()
    assert (
        "warning: this machine could not be measured" in captured.err and "the device is gone" in captured.err
    )
    assert "no speeds are predicted" in captured.out


def test_run_does_not_measure_to_start(smollm2_path: Path, rpc_device: str, tmp_path: Path) -> None:
    """Neither on a CPU nor where everything fits on a device is there anything to decide."""
    environment = calibrations.environment(tmp_path)
    command = [sys.executable, "-m", "tensortier", "run", str(smollm2_path), "-p", "Hi", "-n", "1", "-t", "1"]
    for more in ([], ["--rpc", rpc_device]):
        answer = subprocess.run(
            [*command, *more], capture_output=True, text=True, timeout=300, env=environment, check=True
        )
        assert "measuring" not in answer.stderr
    assert not list((tmp_path / "tensortier").glob("calibration*"))


# --- identity


@pytest.fixture(scope="module")
def tiny_plan(tensortier: Command, tiny_path: Path) -> dict[str, Any]:
    answer = tensortier("plan", tiny_path, "-c", "256", "-t", "1", "--json")
    assert answer.returncode == 0, answer.stderr
    plan: dict[str, Any] = json.loads(answer.stdout)
    return plan


def test_a_plan_follows_its_model(
    tensortier: Command, tiny_plan: dict[str, Any], tiny_path: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(tiny_path.read_bytes())
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**tiny_plan, "model": str(tmp_path / "gone.gguf")}))
    assert "no longer there" in refusal(tensortier("run", "--plan", file, "-p", "x"))
    answer = tensortier("run", moved, "--plan", file, "-p", "x", "-n", "1", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["model"] == str(moved)


def test_a_plan_for_another_model_or_machine(
    tensortier: Command, tiny_plan: dict[str, Any], smollm2_path: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(tiny_plan))
    told = refusal(tensortier("run", smollm2_path, "--plan", file, "-p", "x"))
    assert "another model" in told and "272 tensors" in told and "tensortier plan" in told
    there = tiny_plan["machine_id"] + "; CUDA0 is NVIDIA GeForce RTX 4090 with 23.5 GiB"
    file.write_text(json.dumps({**tiny_plan, "machine_id": there}))
    told = refusal(tensortier("run", "--plan", file, "-p", "x"))
    assert "another machine" in told and "RTX 4090" in told and "tensortier plan" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_gpu_layers": -7}, "n_gpu_layers must be -1 (all) or a number of layers, not -7"),
        ({"n_gpu_layers": 1 << 40}, "n_gpu_layers must be"),
        ({"overrides": [{"pattern": "blk\\.(", "device": "CPU"}]}, "is not a regular expression"),
        (
            {"overrides": [{"pattern": "ffn", "device": "CUDA7"}]},
            "'CUDA7', which is not here; there are: CPU",
        ),
        ({"devices": ["CUDA7"], "n_gpu_layers": -1}, "'CUDA7', which is not here; there are: CPU"),
        ({"tensor_split": [-1.0]}, "tensor_split takes shares of 0 or more"),
        ({"tensor_split": [1.0, 1.0]}, "tensor_split has 2 shares for 0 devices"),
    ],
)
def test_a_plan_that_was_edited(
    tensortier: Command, tiny_plan: dict[str, Any], tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**tiny_plan, "placement": {**tiny_plan["placement"], **change}}))
    answer = tensortier("run", "--plan", file, "-p", "x", "-n", "1")
    assert told in refusal(answer) and answer.returncode == 2


def test_a_described_machine_cannot_run(tensortier: Command, smollm2_path: Path, tmp_path: Path) -> None:
    planned = tensortier("plan", smollm2_path, *ELSEWHERE, "--json")
    file = tmp_path / "plan.json"
    file.write_text(planned.stdout)
    told = refusal(tensortier("run", "--plan", file, "-p", "x"))
    assert "only described" in told and "RTX 4060" in told


# --- memory that is not there after all


@pytest.mark.skipif(sys.platform != "linux", reason="limits the server's memory with setrlimit")
def test_planned_again_when_memory_does_not_suffice(moe_path: Path, rpc_module: Path, tmp_path: Path) -> None:
    """ggml reports the whole machine's memory as the server's, which can map only 340 MB; the model has 479. (What
    the server needs for itself differs from machine to machine: whether a part of the model fits is left open. Where
    nearly all of it fits, the server ends for want of memory when it is asked to compute.)"""
    limit = 340
    with rpc_server(tmp_path / "server.log", address_space=limit << 20) as endpoint:
        machine = hardware.probe(rpc=(endpoint,))
        environment = calibrations.environment(tmp_path / "cache", machine)
        command = [sys.executable, "-m", "tensortier", "run", str(moe_path), "--rpc", endpoint]
        command += ["-p", "The sun", "-n", "4", "-c", "512", "-t", "1", "--temp", "0", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    devices = {row["device"]: row["allocated"]["weights_bytes"] for row in answer["devices"]}
    assert devices.get("RPC0", 0) < limit << 20
    assert answer["completion_tokens"] > 0
    again = [line for line in done.stderr.splitlines() if "planned again" in line]
    assert 1 <= len(again) <= 3


@pytest.mark.skipif(sys.platform != "linux", reason="limits the server's memory with setrlimit")
def test_a_placement_by_hand_is_not_changed(moe_path: Path, rpc_module: Path, tmp_path: Path) -> None:
    with rpc_server(tmp_path / "server.log", address_space=400 << 20) as endpoint:
        command = [sys.executable, "-m", "tensortier", "run", str(moe_path), "--rpc", endpoint, "-ngl", "all"]
        done = subprocess.run([*command, "-p", "x"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "not enough memory" in done.stderr and "planned again" not in done.stderr
    assert "Traceback" not in done.stderr
