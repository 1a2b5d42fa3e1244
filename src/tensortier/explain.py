"""A plan in words: how fast, what binds, where the time goes, and why the other plans lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tensortier.types import Candidate, Estimate, Plan, Settings, Workload

_NOTHING = "-"
# what the keys of an estimate's parts mean to a reader; those not here are taken as they are
_PHRASES = {
    "splits": "handing over between devices",
    "link": "copying weights over the link",
    "drive": "reading weights from the drive",
    "fixed": "a fixed time per token",
}
_PREFIXES = {
    "weights on ": "reading weights on ",
    "attention on ": "attention over the cache on ",
    "operations on ": "small operations on ",
}


@dataclass(frozen=True)
class Share:
    """One thing that time is spent on."""

    what: str
    decode_seconds: float  # of one token
    decode_share: float  # 0 to 1
    prefill_seconds: float  # of the whole prompt
    prefill_share: float


@dataclass(frozen=True)
class Rung:
    """One plan of those that were compared, as text for a table."""

    name: str
    prefill: str
    decode: str
    request: str
    memory: tuple[str, ...]  # one for each device
    note: str


def speed(tokens_per_second: float, interval: tuple[float, float]) -> str:
    """ "12.3 tokens/s (11.0 to 13.9)"."""
    low, high = interval
    return f"{figure(tokens_per_second)} tokens/s ({figure(low)} to {figure(high)})"


def figure(value: float) -> str:
    """Three digits, as many as a prediction deserves."""
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def workload(load: Workload, assumed: bool) -> str:
    """What is asked of the model, and whether the user said so."""
    said = "assumed, --workload changes it" if assumed else "as given"
    name = f"{load.name}: " if ":" not in load.name else ""
    already = f"{load.depth} tokens in the context" if load.depth else "nothing in the context"
    prompt = "1 token" if load.prompt == 1 else f"{load.prompt} tokens"
    return f"workload {name}{prompt} of prompt, {load.output} of answer, {already} before ({said})"


def provenance(estimate: Estimate) -> str:
    """Where the figures behind a prediction are from."""
    kinds: dict[str, list[str]] = {}
    for device, kind in estimate.provenance.items():
        kinds.setdefault(kind, []).append(device)
    if len(kinds) == 1:
        (only,) = kinds
        return _SOURCES.get(only, only)
    return "; ".join(f"{', '.join(names)}: {_SOURCES.get(kind, kind)}" for kind, names in kinds.items())


_SOURCES = {
    "measured": "measured on this machine",
    "catalogue": "from the catalogue's published figures",
    "assumed": "assumed",
    "trace": "from the routing trace",
}


def predicted(plan: Plan) -> list[str]:
    """The speeds, what a request takes, and what binds; one sentence when there is no prediction."""
    found = plan.estimate
    if found is None:
        return ["no speeds are predicted: nothing was measured here"]
    lines = [
        f"prefill {speed(found.prefill_tokens_per_second, found.prefill_interval)}, "
        f"decode {speed(found.decode_tokens_per_second, found.decode_interval)}; {provenance(found)}",
        f"one request takes about {duration(found.seconds)}",
    ]
    if found.decode_seconds:
        lines.append(f"decode is bound by {binding(found.decode_seconds)}")
    if found.prefill_seconds:
        lines.append(f"prefill is bound by {binding(found.prefill_seconds)}")
    return lines


def binding(parts: Mapping[str, float]) -> str:
    """The part that takes most of the time, and how much of it."""
    key = max(parts, key=lambda k: parts[k])
    share = parts[key] / (sum(parts.values()) or 1.0)
    return f"{phrase(key)}: {share:.0%} of its time"


def phrase(key: str) -> str:
    """The key of an estimate's part, for a reader."""
    for prefix, words in _PREFIXES.items():
        if key.startswith(prefix):
            return words + key.removeprefix(prefix)
    return _PHRASES.get(key, key)


def duration(seconds: float) -> str:
    """ "3.2 s", "145 s", "12.0 min", "3.5 h"."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 300:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def shares(estimate: Estimate) -> tuple[Share, ...]:
    """Where the time of a token and of the prompt goes, the most of a token first."""
    decode, prefill = estimate.decode_seconds, estimate.prefill_seconds
    of_decode, of_prefill = sum(decode.values()) or 1.0, sum(prefill.values()) or 1.0
    rows = [
        Share(
            phrase(key),
            decode.get(key, 0.0),
            decode.get(key, 0.0) / of_decode,
            prefill.get(key, 0.0),
            prefill.get(key, 0.0) / of_prefill,
        )
        for key in {**decode, **prefill}
    ]
    return tuple(sorted(rows, key=lambda r: (-r.decode_seconds, -r.prefill_seconds, r.what)))


def ladder(plan: Plan) -> tuple[Rung, ...]:
    """The plans that were compared, in the plan's order: the chosen one first."""
    best = plan.candidates[0] if plan.candidates else None
    return tuple(_rung(candidate, candidate is best) for candidate in plan.candidates)


def _rung(candidate: Candidate, chosen: bool) -> Rung:
    found = candidate.estimate
    note = candidate.note or ("" if candidate.fits else "does not fit")
    if chosen:
        note = "chosen" if note in ("", "chosen") else f"chosen; {note}"
    return Rung(
        candidate.name,
        figure(found.prefill_tokens_per_second) if found else _NOTHING,
        figure(found.decode_tokens_per_second) if found else _NOTHING,
        duration(found.seconds) if found else _NOTHING,
        tuple(f"{row.device} {gib(row.total_bytes)}" for row in candidate.memory),
        note,
    )


def choices(settings: Settings, context: int, chosen: frozenset[str]) -> str:
    """The settings of a context on one line; those that the planner chose (``chosen``: "context", "kv",
    "ubatch") are marked."""

    def mark(what: str) -> str:
        return " (chosen)" if what in chosen else ""

    kinds = sorted({settings.type_k, settings.type_v})
    kv = kinds[0] if len(kinds) == 1 else f"{settings.type_k} and {settings.type_v}"
    return (
        f"context {context}{mark('context')}, KV cache {kv}{mark('kv')}, "
        f"micro-batch {settings.n_ubatch}{mark('ubatch')}"
    )


def gib(nbytes: int) -> str:
    """ "7.6 GiB", and MiB for less than one."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"


def readable_size(nbytes: int) -> str:
    """``nbytes`` in the binary unit that reads best: "812.0 MiB"."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
