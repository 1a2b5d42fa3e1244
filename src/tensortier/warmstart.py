"""Which experts stayed in RAM when a model was last closed: a small file in the cache, safe to delete.

It is never trusted: a file that is of another model, damaged, or names what the model does not have is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tensortier import paths, planid
from tensortier.types import ModelInfo

_VERSION = 1
_MOST_BYTES = 16 << 20  # of the file: ids of a hundred times the experts that the largest models have

Expert = tuple[int, int]  # layer's number among those with experts, expert


def file_of(model: ModelInfo) -> Path:
    """Where the file of a model is, whether it exists or not."""
    digest = hashlib.sha256(planid.of_model(model).encode()).hexdigest()
    return paths.cache_dir() / "warm-start" / f"{digest[:32]}.json"


def read(model: ModelInfo, shape: tuple[int, int]) -> list[Expert]:
    """The experts that were kept, likeliest last; none where there is no such file, or a damaged one.

    Args:
        shape: layers with experts, and the most experts that one has.
    """
    path = file_of(model)
    try:
        if path.stat().st_size > _MOST_BYTES:
            return []
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(data, dict) or data.get("tensortier_warm_start") != _VERSION:
        return []
    if data.get("model") != planid.of_model(model) or data.get("shape") != list(shape):
        return []
    pairs = data.get("experts")
    if not isinstance(pairs, list) or not all(_is_expert(pair, shape) for pair in pairs):
        return []
    found = [(group, expert) for group, expert in pairs]
    return found if len(set(found)) == len(found) else []


def _is_expert(pair: object, shape: tuple[int, int]) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(number) is int and 0 <= number < most for number, most in zip(pair, shape, strict=True))
    )


def write(model: ModelInfo, shape: tuple[int, int], experts: Sequence[Expert]) -> bool:
    """Keeps ``experts``, likeliest last, for the next time. False where the cache cannot be written, which costs
    nothing but that."""
    path = file_of(model)
    data = {
        "tensortier_warm_start": _VERSION,
        "model": planid.of_model(model),
        "shape": shape,
        "experts": experts,
    }
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # under a name of its own first: another process may read it, or write it too
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "w") as file:
            json.dump(data, file, separators=(",", ":"))
        Path(temporary).replace(path)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
        return False
    return True
