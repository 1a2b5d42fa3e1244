"""Building backends: what goes wrong on the way, with a stand-in for CMake. The real build is in e2e."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tensortier import backends, cuda_toolkit
from tensortier.errors import BackendError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are shell scripts")
VERSION = backends.bindings_version()
CMAKE = """#!/bin/sh
echo "$@" >> "{calls}"
case "$1" in
--build) {build} ;;
esac
"""
MAKES_RPC = """mkdir -p "$2/bin"; echo "[1/2] compiling"; echo module > "$2/bin/libggml-rpc.so"
printf '#!/bin/sh\\nexit 0\\n' > "$2/bin/rpc-server"; chmod +x "$2/bin/rpc-server" """


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(backends.paths, "cache_dir", lambda: tmp_path / "cache")
    return backends._folder(VERSION)


def archive(path: Path, version: str = VERSION, extra: dict[str, bytes] | None = None) -> Path:
    top = "llama_cpp_python-x"
    files = {
        "PKG-INFO": f"Name: llama_cpp_python\nVersion: {version}\n".encode(),
        "vendor/llama.cpp/ggml/CMakeLists.txt": b"",
        "vendor/llama.cpp/tools/rpc/rpc-server.cpp": b"",
        "vendor/llama.cpp/models/big.gguf": b"not wanted",
    }
    with tarfile.open(path, "w:gz") as out:
        for name, data in (files | (extra or {})).items():
            item = tarfile.TarInfo(f"{top}/{name}")
            item.size = len(data)
            out.addfile(item, io.BytesIO(data))
    return path


@pytest.fixture
def fake_cmake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CMake whose build step is the text in ``build.sh``; what it is called with is in ``calls``."""
    folder = tmp_path / "tools"
    folder.mkdir()
    script = folder / "cmake"
    script.write_text(CMAKE.format(calls=tmp_path / "calls", build=f'. "{tmp_path}/build.sh"'))
    script.chmod(0o755)
    (tmp_path / "build.sh").write_text(MAKES_RPC)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return tmp_path


def left(folder: Path) -> set[str]:
    return {
        p.name for p in folder.iterdir() if not p.name.startswith("build-") and not p.name.endswith(".lock")
    }


def test_build_places_module_server_and_record(cache: Path, fake_cmake: Path) -> None:
    lines: list[str] = []
    source = archive(fake_cmake / "source.tar.gz")
    path = backends.build("rpc", source=source, jobs=3, progress=lines.append)
    assert path == cache / "libggml-rpc.so"
    assert left(cache) == {"libggml-rpc.so", "rpc-server", "rpc.json"}
    assert backends.module_path("rpc") == path
    assert backends.rpc_server() == cache / "rpc-server"
    assert [(m.name, m.size, m.version, m.state) for m in backends.installed()] == [
        ("rpc", 7, VERSION, "ready")
    ]
    assert "compiling rpc 1/2" in lines
    configure, make = (fake_cmake / "calls").read_text().splitlines()
    for option in ("GGML_RPC=ON", "GGML_NATIVE=OFF", "GGML_BACKEND_DL=ON", "GGML_CPU=OFF"):
        assert f"-D{option}" in configure
    assert "--parallel 3 --target ggml-rpc rpc-server" in make
    backends.build("rpc", source=source)  # it is there: nothing happens
    assert len((fake_cmake / "calls").read_text().splitlines()) == 2
    backends.build("rpc", source=source, force=True)
    assert len((fake_cmake / "calls").read_text().splitlines()) == 4


