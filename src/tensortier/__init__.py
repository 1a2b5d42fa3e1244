"""tensortier: run a language model that is bigger than your memory, as fast as your machine allows.

::

    from tensortier import Engine, gguf, hardware, planner, Settings

    model = gguf.read("model.gguf")
    plan = planner.plan(model, hardware.probe(), Settings())
    with Engine(plan) as engine:
        for piece in engine.chat([{"role": "user", "content": "Hello"}]):
            print(piece.text, end="")

Nothing heavy is imported before it is used: the names below are loaded on first access.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensortier.engine import Engine
    from tensortier.errors import TensortierError
    from tensortier.types import ModelInfo, Placement, Plan, Sampling, Settings

__version__ = "0.1.0"

_HOME = {
    "Engine": "engine",
    "ModelInfo": "types",
    "Placement": "types",
    "Plan": "types",
    "Sampling": "types",
    "Settings": "types",
    "TensortierError": "errors",
}

__all__ = [
    "Engine",
    "ModelInfo",
    "Placement",
    "Plan",
    "Sampling",
    "Settings",
    "TensortierError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"tensortier.{_HOME[name]}"), name)
    raise AttributeError(f"module 'tensortier' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
