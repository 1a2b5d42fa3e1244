"""Roles of tensor names, against the list in tests/golden and the names inside the bundled libllama."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tensortier.gguf.roles import role_and_layer
from tensortier.types import Role

GOLDEN = Path(__file__).parent.parent / "golden" / "tensor_names.txt"


def _golden() -> dict[str, Role]:
    names: dict[str, Role] = {}
    role = Role.OTHER
    for line in GOLDEN.read_text().splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            role = Role(heading[1])
        elif line and not line.startswith("#"):
            assert line not in names, line
            names[line] = role
    return names


def test_every_name_has_its_role() -> None:
    for pattern, role in _golden().items():
        name = pattern.replace("%d", "17", 1).replace("%d", "3")
        layer = 17 if "%d" in pattern else None
        for suffix in ("", ".weight", ".bias", ".scale", ".input_scale"):
            assert role_and_layer(name + suffix) == (role, layer), name + suffix


def test_the_list_is_complete() -> None:
    """Every block tensor that the bundled llama.cpp can name is in the golden file, and nothing else is."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    library = (Path(spec.origin).parent / "lib" / "libllama.so").read_bytes()
    found = re.findall(
        rb"(?<=\0)((?:(?:enc|dec)\.)?(?:blk|posnet|convnext)\.%d\.[a-z0-9_.%]+)(?=\0)", library
    )
    golden = set(_golden())
    assert len(found) > 200
    assert {f.decode() for f in found} <= golden
    # The linker stores "blk.%d.attn_q" as the tail of "dec.blk.%d.attn_q".
    for name in golden:
        assert name.encode() + b"\0" in library, name


@pytest.mark.parametrize(
    "name", ["", "blk", "blk.x.attn_q.weight", "blk.99999.attn_q.weight", "mm.0.weight", "..."]
)
def test_unknown_names_are_other(name: str) -> None:
    assert role_and_layer(name) == (Role.OTHER, None)
