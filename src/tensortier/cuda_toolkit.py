"""Find what compiles ggml's CUDA module: nvcc, cuBLAS, and something to link where no driver is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tensortier.errors import BackendError

# cuMemMap( but not cuBLAS( and not a type: what ggml calls of the driver's interface
_DRIVER_CALL = re.compile(r"\b(cu(?:Ctx|Device|Driver|Event|Func|Get|Init|Launch|Mem|Module|Stream)\w*)\s*\(")


def find() -> tuple[Path, Path]:
    """(nvcc, the root of its toolkit). Looked for in CUDACXX, PATH, /usr/local/cuda*, Python packages."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    candidates += [
        str(p) for p in sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), key=_version_key, reverse=True)
    ]
    candidates += [
        str(p) for folder in _nvidia_packages() for p in folder.glob("*/bin/nvcc*") if p.stem == "nvcc"
    ]
    for candidate in candidates:
        if candidate and (nvcc := shutil.which(candidate)):
            return Path(nvcc), _root(Path(nvcc))
    raise BackendError(
        "the CUDA backend needs NVIDIA's compiler: install the CUDA toolkit, "
        "and set CUDACXX if its nvcc is not in PATH"
    )


def link_root(root: Path, source: Path, work: Path) -> tuple[Path, list[Path]]:
    """A toolkit root that has everything, and the folders of the runtime libraries it links to.

    ``root`` itself when it is complete; otherwise a folder of links in ``work`` to it, to cuBLAS from the
    Python package, and to a stand-in for the driver's library that defines the calls in ``source`` (ggml's
    CUDA folder). The stand-in serves the linker only: the module asks for the real one when it is loaded.
    """
    libs = next((d for n in ("lib64", "lib") if (d := root / n).is_dir()), root / "lib64")
    if sys.platform == "win32":
        return root, []
    cublas = _cublas(root, libs)
    driver = next((p for p in _driver_candidates(root, libs) if p.exists()), None)
    if cublas == (root / "include", libs) and driver is not None:
        return root, [libs]
    made = work / "cuda"
    stubs = made / "lib64" / "stubs"
    stubs.mkdir(parents=True)
    for name in ("bin", "nvvm", "targets"):
        if (root / name).exists():
            (made / name).symlink_to(root / name)
    _link_all([root / "include", cublas[0]], made / "include")
    _link_all([libs, cublas[1]], made / "lib64")
    (made / "lib").symlink_to("lib64")
    for library in ("cublas", "cublasLt", "cudart"):
        target = made / "lib64" / f"lib{library}.so"
        if not target.exists():  # Python packages have the versioned name only
            versioned = sorted((made / "lib64").glob(f"lib{library}.so.*"))
            if not versioned:
                raise BackendError(f"the CUDA toolkit in {root} has no lib{library}: install it completely")
            target.symlink_to(versioned[0].name)
    if driver is not None:
        (stubs / "libcuda.so").symlink_to(driver)
    else:
        _make_driver_stub(source, stubs / "libcuda.so", work)
    return made, list(dict.fromkeys([libs, cublas[1]]))


def local_architectures() -> str | None:
    """The cards of this machine as CMAKE_CUDA_ARCHITECTURES takes them, or None where there are none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None  # no driver, or no card: the caller builds for many
    try:
        found = set()
        for index in range(pynvml.nvmlDeviceGetCount()):
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(index))
            found.add(10 * major + minor)
    except pynvml.NVMLError as exc:
        raise BackendError(
            f"the driver does not say what the cards are ({exc}): give --cuda-architectures"
        ) from exc
    finally:
        pynvml.nvmlShutdown()
    return ";".join(f"{a}-real" for a in sorted(found)) or None


def _version_key(path: Path) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", path.parent.parent.name))


def _nvidia_packages() -> list[Path]:
    return [d for entry in sys.path if entry and (d := Path(entry) / "nvidia").is_dir()]


def _root(nvcc: Path) -> Path:
    """nvcc says where its toolkit is, which also sees through wrapper scripts."""
    answer = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    match = re.search(r"^#\$ TOP=(.*)$", answer.stderr, re.MULTILINE)
    if match is None:
        raise BackendError(
            f"{nvcc} does not say where its toolkit is: set CUDACXX to the nvcc of a CUDA toolkit"
        )
    return Path(match[1].strip()).resolve()


def _toolkit_version(root: Path) -> tuple[int, int]:
    try:
        text = (root / "include" / "cuda.h").read_text(errors="replace")
    except OSError as exc:
        raise BackendError(f"the CUDA toolkit in {root} has no headers: install it completely") from exc
    match = re.search(r"^#define CUDA_VERSION (\d+)$", text, re.MULTILINE)
    if match is None:
        raise BackendError(f"the CUDA toolkit in {root} does not say its version: install it again")
    number = int(match[1])
    return number // 1000, number % 1000 // 10


def _cublas(root: Path, libs: Path) -> tuple[Path, Path]:
    """(headers, libraries) of cuBLAS."""
    if (root / "include" / "cublas_v2.h").exists() and any(libs.glob("libcublas.so*")):
        return root / "include", libs
    major, minor = _toolkit_version(root)
    for folder in _nvidia_packages():
        for home in (folder / f"cu{major}", folder / "cublas"):
            if (home / "include" / "cublas_v2.h").exists() and (
                home / "lib" / f"libcublas.so.{major}"
            ).exists():
                return home / "include", home / "lib"
    package = f"nvidia-cublas=={major}.{minor}.*" if major >= 13 else f"nvidia-cublas-cu{major}"
    raise BackendError(f"the CUDA toolkit in {root} has no cuBLAS: run `pip install '{package}'`")


def _driver_candidates(root: Path, libs: Path) -> list[Path]:
    system = [Path(d) / "libcuda.so" for d in ("/usr/lib64", "/usr/lib", "/usr/lib/wsl/lib")]
    system += sorted(Path("/usr/lib").glob("*-linux-gnu/libcuda.so"))
    return [libs / "stubs" / "libcuda.so", root / "lib" / "stubs" / "libcuda.so", *system]


def _link_all(folders: list[Path], target: Path) -> None:
    target.mkdir(exist_ok=True)
    for folder in folders:
        for item in folder.iterdir():
            if not (target / item.name).exists():
                (target / item.name).symlink_to(item)


def _make_driver_stub(source: Path, target: Path, work: Path) -> None:
    names = set()
    for path in [*source.rglob("*.cu"), *source.rglob("*.cuh"), *source.rglob("*.h")]:
        names |= set(_DRIVER_CALL.findall(path.read_text(errors="replace")))
    # cuda.h renames some calls to their second version
    lines = [f"int {n}{version}(void) {{ return 999; }}" for n in sorted(names) for version in ("", "_v2")]
    code = work / "libcuda.c"
    code.write_text("\n".join(lines) + "\n")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BackendError("a C compiler is needed to compile a backend: `apt install gcc`, or set CC")
    argv = [compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", str(code), "-o", str(target)]
    answer = subprocess.run(argv, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise BackendError(f"{compiler} could not make a stand-in for libcuda: {answer.stderr.strip()[:200]}")
