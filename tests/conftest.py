"""Models for the tests, built once and kept in ``.cache/models``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["tests.backend_fixtures"]

CACHE = Path(__file__).parent.parent / ".cache" / "models"


def _cached(name: str, build: Callable[[Path], Path]) -> Path:
    path = CACHE / f"{name}.gguf"
    return path if path.exists() else build(path)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1, a real model of 98 MB."""
    from tests.models import smollm2

    return smollm2.path()


@pytest.fixture(scope="session")
def moe_path() -> Path:
    """SmolLM2 as a mixture of 8 experts, 2 used: real weights, real routing."""
    from tests.models import moe

    return _cached(f"smollm2-moe-{moe.VERSION}", moe.build)


@pytest.fixture(scope="session")
def skeleton() -> Callable[[str], Path]:
    """``skeleton(name)`` is a sparse file with the shapes of a well-known model (``skeletons.NAMES``)."""
    from tests.models import skeletons

    def make(name: str) -> Path:
        return _cached(f"skeleton-{name}-{skeletons.VERSION}", lambda path: skeletons.build(name, path))

    return make


@pytest.fixture(scope="session")
def synthetic() -> Callable[..., Path]:
    """``synthetic(**options)`` is a model with random weights; the options are those of ``Synthetic``."""
    from tests.models import synthetic as module

    def make(**options: Any) -> Path:
        model = module.Synthetic(**options)
        return _cached(f"synthetic-{model.key()}", lambda path: module.build(model, path))

    return make


@pytest.fixture(scope="session")
def tiny_path(synthetic: Callable[..., Path]) -> Path:
    """Two dense layers of F16 with SmolLM2's tokenizer, 14 MB: loads in a moment, backends agree closely."""
    from tests.models import synthetic as module

    return synthetic(**module.TINY)
