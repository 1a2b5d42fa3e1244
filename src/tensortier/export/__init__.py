"""Plans in the terms of other engines: ``export(plan, model, "llama-server")``.

What an engine cannot be told is never dropped in silence: ``Export.lost`` says it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from tensortier.errors import UsageError
from tensortier.export import (
    common,
    ik_llama,
    koboldcpp,
    llama_cpp,
    llama_cpp_python,
    lm_studio,
    ollama,
    quoting,
)
from tensortier.types import Export, ModelInfo, Plan

_TARGETS: dict[str, tuple[str, Callable[[Plan, ModelInfo], Export]]] = {
    "llama-server": ("llama.cpp's server", llama_cpp.server),
    "llama-cli": ("llama.cpp in the terminal", llama_cpp.cli),
    "llama-bench": ("llama.cpp's benchmark", llama_cpp.bench),
    "ik_llama.cpp": ("the server of the fork ik_llama.cpp", ik_llama.export),
    "koboldcpp": ("a command and a .kcpps file", koboldcpp.export),
    "llama-cpp-python": ("a Python program", llama_cpp_python.export),
    "ollama": ("a Modelfile; whole layers only", ollama.export),
    "lm-studio": ("load settings; whole layers or experts only", lm_studio.export),
}
TARGETS: Mapping[str, str] = MappingProxyType({name: text for name, (text, _) in _TARGETS.items()})


def export(plan: Plan, model: ModelInfo, target: str) -> Export:
    """The plan for an engine of ``TARGETS``.

    Raises:
        UsageError: there is no such target (the message names the nearest).
        PlanError: the plan is of a kind the engine refuses, or contradicts itself.
        PatternError: an override of the plan is no regular expression.
    """
    if target not in _TARGETS:
        raise unknown(target)
    in_memory, drive = common.without_drive(plan, model)
    made = _TARGETS[target][1](in_memory, model)
    return dataclasses.replace(made, lost=(*drive, *made.lost))


def unknown(target: str) -> UsageError:
    """The error for a name that is not in ``TARGETS``; it names the nearest."""
    near = difflib.get_close_matches(target.lower(), _TARGETS, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}? " if near else ""
    return UsageError(f"unknown target {target!r}: {hint}there are: {', '.join(_TARGETS)}")


def render(exported: Export, shell: str = "posix") -> str:
    """An export to read and to paste: the command quoted for ``shell`` ("posix", "powershell" or "cmd"), the
    files, and what is lost."""
    parts = [f"# {exported.target}: {TARGETS[exported.target]}"]
    if exported.argv:
        parts.append(quoting.quote(exported.argv, shell))
    for name, content in exported.files.items():
        parts += [f"\n# file {name}", content.rstrip("\n")]
    if exported.lost:
        parts.append("\n# what the plan says and this does not:")
        parts += [f"# - {sentence}" for sentence in exported.lost]
    return "\n".join(parts) + "\n"
