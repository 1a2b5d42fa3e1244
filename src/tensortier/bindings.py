"""The installed llama-cpp-python, without importing it: its version, and where its libraries are."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from tensortier.errors import BackendError

BINDINGS = "llama-cpp-python"


def bindings_version() -> str:
    """Version of the installed bindings. Raises BackendError when there are none."""
    try:
        return importlib.metadata.version(BINDINGS)
    except importlib.metadata.PackageNotFoundError as exc:
        raise BackendError(f"{BINDINGS} is not installed: run `pip install {BINDINGS}`") from exc


def library_dir() -> Path:
    """Folder of the shared libraries that the installed bindings load. Found without importing them."""
    spec = importlib.util.find_spec("llama_cpp")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (folder := Path(location) / "lib").is_dir():
            return folder
    raise BackendError(f"{BINDINGS} has no folder of libraries: reinstall it with `pip install {BINDINGS}`")
