"""Where tensortier keeps files of its own: everything under one cache folder that is safe to delete."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/tensortier`` (Linux), ``~/Library/Caches/tensortier`` (macOS) or
    ``%LOCALAPPDATA%/tensortier/Cache`` (Windows). Not created here."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "tensortier" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tensortier"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tensortier"
