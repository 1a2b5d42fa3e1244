"""The model of most tests of the plug-in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def path(synthetic: Callable[..., Path]) -> Path:
    """A small mixture with shared experts, so that some weights from the drive are experts and some are whole."""
    return synthetic(arch="qwen2moe", layers=2, experts=8, used=2, shared=256, qtype="Q4_K")
