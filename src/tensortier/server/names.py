"""What the models that are served are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tensortier import library
from tensortier.library import LibraryModel


def named(models: Sequence[LibraryModel], name: str) -> LibraryModel | None:
    wanted = name.casefold().removesuffix(".gguf")
    return next((m for m in models if m.name.casefold().removesuffix(".gguf") == wanted), None)


def unique(models: Sequence[LibraryModel]) -> list[LibraryModel]:
    """Of models of one name the second is called "name@2", and so on."""
    counts: dict[str, int] = {}
    found = []
    for model in models:
        number = counts[model.name.casefold()] = counts.get(model.name.casefold(), 0) + 1
        found.append(model if number == 1 else replace(model, name=f"{model.name}@{number}"))
    return found


def served_model(name_or_path: str) -> LibraryModel:
    """What ``library.find`` finds, which need not be in a model folder. Raises ModelNotFound, ModelFileError."""
    from tensortier import gguf

    path = library.find(name_or_path)
    for model in library.list_models():
        if Path(model.path) == Path(path):
            return model
    info = gguf.read(path)
    name = Path(path).name.removesuffix(".gguf")
    return LibraryModel(
        name, path, sum(info.file_sizes), info.architecture, info.quantization, "command line"
    )
