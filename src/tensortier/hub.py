"""Models on the Hugging Face hub: search, the GGUF files of a repository, and what a reference to one means.

Two calls of the hub's API are used, ``/api/models`` and ``/api/models/{repo}``, at the address in
``HF_ENDPOINT``; what they answer is described in https://huggingface.co/docs/hub/api.
"""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit

from tensortier import web
from tensortier.errors import RemoteError, UsageError
from tensortier.explain import readable_size

MAX_ANSWER = 1 << 25  # bytes; the longest list of files is a few MB
MAX_SEARCH = 100
_AT_ONCE = 8  # requests
_PATIENCE = 3  # attempts when the hub is busy
_LONGEST_WAIT = 60.0  # seconds between them
PAUSE = 5.0  # seconds, where a busy server does not say how long

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})$")
# Q4_K_M, IQ2_XXS, UD-Q4_K_XL, BF16, MXFP4_MOE, TQ1_0 ... between separators, as uploaders write them
_LABEL = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?I?Q[1-8](?:_[A-Z0-9]+)*|TQ[12]_0|(?:MX|NV)FP4(?:_MOE)?|BF16|F[PX]?(?:16|32))"
    r"(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_OURS = re.compile(r"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)", re.IGNORECASE)


@dataclass(frozen=True)
class HubFile:
    """A GGUF file of a repository. At least one of the two digests is known where the hub stores it at all."""

    name: str  # path inside of the repository, with "/"; not to be trusted as a path here
    size: int  # bytes
    sha256: str | None  # of the content; known for files in large file storage
    git_oid: str | None = None  # git's SHA-1 of the content, for files that are not


@dataclass(frozen=True)
class HubModel:
    """A repository. ``error`` says why nothing is known of its files."""

    repo: str  # "owner/name"
    downloads: int  # of the last 30 days
    likes: int
    files: tuple[HubFile, ...]  # its GGUF files
    revision: str = "main"  # a commit, where the hub told it
    gated: bool = False  # its terms have to be accepted first
    error: str = ""


@dataclass(frozen=True)
class Choice:
    """One model of a repository: a file, or all parts of a split one."""

    name: str  # without folder, part number and ".gguf"
    quantization: str  # "Q4_K_M" as its name says; "" where it does not
    files: tuple[HubFile, ...]  # in order
    missing: int = 0  # parts that the repository does not have

    @property
    def size(self) -> int:
        return sum(f.size for f in self.files)


@dataclass(frozen=True)
class Reference:
    """What a person wrote: ``wanted`` is a quantization or a file's name, None when left open."""

    repo: str
    revision: str = "main"
    wanted: str | None = None


def parse(text: str) -> Reference:
    """``owner/repo``, ``owner/repo:QUANT``, ``owner/repo/file.gguf`` or the address of one of the hub's pages.
    ``hf://`` may stand before it, ``@revision`` behind the repository. Raises UsageError."""
    rest = _OURS.sub("", text.strip(), count=1)
    example = "give owner/repo, owner/repo:Q4_K_M or hf://owner/repo/file.gguf"
    parts = rest.split("/", 2)
    if "://" in rest or len(parts) < 2:
        raise UsageError(f"{text!r} is no model of the hub: {example}")
    owner, name, path = parts[0], parts[1], parts[2] if len(parts) > 2 else None
    revision = "main"
    if _OURS.match(text.strip()) and path and (page := re.fullmatch(r"(blob|resolve|tree)/(.*)", path)):
        revision, _, path = urlsplit(page[2]).path.partition("/")
        revision, path = unquote(revision), unquote(path) or None
    wanted = path
    if path is None or path == "":
        name, colon, wanted = name.partition(":")
        if colon and not wanted:
            raise UsageError(f"{text!r} ends where a quantization should follow: {example}")
        wanted = wanted or None
    name, at, given = name.partition("@")
    if at:
        revision = given
        if wanted is None:
            revision, colon, tail = given.partition(":")
            wanted = tail or None
    if not revision or not revision.isprintable():
        raise UsageError(f"{text!r} names no revision after the @")
    return Reference(checked_repo(f"{owner}/{name}"), revision, wanted)


