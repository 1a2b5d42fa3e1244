"""The layout's promises: import directions, what stays light, who touches ctypes, the public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tensortier

SOURCE = (
    Path(tensortier.__file__).parent if (Path(tensortier.__file__).parent / "types.py").exists() else None
)
PACKAGE = SOURCE or Path(__file__).parents[2] / "src" / "tensortier"

# What each module may import of the package, besides itself. Lower rows may use higher ones, never back.
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "paths": {"errors"},
    "turn": {"errors", "paths"},
    "catalogue": {"types", "errors"},
    "system": {"types"},
    "patterns": {"errors"},
    "web": {"errors"},
    "gguf": {"types", "errors", "web"},
    "inspect": {"types", "errors", "gguf", "patterns"},
    "cuda_toolkit": {"errors", "paths"},
    "bindings": {"errors"},
    "backends": {"errors", "paths", "cuda_toolkit", "bindings"},
    "hardware": {"types", "errors", "system"},
    "library": {"types", "errors", "paths", "gguf", "hub"},
    "hub": {"errors", "web", "explain"},
    "modelfiles": {"errors", "paths"},
    "upkeep": {"errors", "gguf", "hub", "library", "modelfiles"},
    "transfer": {"errors", "web", "hub", "modelfiles", "explain"},
    "downloads": {"errors", "hub", "transfer"},
    "formulas": {"types"},
    "calibrate": {"types", "errors", "paths", "gguf", "tier", "_llama"},
    "placement": {"types", "errors", "patterns"},
    "workloads": {"types", "errors"},
    "rates": {"types", "calibrate", "gguf", "pageable"},
    "mapped": {"types"},
    "cost": {"types", "formulas", "placement", "rates", "pageable", "mapped"},
    "planfile": {"types", "errors"},
    "planid": {"types", "errors"},
    "explain": {"types"},
    "memory": {"types", "errors", "planfile", "placement", "formulas"},
    "overrides": {"types"},
    "export": {"types", "errors", "patterns", "placement", "overrides", "pageable"},
    "optimizer": {"types", "errors", "formulas", "placement", "overrides", "cost"},
    "fit": {"types", "memory", "overrides", "placement"},
    "candidates": {"types", "memory", "overrides", "placement", "fit"},
    "budget": {"types", "placement", "rates"},
    "search": {"types", "memory", "formulas", "rates", "cost", "budget", "optimizer", "candidates"},
    "reasons": {"types", "placement", "formulas", "budget", "candidates", "search", "pageable", "mapped"},
    "planner": {
        *("types", "errors", "placement", "memory", "rates", "budget", "candidates", "search", "reasons"),
        "paging",
    },
    "levels": {
        *("types", "placement", "rates", "cost", "budget", "optimizer", "candidates", "search"),
        *("paging", "memory"),
    },
    "gains": {"types", "rates", "cost", "budget", "search", "paging"},
    "measuring": {"types", "errors", "calibrate", "catalogue", "placement", "rates"},
    "deciding": {
        *("types", "errors", "explain", "gguf", "library", "hardware", "formulas", "workloads", "placement"),
        *("rates", "memory", "measuring", "planner", "planid", "paging", "routing", "simulate"),
        *("budget", "pageable"),
    },
    "_llama": {"types", "errors", "backends", "placement", "planfile"},
    "pageable": {"types"},
    "scratch": {"types", "pageable"},
    "paging": {"types", "placement", "overrides", "rates", "cost", "pageable", "slots", "scratch"},
    "tier": {"types", "errors", "gguf", "placement", "pageable", "routing", "warmstart", "_llama"},
    "warmstart": {"types", "paths", "planid"},
    "slots": {"types", "errors", "pageable"},
    "routing": {"types", "errors", "planid"},
    "simulate": {"errors", "tier", "routing"},
    "textstream": set(),
    "toolcalls": {"types"},
    "prompts": {"errors", "toolcalls"},
    "request": {"types", "errors", "_llama", "textstream", "toolcalls"},
    "scheduler": {"types", "errors", "_llama", "request"},
    "engine": {
        *("types", "errors", "_llama", "pageable", "tier", "request", "scheduler", "prompts", "textstream"),
        "toolcalls",
    },
    "chat": {"types", "errors"},
    "server": {
        *("types", "errors", "paths", "gguf", "library", "hardware", "catalogue", "formulas", "workloads"),
        *("placement", "pageable", "paging", "rates", "cost", "memory", "measuring", "budget", "optimizer"),
        *("candidates", "search", "reasons", "planner", "planfile", "planid", "levels", "gains", "explain"),
        *("export", "overrides", "deciding", "downloads", "hub", "engine", "tier", "calibrate", "system"),
        *("modelfiles", "turn"),
    },
}


def modules() -> dict[str, list[Path]]:
    """Top-level names of the package -> their files."""
    found: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.setdefault(top, []).append(path)
    return found


def imports_of(path: Path) -> set[str]:
    """Names of the package that a file imports at any depth, type-checking imports included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports would escape this check"
            names = [node.module] + [f"{node.module}.{a.name}" for a in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("tensortier.")}
    return found & set(modules())


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_imports_point_one_way(name: str) -> None:
    for path in modules()[name]:
        extra = imports_of(path) - ALLOWED[name] - {name}
        assert not extra, f"{path.name} imports {sorted(extra)}"


def test_every_module_has_a_place() -> None:
    assert set(modules()) == set(ALLOWED) | {"__init__", "__main__", "cli"}


def imports_ctypes(path: Path) -> bool:
    names = [
        name
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    return any(name.split(".")[0] == "ctypes" for name in names)


def test_only_the_border_touches_ctypes() -> None:
    users = {top for top, paths in modules().items() for path in paths if imports_ctypes(path)}
    assert users == {"_llama", "tier"}


PLANNING = [
    "types",
    "errors",
    "gguf",
    "inspect",
    "hardware",
    "catalogue",
    "library",
    "placement",
    "memory",
    "optimizer",
    "levels",
    "gains",
    "workloads",
    "rates",
    "cost",
    "planner",
    "planfile",
    "planid",
    "explain",
    "export",
]


def test_planning_loads_no_native_library() -> None:
    code = "import sys\n" + "".join(f"import tensortier.{m}\n" for m in PLANNING)
    code += "print([m for m in ('ctypes', 'llama_cpp', 'numpy') if m in sys.modules])"
    # compared with a bare interpreter, where site customisation may have loaded some of it already
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = result.stdout.strip()
    baseline = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; print([m for m in ('ctypes', 'llama_cpp', 'numpy') if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert loaded == baseline


def test_public_names() -> None:
    assert tensortier.__all__ == [
        "Engine",
        "ModelInfo",
        "Placement",
        "Plan",
        "Sampling",
        "Settings",
        "TensortierError",
        "__version__",
    ]
    for name in tensortier.__all__:
        assert getattr(tensortier, name) is not None
