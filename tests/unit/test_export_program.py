"""The program for llama-cpp-python, run on the CPU and on remote devices."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensortier import export, gguf, memory
from tensortier.export import common
from tensortier.types import Override, Placement, Plan, Settings
from tests.backend_fixtures import rpc_server


@pytest.fixture(scope="module")
def two_servers(rpc_module: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("servers")
    with rpc_server(folder / "a.log") as a, rpc_server(folder / "b.log") as b:
        yield a, b


_DRIVER = """
import json, os, runpy, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import ctypes
from llama_cpp import llama_cpp as low
if sys.argv[2]:  # as a wheel built with RPC would have it
    load = low._lib.ggml_backend_load
    load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    assert load(sys.argv[2].encode())
given, load, init = {}, low.llama_model_load_from_file, low.llama_init_from_model
def see_model(path, params):
    given.update(load_mode=params.load_mode, repack=params.use_extra_bufts)
    return load(path, params)
def see_context(model, params):
    given.update(flash=params.flash_attn_type, sequences=params.n_seq_max, threads=params.n_threads_batch)
    given.update(op_offload=params.op_offload, swa_full=params.swa_full)
    return init(model, params)
low.llama_model_load_from_file, low.llama_init_from_model = see_model, see_context
llm = runpy.run_path(sys.argv[1])["llm"]
answer = llm("The capital of France is", max_tokens=6, temperature=0.0)
from tensortier._llama import memory
rows = [[r.device, r.weights_bytes, r.kv_bytes, r.compute_bytes] for r in memory.allocated(llm._ctx.ctx)]
json.dump({"text": answer["choices"][0]["text"], "memory": rows, "n_ctx": llm.n_ctx(), "given": given}, answers)
answers.flush()
os._exit(0)
"""


@pytest.mark.parametrize("remote", [False, True])
def test_python_program_loads_as_planned(
    remote: bool,
    smollm2_path: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """It answers, and llama.cpp's account of its memory is the one predicted for the plan."""
    model = gguf.read(smollm2_path)
    place, servers, module = Placement(overrides=(Override(r"ffn_up", "CPU"),)), (), ""
    if remote:
        servers = request.getfixturevalue("two_servers")
        module = str(request.getfixturevalue("rpc_module"))
        place = Placement(
            ("RPC1", "RPC0"),
            25,
            (1.0, 2.0),
            (Override(r"blk\.(1\d|2[0-4])\.ffn_(up|gate)", "CPU"), Override("ffn_down", "RPC0")),
        )
    plan = Plan(
        model.path,
        place,
        Settings(
            n_ctx=512,
            n_ubatch=128,
            type_k="q8_0",
            type_v="q8_0",
            load_mode="none",
            threads=2,
            repack=False,
            op_offload=False,
        ),
        rpc=servers,
    )
    exported = export.export(plan, model, "llama-cpp-python")
    assert exported.lost == ()
    program = tmp_path / exported.argv[1]
    program.write_text(exported.files[exported.argv[1]])
    (tmp_path / "driver.py").write_text(_DRIVER)
    done = subprocess.run(
        [sys.executable, tmp_path / "driver.py", program, module],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert "Paris" in answer["text"]
    with memory.Probe() as probe:
        expected = [[r.device, r.weights_bytes, r.kv_bytes, r.compute_bytes] for r in probe.ask(plan)]
    assert answer["memory"] == expected
    assert answer["n_ctx"] == 512
    assert answer["given"] == {
        "load_mode": 0,  # LLAMA_LOAD_MODE_NONE
        "repack": False,
        "flash": -1,  # LLAMA_FLASH_ATTN_TYPE_AUTO
        "sequences": 1,
        "threads": 2,
        "op_offload": False,
        "swa_full": False,
    }
    assert len(expected) == (3 if remote else 1)


def test_names_of_remote_buffer_types(two_servers: tuple[str, str]) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "tensortier._llama.devices", *two_servers],
        capture_output=True,
        text=True,
        check=True,
    )
    found = {d["name"]: d["buffer_type"] for d in json.loads(listed.stdout)["devices"]}
    plan = Plan("m.gguf", rpc=two_servers)
    assert {n: common.buffer_type(plan, n) for n in found} == found
    assert {"RPC0", "RPC1", "CPU"} <= set(found)


def test_python_program_says_what_is_missing(smollm2_path: Path, tmp_path: Path) -> None:
    model = gguf.read(smollm2_path)
    exported = export.export(Plan(model.path, Placement(("CUDA7",), -1)), model, "llama-cpp-python")
    (tmp_path / "p.py").write_text(exported.files[exported.argv[1]])
    done = subprocess.run([sys.executable, tmp_path / "p.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "not here: CUDA7; there are: CPU" in done.stderr