def test_failed_build_says_why_and_keeps_what_was_there(cache: Path, fake_cmake: Path) -> None:
    source = archive(fake_cmake / "source.tar.gz")
    (fake_cmake / "build.sh").write_text('echo "x.cpp:3: error: no such thing"; echo noise; exit 2')
    with pytest.raises(BackendError) as failed:
        backends.build("rpc", source=source)
    log = cache / "build-rpc.log"
    assert "x.cpp:3: error: no such thing" in str(failed.value)
    assert str(log) in str(failed.value)
    assert "noise" in log.read_text()
    assert left(cache) == set()
    assert backends.module_path("rpc") is None
    (fake_cmake / "build.sh").write_text(MAKES_RPC)
    good = backends.build("rpc", source=source).read_bytes()
    (fake_cmake / "build.sh").write_text(f"{MAKES_RPC}; exit 1")
    with pytest.raises(BackendError):
        backends.build("rpc", source=source, force=True)
    assert (cache / "libggml-rpc.so").read_bytes() == good
    assert backends.module_path("rpc") is not None


def test_build_that_makes_nothing_is_an_error(cache: Path, fake_cmake: Path) -> None:
    (fake_cmake / "build.sh").write_text(":")
    with pytest.raises(BackendError, match=r"without libggml-rpc\.so"):
        backends.build("rpc", source=archive(fake_cmake / "source.tar.gz"))