def checked_repo(repo: str) -> str:
    """``repo``, which is also the name of two folders here. Raises UsageError when it is no repository's name."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith((".", ".git")):
        raise UsageError(f"{repo!r} is not the name of a repository on the hub, which is owner/repo")
    return repo


def search(query: str, limit: int = 20) -> list[HubModel]:
    """Repositories with GGUF files, the most downloaded first, each with its files.

    Takes one request for the list and one for each repository, several at once. Where the files of one cannot
    be had it is given without, and with its ``error``. Raises RemoteError, or UsageError for a bad limit.
    """
    if not 1 <= limit <= MAX_SEARCH:
        raise UsageError(f"a search gives 1 to {MAX_SEARCH} models, not {limit}")
    asked = {"search": query, "filter": "gguf", "sort": "downloads", "direction": "-1", "limit": str(limit)}
    listed = _get(f"/api/models?{urlencode(asked)}", "search", patience=1)
    if not isinstance(listed, list):
        raise RemoteError("the hub's answer to a search makes no sense: it is no list")
    found = [_model(entry, None) for entry in listed[:limit]]
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="hub") as pool:
        return list(pool.map(_detailed, found))


def model(repo: str, revision: str = "main", wait: Callable[[float, str], None] | None = None) -> HubModel:
    """One repository with its GGUF files. Its ``revision`` is the commit that the hub resolved ``revision`` to.

    ``wait(seconds, reason)`` is called where the hub asks to come back later; None raises at once. Raises
    UsageError where there is no such repository, RemoteError where the hub cannot be asked.
    """
    path = f"/api/models/{checked_repo(repo)}"
    if revision != "main":
        path += f"/revision/{quote(revision, safe='')}"
    patience = 1 if wait is None else _PATIENCE
    found = _model(_get(f"{path}?blobs=true", f"{repo}@{revision}", patience, wait), repo)
    return found if found.revision != "main" else replace(found, revision=revision)


def choices(found: HubModel) -> tuple[Choice, ...]:
    """The models of a repository, the smallest first; projectors (mmproj) are left out."""
    whole: dict[tuple[str, str, int], dict[int, HubFile]] = {}
    for file in found.files:
        folder, _, name = file.name.rpartition("/")
        stem = name[:-5]
        part = _PART.fullmatch(stem)
        key = (folder, part["stem"], int(part["count"])) if part else (folder, stem, 1)
        whole.setdefault(key, {})[int(part["number"]) if part else 1] = file
    made = []
    for (folder, stem, count), parts in whole.items():
        if "mmproj" in stem.casefold():
            continue
        files = tuple(parts[n] for n in sorted(parts))
        made.append(Choice(stem, quantization(folder, stem), files, count - len(files)))
    return tuple(sorted(made, key=lambda c: (c.size, c.name)))


def quantization(folder: str, stem: str) -> str:
    """ "Q4_K_M" in a file's name, else in that of its folder; "" where neither says it."""
    labels = _LABEL.findall(stem) or _LABEL.findall(folder)
    return labels[-1].upper() if labels else ""


def choose(found: HubModel, wanted: str | None) -> Choice:
    """The model that ``wanted`` (a quantization, a file, a file's name without its end) means; None takes the only
    one. Raises UsageError, with those that there are."""
    if wanted and wanted.casefold().endswith(".gguf"):
        return _by_file(found, wanted)
    all_of_it = choices(found)
    if not all_of_it:
        raise UsageError(f"{found.repo} has no GGUF model in it")
    key = (wanted or "").casefold()
    matches = [c for c in all_of_it if not wanted or key in (c.quantization.casefold(), c.name.casefold())]
    if len(matches) == 1:
        return _complete(found, matches[0])
    labels = [c.quantization for c in matches or all_of_it]
    unique = all(labels) and len(set(labels)) == len(labels)
    names = ", ".join(
        f"{c.quantization if unique else c.name} ({readable_size(c.size)})" for c in (matches or all_of_it)
    )
    what = f"has {len(matches)} models" if matches else f"has no {wanted!r}"
    raise UsageError(f"{found.repo} {what}: give one of them as {found.repo}:NAME: {names}")


def _by_file(found: HubModel, wanted: str) -> Choice:
    file = next((f for f in found.files if f.name == wanted), None)
    if file is None:
        names = ", ".join(sorted(f.name for f in found.files)[:20]) or "none"
        raise UsageError(f"{found.repo} has no file {wanted!r}; its GGUF files: {names}")
    for choice in choices(found):
        if file in choice.files:
            return _complete(found, choice)
    return Choice(file.name.rpartition("/")[2][:-5], "", (file,))


def _complete(found: HubModel, choice: Choice) -> Choice:
    if choice.missing:
        raise UsageError(
            f"{found.repo}: {choice.name} is split, and {choice.missing} of its parts are not there"
        )
    return choice


def _detailed(listed: HubModel) -> HubModel:
    try:
        found = model(listed.repo)
    except (RemoteError, UsageError) as exc:
        return replace(listed, error=str(exc))
    return replace(found, downloads=listed.downloads, likes=listed.likes, gated=listed.gated or found.gated)


