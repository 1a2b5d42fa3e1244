"""Models for the tests, built once and kept in ``.cache/models``, and what must not differ between machines."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tensortier import paths
from tests import calibrations

pytest_plugins = ["tests.backend_fixtures"]

CACHE = Path(__file__).parent.parent / ".cache" / "models"

# The same examples every time, and none refused because a busy machine was slow to make it or to run it.
# ``--hypothesis-profile=explore`` looks for new ones.
_UNTIMED = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("same", derandomize=True, database=None, **_UNTIMED)
hypothesis.settings.register_profile("explore", derandomize=False, **_UNTIMED)
hypothesis.settings.load_profile("same")

# What a shell or a CI service may have set, and what would change what is printed, asked or found
for _name in (
    *("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"),
    *("GITHUB_ACTIONS", "COLUMNS", "LINES"),
    *("HF_ENDPOINT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TENSORTIER_MODELS"),
):
    os.environ.pop(_name, None)
os.environ["HF_TOKEN_PATH"] = str(CACHE.parent / "no-token")  # nobody is logged in
# What this machine's user measured, served and traced before is nothing to go by, and gets nothing added; backends
# that were built are used, and pip keeps its downloads where it always does.
_kept = paths.cache_dir().parent
_cache = tempfile.TemporaryDirectory(prefix="tensortier-tests-", ignore_cleanup_errors=True)
os.environ.setdefault("PIP_CACHE_DIR", str(_kept / "pip"))
os.environ.update(calibrations.environment(Path(_cache.name)))
# the servers of the tests are on loopback; pip may need the proxy for the rest
_direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{_direct},127.0.0.1,localhost".lstrip(",")


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