INTERRUPTED = """
import pathlib, sys
from tensortier import backends
backends.paths.cache_dir = lambda: pathlib.Path(sys.argv[1])
backends.build("rpc", source=pathlib.Path(sys.argv[2]), progress=lambda line: print(line, flush=True))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_build_leaves_nothing_in_the_way(
    cache: Path, fake_cmake: Path, how: signal.Signals
) -> None:
    source = archive(fake_cmake / "source.tar.gz")
    (fake_cmake / "build.sh").write_text(
        f'echo $$ > "{fake_cmake}/pid"; echo "[1/2] compiling"; exec sleep 600'
    )
    argv = [sys.executable, "-c", INTERRUPTED, str(fake_cmake / "cache"), str(source)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    # not before it listens to the compiler, which is then known to it as well
    assert b"compiling rpc 1/2\n" in iter(process.stdout.readline, b"")
    compiler = int((fake_cmake / "pid").read_text())
    process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    if how == signal.SIGINT:
        assert b"KeyboardInterrupt" in errors
        with pytest.raises(ProcessLookupError):
            os.kill(compiler, 0)  # the compiler did not outlive it
        assert left(cache) == set()
    else:
        os.kill(compiler, signal.SIGKILL)
    assert backends.module_path("rpc") is None
    (fake_cmake / "build.sh").write_text(MAKES_RPC)
    assert backends.build("rpc", source=source).is_file()
    assert left(cache) == {"libggml-rpc.so", "rpc-server", "rpc.json"}


def test_two_builds_at_once_compile_once(cache: Path, fake_cmake: Path) -> None:
    source = archive(fake_cmake / "source.tar.gz")
    go_on = fake_cmake / "go on"  # the first compiles until the second waits for it, or for a minute
    waits = f'n=0; while [ ! -e "{go_on}" ] && [ $n -lt 3000 ]; do sleep 0.02; n=$((n + 1)); done'
    (fake_cmake / "build.sh").write_text(f"{waits}; {MAKES_RPC}")
    lines: list[str] = []

    def told(line: str) -> None:
        lines.append(line)
        if line.startswith("waiting"):
            go_on.touch()

    with ThreadPoolExecutor() as pool:
        running = [pool.submit(backends.build, "rpc", source=source, progress=told) for _ in range(2)]
        assert [r.result() for r in running] == [cache / "libggml-rpc.so"] * 2
    assert len((fake_cmake / "calls").read_text().splitlines()) == 2
    assert lines.count("waiting for another process that builds rpc") == 1


def test_sources_that_are_refused(cache: Path, fake_cmake: Path) -> None:
    old = archive(fake_cmake / "old.tar.gz", version="0.0.1")
    with pytest.raises(BackendError, match=rf"0\.0\.1, but {VERSION} is installed"):
        backends.build("rpc", source=old)
    text = fake_cmake / "text.tar.gz"
    text.write_text("this is no archive")
    whole = archive(fake_cmake / "whole.tar.gz").read_bytes()
    (fake_cmake / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    (fake_cmake / "empty").mkdir()
    for name in ("text.tar.gz", "cut.tar.gz", "empty", "nowhere"):
        with pytest.raises(BackendError, match=name):
            backends.build("rpc", source=fake_cmake / name)
    climbing = {"vendor/llama.cpp/ggml/../../../escaped": b"x"}
    with pytest.raises(BackendError, match="outside"):
        backends.build("rpc", source=archive(fake_cmake / "evil.tar.gz", extra=climbing))
    assert not list(fake_cmake.rglob("escaped"))
    assert left(cache) == set()


def test_names_and_tools_that_are_missing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match="rpc, vulkan, cuda"):
        backends.build("metal")  # type: ignore[arg-type]
    monkeypatch.setattr(backends, "_search_path", lambda: str(tmp_path))
    with pytest.raises(BackendError, match="pip install cmake"):
        backends.build("rpc")
    monkeypatch.setattr(cuda_toolkit.shutil, "which", lambda _name: None)
    with pytest.raises(BackendError, match="CUDA toolkit"):
        cuda_toolkit.find()


def test_modules_that_do_not_fit_are_listed_and_not_used(cache: Path, fake_cmake: Path) -> None:
    backends.build("rpc", source=archive(fake_cmake / "source.tar.gz"))
    other = cache.parent / "0.0.1-abcdef12"
    other.mkdir()
    for name in ("libggml-vulkan.so", "vulkan.json"):
        (other / name).write_text("{}")
    record = cache / "rpc.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps(facts | {"library_dirs": ["/gone/lib"]}))
    states = {m.name: m.state for m in backends.installed()}
    assert states["vulkan"] == "for another installation, of llama-cpp-python 0.0.1"
    assert "/gone/lib, which is gone" in states["rpc"]
    assert backends.module_path("rpc") is None
    assert backends.module_path("vulkan") is None
    assert backends.rpc_server() is None
    record.write_text("{")
    assert "cannot be read" in {m.name: m.state for m in backends.installed()}["rpc"]
    backends.build("rpc", source=archive(fake_cmake / "source.tar.gz"))  # repairs it
    assert backends.rpc_server() is not None


def test_vulkan_patch_guards_one_block(tmp_path: Path) -> None:
    first, last, plain = backends._VULKAN_BLOCK
    path = tmp_path / "ggml-vulkan.cpp"
    path.write_text(f"before\n{first}    middle\n    vk::InstanceCreateInfo i({last}after\n")
    backends._patch_vulkan(path)
    old_headers = subprocess.run(["cpp", "-P", path], capture_output=True, text=True, check=True).stdout
    new_headers = subprocess.run(
        ["cpp", "-P", "-DVK_EXT_layer_settings", path], capture_output=True, text=True, check=True
    ).stdout
    assert old_headers.split() == f"before {plain} after".split()
    assert new_headers.split() == f"before {first} middle vk::InstanceCreateInfo i({last} after".split()
    path.write_text("something else")
    with pytest.raises(BackendError, match=r"ggml-vulkan\.cpp"):
        backends._patch_vulkan(path)


def test_stand_in_for_the_driver_defines_what_ggml_calls(tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text(
        "CU_CHECK(cuMemMap(p, 1));\ncuDeviceGet(&d, 0); cublasCreate(&h); // cuBLAS (x)"
    )
    cuda_toolkit._make_driver_stub(tmp_path, tmp_path / "libcuda.so", tmp_path)
    answer = subprocess.run(
        ["nm", "-D", "--defined-only", tmp_path / "libcuda.so"], capture_output=True, text=True
    )
    defined = {line.split()[-1] for line in answer.stdout.splitlines()}
    assert {n for n in defined if n.startswith("cu")} == {
        "cuMemMap",
        "cuMemMap_v2",
        "cuDeviceGet",
        "cuDeviceGet_v2",
    }
