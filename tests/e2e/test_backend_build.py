"""The real RPC module: compiled (unless it is cached), loaded into the unmodified bindings, spoken to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tensortier import backends

LOAD = """
import ctypes, json, sys
from tensortier import backends
libs = backends.library_dir()
import llama_cpp
ggml = ctypes.CDLL(str(backends._ggml_library(libs, "ggml")))
ggml.ggml_backend_load.restype = ctypes.c_void_p
ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
before = ggml.ggml_backend_reg_count()
loaded = ggml.ggml_backend_load(sys.argv[1].encode())
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
bases = sorted({line.split()[-1] for line in maps.splitlines() if "libggml-base" in line})
print(json.dumps([bool(loaded), ggml.ggml_backend_reg_count() - before, bases]))
"""


def test_module_loads_into_the_unmodified_bindings(rpc_module: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", LOAD, str(rpc_module)], capture_output=True, text=True, check=True, timeout=120
    )
    loaded, registered, bases = json.loads(answer.stdout.splitlines()[-1])
    assert loaded
    assert registered == 1
    if sys.platform == "linux":  # a second copy would be a second, empty registry
        assert bases == [str((backends.library_dir() / "libggml-base.so.0").resolve())]


def command_line(process: Path) -> bytes:
    """Empty when it has ended meanwhile."""
    try:
        return (process / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_server_computes_with_the_kernels_of_the_bindings(rpc_device: str) -> None:
    """The server runs, and the CPU library it has mapped is the one the bindings load."""
    if sys.platform != "linux":
        pytest.skip("looks into /proc")
    port = rpc_device.rpartition(":")[2]
    server = next(p for p in Path("/proc").glob("[0-9]*") if f"--port\0{port}\0".encode() in command_line(p))
    mapped = {
        line.split()[-1] for line in (server / "maps").read_text().splitlines() if "libggml-cpu" in line
    }
    assert mapped == {str((backends.library_dir() / "libggml-cpu.so.0").resolve())}


def test_nothing_of_the_build_is_left(rpc_module: Path) -> None:
    assert backends.module_path("rpc") == rpc_module
    if sys.platform == "linux":
        dynamic = subprocess.run(
            ["readelf", "-d", rpc_module], capture_output=True, text=True, check=True
        ).stdout
        assert "$ORIGIN" in dynamic
        assert ".work-" not in dynamic
    assert not list(rpc_module.parent.glob(".work-rpc"))
