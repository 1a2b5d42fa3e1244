"""ggml backends as loadable modules, compiled from the source distribution of the installed bindings.

A module built from exactly the source of the installed ``llama-cpp-python`` loads into its unmodified CPU
build with ``ggml_backend_load``, so nobody has to rebuild the bindings for a GPU. Results are kept in
``<cache>/backends/<version of llama-cpp-python>-<installation>/``: ``libggml-<name>.so``, for RPC the
``rpc-server`` program beside it, a small JSON file that says how each was built, and the log of the last build.
Importing this module loads no native library.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

from tensortier import cuda_toolkit, paths
from tensortier.bindings import BINDINGS, bindings_version, library_dir
from tensortier.errors import BackendError

BackendName = Literal["rpc", "vulkan", "cuda"]
NAMES: tuple[BackendName, ...] = get_args(BackendName)

_PREFIX = "" if sys.platform == "win32" else "lib"
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_EXE = ".exe" if sys.platform == "win32" else ""

# A build in one go: the module by ggml's own build files, the server against the installed bindings' ggml, so
# that its CPU kernels are the very ones that compute locally.
_CMAKE_LISTS = """\
cmake_minimum_required(VERSION 3.19)
project(tensortier_backend C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_subdirectory(ggml)
if (GGML_RPC)
    add_executable(rpc-server rpc-server.cpp)
    target_compile_features(rpc-server PRIVATE cxx_std_17)
    target_compile_definitions(rpc-server PRIVATE GGML_SHARED GGML_BACKEND_SHARED)
    target_include_directories(rpc-server PRIVATE ggml/include)
    target_link_libraries(rpc-server PRIVATE ${TENSORTIER_GGML_LIBS})
endif()
"""

# Headers older than Vulkan 1.3.272 do not know VK_EXT_layer_settings, which serves debugging only.
_VULKAN_BLOCK = (
    "    VkBool32 enable_best_practice = layer_settings;\n",
    "extensions, &layer_setting_info);\n",
    "    vk::InstanceCreateInfo instance_create_info({}, &app_info, layers, extensions);\n",
)


@dataclass(frozen=True)
class BackendModule:
    """A module in the cache. ``state`` is "ready", or why it cannot be used."""

    name: str
    path: Path
    size: int
    version: str  # of llama-cpp-python, from whose source it was built
    state: str
    here: bool  # built for the installation of the bindings that runs


def installed() -> list[BackendModule]:
    """Every module in the cache, those for other installations of the bindings included."""
    current = _folder(bindings_version())
    found = []
    for record in sorted((paths.cache_dir() / "backends").glob("*/*.json")):
        name, version = record.stem, record.parent.name.rpartition("-")[0]
        module = record.parent / _module_file(name)
        if name in NAMES and module.is_file():
            other = f"for another installation, of {BINDINGS} {version}"
            state = _state(record) if record.parent == current else other
            found.append(
                BackendModule(name, module, module.stat().st_size, version, state, record.parent == current)
            )
    return found


def module_path(name: str) -> Path | None:
    """Path to give to ``ggml_backend_load``, or None when there is no module that can be used."""
    folder = _folder(bindings_version())
    module = folder / _module_file(name)
    return module if module.is_file() and _state(folder / f"{name}.json") == "ready" else None


def rpc_server() -> Path | None:
    """ggml's RPC server program. It offers this machine's GPUs that have a module, else its CPU."""
    module = module_path("rpc")
    server = module.parent / f"rpc-server{_EXE}" if module else None
    return server if server and server.is_file() else None


def build(
    name: BackendName,
    *,
    source: Path | None = None,
    jobs: int | None = None,
    cuda_architectures: str | None = None,
    progress: Callable[[str], None] | None = None,
    force: bool = False,
) -> Path:
    """Compile a module, unless one that can be used is there, and return its path.

    ``source``: the source distribution of the bindings, as archive or unpacked; downloaded when None.
    ``jobs``: compilers at a time. ``cuda_architectures``: as CMAKE_CUDA_ARCHITECTURES takes them ("90-real");
    None means the cards of this machine, or without one ggml's own list. ``progress`` gets a line at a time.
    A build that fails or is interrupted leaves what was there before. Raises BackendError.
    """
    if name not in NAMES:
        raise BackendError(f"there is no backend {name!r} to build: choose one of {', '.join(NAMES)}")
    from filelock import FileLock, Timeout

    say = progress or (lambda _line: None)
    version = bindings_version()
    folder = _folder(version)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that builds {name}")
        lock.acquire()
        force = False  # what the other process has just built is fresh
    try:
        module = module_path(name)
        if module is None or force:
            module = _build(name, version, source, jobs, cuda_architectures, say)
        elif source or jobs or cuda_architectures:
            say(f"{name} is built already, so these options change nothing; --force builds it again")
        return module
    finally:
        lock.release()


def _module_file(name: str) -> str:
    return f"{_PREFIX}ggml-{name}{_SUFFIX}"


def _folder(version: str) -> Path:
    """Of one installation of the bindings. Two of the same version may be compiled differently, and the programs
    built here run on the libraries of theirs."""
    installation = hashlib.sha256(os.fsencode(library_dir().resolve())).hexdigest()[:8]
    return paths.cache_dir() / "backends" / f"{version}-{installation}"


def _state(record: Path) -> str:
    """Whether what the record describes can be used with the installed bindings."""
    again = f"run `tensortier backend build {record.stem} --force`"
    try:
        facts = json.loads(record.read_text())
        libraries = facts["library_dirs"]
    except FileNotFoundError:
        return f"not finished: {again}"
    except (OSError, ValueError, KeyError, TypeError) as exc:
        return f"its record cannot be read ({exc}): {again}"
    for folder in libraries:
        if not Path(folder).is_dir():
            return f"linked to {folder}, which is gone: {again}"
    return "ready"


def _build(
    name: BackendName,
    version: str,
    source: Path | None,
    jobs: int | None,
    cuda_architectures: str | None,
    say: Callable[[str], None],
) -> Path:
    started = time.monotonic()
    folder = _folder(version)
    log_path = folder / f"build-{name}.log"
    cmake, generator = _build_tools()
    libs = library_dir()
    library_dirs = [libs]
    work = folder / f".work-{name}"
    shutil.rmtree(work, ignore_errors=True)  # of a build that was killed; the lock says nobody uses it
    work.mkdir()
    try:
        with log_path.open("w") as log:
            options = {f"GGML_{name.upper()}": "ON"}
            environment = dict(os.environ)
            if name == "vulkan":
                _check_vulkan(work)
            cuda = cuda_toolkit.find() if name == "cuda" else None
            say(f"getting the source of {BINDINGS} {version}")
            archive = source or _download(version, folder, log, log_path)
            _unpack(archive, version, work)
            if name == "vulkan":
                _patch_vulkan(work / "ggml" / "src" / "ggml-vulkan" / "ggml-vulkan.cpp")
            if cuda is not None:
                root, runtime_dirs = cuda_toolkit.link_root(
                    cuda[1], work / "ggml" / "src" / "ggml-cuda", work
                )
                library_dirs += runtime_dirs
                environment["CUDACXX"] = str(cuda[0])
                options |= {"CUDAToolkit_ROOT": str(root), "GGML_CUDA_NCCL": "OFF"}
                if architectures := cuda_architectures or cuda_toolkit.local_architectures():
                    options["CMAKE_CUDA_ARCHITECTURES"] = architectures
            options |= _common_options(libs, library_dirs)
            configure = [cmake, "-S", str(work), "-B", str(work / "build"), *generator]
            configure += [f"-D{key}={value}" for key, value in options.items()]
            say(f"configuring {name}")
            _run(configure, log, log_path, environment)
            targets = [f"ggml-{name}"] + (["rpc-server"] if name == "rpc" else [])
            make = [cmake, "--build", str(work / "build"), "--config", "Release"]
            make += ["--parallel", str(jobs or _default_jobs(name)), "--target", *targets]
            _run(make, log, log_path, environment, lambda line: _report_step(line, name, say))
            made = {n: _find_result(work / "build", n, log_path) for n in _result_files(name)}
            if name == "rpc":
                _run([str(made[f"rpc-server{_EXE}"]), "--help"], log, log_path, environment)
            facts = {
                "name": name,
                "version": version,
                "library_dirs": [str(d) for d in library_dirs],
                "options": options,
                "seconds": round(time.monotonic() - started, 1),
            }
        record = folder / f"{name}.json"
        record.unlink(missing_ok=True)  # from here until the end the module counts as unfinished
        for file_name, path in made.items():
            path.replace(folder / file_name)
        (work / "record").write_text(json.dumps(facts, indent=1))
        (work / "record").replace(record)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder / _module_file(name)


def _common_options(libs: Path, library_dirs: Sequence[Path]) -> dict[str, str]:
    origin = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "BUILD_SHARED_LIBS": "ON",
        "GGML_BACKEND_DL": "ON",
        "GGML_CPU": "OFF",
        "GGML_NATIVE": "OFF",
        "GGML_BUILD_TESTS": "OFF",
        "GGML_BUILD_EXAMPLES": "OFF",
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
        "CMAKE_INSTALL_RPATH": ";".join([origin, *map(str, library_dirs)]),
        "TENSORTIER_GGML_LIBS": ";".join(str(_ggml_library(libs, n)) for n in ("ggml", "ggml-base")),
    }
    if sys.platform == "darwin":
        options |= {"GGML_METAL": "OFF", "GGML_BLAS": "OFF"}
    elif sys.platform != "win32":
        options |= {"CMAKE_MODULE_LINKER_FLAGS": "-Wl,-s", "CMAKE_EXE_LINKER_FLAGS": "-Wl,-s"}
    return options


def _ggml_library(libs: Path, name: str) -> Path:
    """What a program is linked to. On Linux the ``.so.0`` copy, whose name the other libraries ask for."""
    candidates = [f"lib{name}.so.0", f"lib{name}.dylib", f"{name}.lib", f"lib{name}.so"]
    for candidate in candidates:
        if (libs / candidate).exists():
            return libs / candidate
    raise BackendError(f"{libs} has no {name} library: reinstall {BINDINGS}")


def _default_jobs(name: str) -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    if name != "cuda":
        return cpus
    import psutil

    # nvcc takes up to about 2 GiB per file of ggml's attention kernels
    return max(1, min(cpus, int(psutil.virtual_memory().available // 2**31)))


def _result_files(name: str) -> list[str]:
    return [_module_file(name)] + ([f"rpc-server{_EXE}"] if name == "rpc" else [])


def _find_result(build_dir: Path, file_name: str, log_path: Path) -> Path:
    # CMake gives loadable modules of macOS the suffix .so; Visual Studio adds a folder per configuration.
    stem = Path(file_name).stem
    for path in sorted((build_dir / "bin").rglob("*")):
        if path.is_file() and path.stem in (stem, f"lib{stem}") and path.suffix in (_SUFFIX, ".so", _EXE):
            return path
    raise BackendError(f"the build ended without {file_name}: see {log_path}")


def _report_step(line: str, name: str, say: Callable[[str], None]) -> None:
    if match := re.match(r"\[\s*(\d+(?:/\d+|%))\]", line):
        say(f"compiling {name} {match[1]}")


# --- tools -----------------------------------------------------------------------------------------------


def _search_path() -> str:
    """PATH, and where `pip install cmake ninja` puts programs even if the environment is not activated."""
    here = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *here])


def _which(name: str) -> str | None:
    return shutil.which(name, path=_search_path())


def _build_tools() -> tuple[str, list[str]]:
    """CMake and the options that choose its generator."""
    cmake, ninja, make = _which("cmake"), _which("ninja"), _which("make")
    if cmake is None:
        raise BackendError("CMake is needed to compile a backend: run `pip install cmake ninja`")
    if sys.platform == "win32":
        return cmake, ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja and _which("cl") else []
    if _cxx() is None:
        raise BackendError("a C++ compiler is needed to compile a backend: `apt install g++`, or set CXX")
    if ninja:
        return cmake, ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if make:
        return cmake, ["-G", "Unix Makefiles"]
    raise BackendError("Ninja or make is needed to compile a backend: run `pip install ninja`")


def _cxx() -> str | None:
    chosen = os.environ.get("CXX")
    return (
        _which(chosen) if chosen else next((c for n in ("c++", "g++", "clang++") if (c := _which(n))), None)
    )


def _run(
    argv: Sequence[str],
    log: IO[str],
    log_path: Path,
    environment: Mapping[str, str],
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Run a program with its output in the log. It does not outlive an exception here (Ctrl-C)."""
    log.write(f"$ {subprocess.list2cmdline(argv)}\n")
    log.flush()
    first_error = ""
    with _process(argv, environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if not first_error and re.search(r"\berror\b|CMake Error", line, re.IGNORECASE):
                first_error = line.strip()
            if on_line:
                on_line(line)
        code = process.wait()
    log.flush()
    if code != 0:
        what = f": {first_error}" if first_error else ""
        raise BackendError(f"{Path(argv[0]).name} failed with code {code}{what} (full log: {log_path})")


@contextmanager
def _process(argv: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        argv,
        env={**environment, "PATH": _search_path()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            if sys.platform == "win32":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


# --- source ----------------------------------------------------------------------------------------------


def _download(version: str, folder: Path, log: IO[str], log_path: Path) -> Path:
    """The source distribution through pip, with the index and proxy the user has set up for it."""
    kept = folder / "source"
    if found := sorted(kept.glob("llama_cpp_python-*.tar.gz")):
        return found[0]
    if importlib.util.find_spec("pip") is None:
        raise BackendError(
            f"pip is needed to download the source: run `{sys.executable} -m ensurepip`, or give --source"
        )
    partial = folder / ".source"
    shutil.rmtree(partial, ignore_errors=True)
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    argv += ["--disable-pip-version-check", "--dest", str(partial), f"{BINDINGS}=={version}"]
    try:
        _run(argv, log, log_path, os.environ)
        shutil.rmtree(kept, ignore_errors=True)
        try:
            partial.replace(kept)
        except OSError:  # another backend's build was faster
            if not kept.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if found := sorted(kept.glob("llama_cpp_python-*.tar.gz")):
        return found[0]
    raise BackendError(f"pip downloaded no source distribution of {BINDINGS} {version}: see {log_path}")


def _unpack(source: Path, version: str, work: Path) -> None:
    """Bring ggml and the RPC server of ``source`` into ``work``, after checking that it is that version."""
    inner = "vendor/llama.cpp/"
    wanted = {f"{inner}tools/rpc/rpc-server.cpp": "rpc-server.cpp"}
    try:
        if source.is_dir():
            information = (source / "PKG-INFO").read_text()
            shutil.copytree(source / inner / "ggml", work / "ggml")
            for member, target in wanted.items():
                shutil.copyfile(source / member, work / target)
        else:
            with tarfile.open(source) as archive:
                information = ""
                for item in archive:
                    member = item.name.partition("/")[2]
                    if member == "PKG-INFO" and (stream := archive.extractfile(item)):
                        information = stream.read().decode()
                    elif member in wanted or member.startswith(f"{inner}ggml/"):
                        item.name = wanted.get(member, member.removeprefix(inner))
                        archive.extract(item, work, filter="data")
    except (OSError, EOFError, tarfile.TarError, UnicodeDecodeError) as exc:
        shutil.rmtree(work / "ggml", ignore_errors=True)
        raise BackendError(f"{source} is not the source distribution of {BINDINGS}: {exc}") from exc
    found = re.search(r"^Version: (.+)$", information, re.MULTILINE)
    if found is None or found[1].strip() != version:
        what = found[1].strip() if found else "no known version"
        raise BackendError(f"{source} is {BINDINGS} {what}, but {version} is installed: they must be equal")
    if not (work / "ggml" / "CMakeLists.txt").is_file() or not (work / "rpc-server.cpp").is_file():
        raise BackendError(f"{source} lacks {inner}ggml: take the source distribution, not a wheel")
    (work / "CMakeLists.txt").write_text(_CMAKE_LISTS)
    (work / "ggml" / "ggml.pc.in").touch()  # missing in the distribution, read by ggml's build files


# --- Vulkan ----------------------------------------------------------------------------------------------


def _check_vulkan(work: Path) -> None:
    """Name what is missing before minutes are spent."""
    sdk = os.environ.get("VULKAN_SDK")
    missing = [] if _which("glslc") or (sdk and (Path(sdk) / "bin").is_dir()) else ["glslc"]
    compiler = _cxx()
    if compiler and sys.platform != "win32":
        include = [f"-I{sdk}/include"] if sdk else []
        checks = [
            ("libvulkan-dev", ["-fsyntax-only", *include, "-include", "vulkan/vulkan.hpp"]),
            ("libvulkan-dev", ["-shared", "-fPIC", *([f"-L{sdk}/lib"] if sdk else [])]),
            ("spirv-headers", ["-fsyntax-only", *include, "-include", "spirv/unified1/spirv.hpp"]),
        ]
        for package, flags in checks:
            argv = [compiler, *flags, "-x", "c++", os.devnull, "-o", str(work / "check")]
            argv += ["-lvulkan"] if "-shared" in flags else []
            if subprocess.run(argv, capture_output=True, check=False).returncode and package not in missing:
                missing.append(package)
    if missing:
        raise BackendError(
            f"the Vulkan backend needs {', '.join(missing)} (Debian's names): "
            f"run `apt install {' '.join(missing)}`, or install the Vulkan SDK and set VULKAN_SDK"
        )


def _patch_vulkan(path: Path) -> None:
    text = path.read_text()
    first, last, plain = _VULKAN_BLOCK
    begin = text.find(first)
    end = text.find(last, begin) + len(last)
    if begin < 0 or end < begin + len(last):
        raise BackendError(f"{path.name} is not the file this version of tensortier knows: update tensortier")
    block = text[begin:end]
    path.write_text(f"{text[:begin]}#ifdef VK_EXT_layer_settings\n{block}#else\n{plain}#endif\n{text[end:]}")