def _model(answer: Any, repo: str | None) -> HubModel:
    """From the hub's JSON. Raises RemoteError where it makes no sense."""
    if not isinstance(answer, dict):
        raise RemoteError("the hub's answer makes no sense: a model is no object")
    name = answer.get("id") or answer.get("modelId") or repo
    try:
        checked_repo(name if isinstance(name, str) else repr(name))
    except UsageError as exc:
        raise RemoteError(f"the hub's answer makes no sense: {exc}") from exc
    if repo is not None and str(name).casefold() != repo.casefold():
        repo = str(name)  # a repository that moved
    siblings = answer.get("siblings")
    files = tuple(f for s in (siblings if isinstance(siblings, list) else ()) if (f := _file(s)) is not None)
    sha = answer.get("sha")
    return HubModel(
        repo or str(name),
        _number(answer.get("downloads")),
        _number(answer.get("likes")),
        files,
        sha if isinstance(sha, str) and _SHA1.fullmatch(sha) else "main",
        bool(answer.get("gated")),
    )


def _file(sibling: Any) -> HubFile | None:
    """None for what is no GGUF file, or has no size because only names were asked for."""
    name = sibling.get("rfilename") if isinstance(sibling, dict) else None
    if not isinstance(name, str) or not name.casefold().endswith(".gguf"):
        return None
    lfs = sibling.get("lfs") or {}
    sha256 = lfs.get("sha256") or lfs.get("oid") if isinstance(lfs, dict) else None
    size = sibling.get("size")
    if size is None and isinstance(lfs, dict):
        size = lfs.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        return None
    oid = sibling.get("blobId") if not lfs else None  # for large files that is the pointer's
    return HubFile(name, size, _digest(_SHA256, sha256), _digest(_SHA1, oid))


def _digest(form: re.Pattern[str], value: Any) -> str | None:
    return value if isinstance(value, str) and form.fullmatch(value) else None


def _number(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _get(path: str, what: str, patience: int, wait: Callable[[float, str], None] | None = None) -> Any:
    """The JSON at a path of the hub. ``what`` names it in errors."""
    address, token = web.hub()
    opener = urllib.request.build_opener(web.Redirects)
    for attempt in range(1, patience + 1):
        try:
            with opener.open(web.request(address + path, token), timeout=web.TIMEOUT) as response:
                body = response.read(MAX_ANSWER + 1)
            if len(body) > MAX_ANSWER:
                raise RemoteError(f"the hub's answer about {what} is longer than {MAX_ANSWER >> 20} MiB")
            return json.loads(body)
        except urllib.error.HTTPError as exc:
            with exc:
                seconds = retry_after(exc)
                if exc.code in (401, 404) and "/" in what:  # 401 also for a repository that does not exist
                    raise UsageError(
                        f"the hub has no {what} (HTTP {exc.code}); a private or gated one needs HF_TOKEN"
                    ) from exc
                if seconds is None or attempt == patience or seconds > _LONGEST_WAIT or wait is None:
                    later = f"; try again in {seconds:.0f} s" if seconds else ""
                    raise RemoteError(f"{what}: {web.explain(exc)}{later}") from exc
            wait(seconds, web.explain(exc))
        except urllib.error.URLError as exc:
            raise RemoteError(f"the hub at {address} cannot be reached: {exc.reason}") from exc
        except (OSError, HTTPException) as exc:
            raise RemoteError(f"the connection to {address} failed: {exc or type(exc).__name__}") from exc
        except ValueError as exc:  # of json, in all its forms
            raise RemoteError(f"the answer of {address} about {what} is not JSON: is it a hub?") from exc
        except RecursionError as exc:
            raise RemoteError(f"the answer of {address} about {what} is nested too deeply") from exc
    raise AssertionError("the last attempt returns or raises")


def retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds after which a busy server wants to be asked again; None for errors that do not pass.

    ``Retry-After`` in seconds or as a date, or ``RateLimit: ...;r=0;t=SECONDS`` as the hub sends it; ``PAUSE``
    where it says nothing.
    """
    if error.code not in (408, 429, 500, 502, 503, 504):
        return None
    text = error.headers.get("Retry-After") or ""
    if re.fullmatch(r"\s*[0-9]{1,6}\s*", text):
        return float(text)
    if text:
        from email.utils import parsedate_to_datetime

        try:
            return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
        except (ValueError, OverflowError):
            return PAUSE
    limited = re.search(r";\s*t=([0-9]{1,6})", error.headers.get("RateLimit") or "")
    return float(limited[1]) if limited else PAUSE
