"""Where tensortier keeps files of its own: everything under one cache folder that is safe to delete."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tensortier.errors import UsageError


def home() -> Path:
    """The user's home folder. Raises UsageError where there is none, as for a user that the system does not
    know."""
    try:
        return Path.home()
    except RuntimeError as exc:
        raise UsageError("the home folder of this user is unknown: set the variable HOME") from exc


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/tensortier`` (Linux), ``~/Library/Caches/tensortier`` (macOS) or
    ``%LOCALAPPDATA%/tensortier/Cache`` (Windows). Not created here."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else home() / "AppData" / "Local") / "tensortier" / "Cache"
    if sys.platform == "darwin":
        return home() / "Library" / "Caches" / "tensortier"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else home() / ".cache") / "tensortier"
