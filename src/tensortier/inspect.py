"""What is in a model: tables by role, layer and type, the largest tensors, and what a pattern would hit.

``summarize`` computes, ``render`` prints. Sizes are in bytes, of the tensors' data without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensortier.patterns import compile_pattern
from tensortier.types import ModelInfo, Role, Tensor

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

LONG_ARRAY = 1000  # elements from which on to_json gives only type and length
_SHOWN_ELEMENTS = 6
_SHOWN_TEXT = 80
_SHOWN_MATCHES = 20


@dataclass(frozen=True, slots=True)
class Total:
    """Sum over some tensors."""

    key: str  # a role, a quantization type, or "total"
    tensors: int
    params: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per element, scales of the quantization included; 0.0 where there is no element."""
        return 8 * self.nbytes / self.params if self.params else 0.0


@dataclass(frozen=True, slots=True)
class LayerTotal:
    """One block, or (``layer`` None) everything outside the blocks."""

    layer: int | None
    tensors: int
    nbytes: int
    nbytes_by_role: Mapping[Role, int]


@dataclass(frozen=True, slots=True)
class Match:
    """What an override with this pattern would move."""

    pattern: str
    tensors: tuple[Tensor, ...]
    nbytes: int
    by_role: tuple[Total, ...]


@dataclass(frozen=True)
class Report:
    model: ModelInfo
    total: Total
    by_role: tuple[Total, ...]  # in the order of Role
    by_type: tuple[Total, ...]  # largest first
    by_layer: tuple[LayerTotal, ...]  # blocks in order, then the rest
    largest: tuple[Tensor, ...]
    match: Match | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``: every tensor, and every metadata key.

        Arrays of ``LONG_ARRAY`` or more elements become ``{"type", "length"}``; numbers that JSON lacks (NaN,
        infinities) become strings.
        """
        m = self.model
        return {
            "files": [{"path": f, "bytes": n} for f, n in zip(m.files, m.file_sizes, strict=True)],
            "model": {
                name: _plain(getattr(m, name))
                for name in m.__dataclass_fields__
                if name not in _NOT_MODEL_FACTS
            },
            "total": _total_json(self.total),
            "by_role": [_total_json(t) for t in self.by_role],
            "by_type": [_total_json(t) for t in self.by_type],
            "by_layer": [
                {
                    "layer": row.layer,
                    "tensors": row.tensors,
                    "bytes": row.nbytes,
                    "bytes_by_role": {role.value: n for role, n in row.nbytes_by_role.items()},
                }
                for row in self.by_layer
            ],
            "largest": [t.name for t in self.largest],
            "match": self.match
            and {
                "pattern": self.match.pattern,
                "tensors": [t.name for t in self.match.tensors],
                "bytes": self.match.nbytes,
                "by_role": [_total_json(t) for t in self.match.by_role],
            },
            "tensors": [
                {
                    "name": t.name,
                    "role": t.role.value,
                    "layer": t.layer,
                    "shape": list(t.shape),
                    "type": t.qtype,
                    "bytes": t.nbytes,
                    "file": t.file,
                    "offset": t.offset,
                }
                for t in m.tensors
            ],
            "metadata": {key: _plain(value) for key, value in m.metadata.items()},
            "warnings": list(self.warnings),
        }


# These have a place of their own in the report.
_NOT_MODEL_FACTS = frozenset({"files", "file_sizes", "tensors", "metadata"})


def summarize(model: ModelInfo, *, match: str | None = None, top: int = 10) -> Report:
    """Report on ``model`` with its ``top`` largest tensors.

    ``match`` is a pattern as in llama.cpp's ``-ot``; one that finds nothing is a warning, one that is no
    regular expression a ``PatternError``.
    """
    warnings = []
    found = None
    if match is not None:
        regex = compile_pattern(match)
        hits = tuple(t for t in model.tensors if regex.search(t.name))
        found = Match(match, hits, sum(t.nbytes for t in hits), _by_role(hits))
        if not hits:
            warnings.append(f"the pattern {match!r} matches no tensor of this model")
    by_type = _totals(model.tensors, lambda t: t.qtype)
    return Report(
        model=model,
        total=_sum("total", model.tensors),
        by_role=_by_role(model.tensors),
        by_type=tuple(sorted(by_type, key=lambda t: (-t.nbytes, t.key))),
        by_layer=_by_layer(model.tensors),
        largest=tuple(sorted(model.tensors, key=lambda t: (-t.nbytes, t.name))[: max(0, top)]),
        match=found,
        warnings=tuple(warnings),
    )


def render(report: Report, console: Console) -> None:
    """Print the report as tables, the most asked for last. Text from the file is shown without markup."""
    from rich.text import Text

    m = report.model
    facts = [
        f"{m.architecture}, {m.quantization}, {_count(report.total.params)} parameters in "
        f"{report.total.tensors} tensors, {_size(report.total.nbytes)}, "
        f"{report.total.bits_per_weight:.2f} bits per weight",
        f"{m.n_layers} layers, width {m.n_embd}, vocabulary {m.n_vocab}, "
        f"context {m.context_length or 'not stated'}",
    ]
    if m.is_moe:
        facts.append(f"{m.n_expert} experts, {m.n_expert_used} used per token, {m.n_expert_shared} shared")
    if m.sliding_window:
        facts.append(f"sliding window of {m.sliding_window} tokens in {sum(m.swa_layers)} layers")
    if any(m.recurrent_layers):
        facts.append(f"recurrent state in {sum(m.recurrent_layers)} layers")
    if m.tied_output:
        facts.append(
            "the embedding is also the output layer; on another device llama.cpp loads it a second time"
        )
    console.print(Text(_safe(m.name), style="bold"))
    for line in facts:
        console.print(Text(_safe(line)))
    for path, size in zip(m.files, m.file_sizes, strict=True):
        console.print(Text(f"{_safe(path)}  {_size(size)}"), soft_wrap=True)
    for title, table in _tables(report):
        console.print()
        console.print(Text(_safe(title), style="bold"), soft_wrap=True)
        console.print(table)
    for warning in report.warnings:
        console.print(Text(f"warning: {_safe(warning)}", style="yellow"), soft_wrap=True)


def _tables(report: Report) -> Iterable[tuple[str, Table]]:
    metadata = _table(("key",), ("value",), right=False)
    for key, value in report.model.metadata.items():
        metadata.add_row(_cell(key), _cell(_shown(value)))
    yield "Metadata", metadata
    yield "By layer (equal neighbours in one row)", _layer_table(report)
    yield f"Largest {len(report.largest)} tensors", _tensor_table(report.largest)
    yield "By type", _total_table(report.by_type)
    yield "By role", _total_table((*report.by_role, report.total))
    if report.match is not None:
        hits = report.match.tensors
        share = report.match.nbytes / report.total.nbytes if report.total.nbytes else 0.0
        title = (
            f"{report.match.pattern} matches {len(hits)} of {report.total.tensors} tensors, "
            f"{_size(report.match.nbytes)} ({report.match.nbytes} bytes, {share:.1%})"
        )
        if len(hits) > _SHOWN_MATCHES:
            title += f"; the first {_SHOWN_MATCHES}:"
        yield title, _tensor_table(hits[:_SHOWN_MATCHES])
        yield "Matched, by role", _total_table(report.match.by_role)


def _table(left: Sequence[str], rest: Sequence[str], *, right: bool = True) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in rest:
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table


def _total_table(rows: Sequence[Total]) -> Table:
    table = _table(("",), ("tensors", "parameters", "size", "bits/weight"))
    for t in rows:
        table.add_row(t.key, str(t.tensors), _count(t.params), _size(t.nbytes), f"{t.bits_per_weight:.2f}")
    return table


def _layer_table(report: Report) -> Table:
    roles = [Role(t.key) for t in report.by_role]
    columns = ("tensors each", "size each", *(r.value for r in roles))
    table = _table(("layers",), columns)
    start = 0
    for i, row in enumerate(report.by_layer):
        following = report.by_layer[i + 1] if i + 1 < len(report.by_layer) else None
        if following and _alike(row, following):
            continue
        first = report.by_layer[start].layer
        label = "rest" if row.layer is None else f"{first}-{row.layer}" if start < i else str(first)
        cells = [_size(row.nbytes_by_role[r]) if r in row.nbytes_by_role else "" for r in roles]
        table.add_row(label, str(row.tensors), _size(row.nbytes), *cells)
        start = i + 1
    return table


def _alike(a: LayerTotal, b: LayerTotal) -> bool:
    return (
        a.layer is not None
        and b.layer == a.layer + 1
        and a.tensors == b.tensors
        and a.nbytes_by_role == b.nbytes_by_role
    )


def _tensor_table(tensors: Sequence[Tensor]) -> Table:
    table = _table(("tensor", "role", "type"), ("shape", "size"))
    for t in tensors:
        shape = " x ".join(str(d) for d in t.shape)
        table.add_row(_cell(t.name), t.role.value, t.qtype, shape, _size(t.nbytes))
    return table


def _sum(key: str, tensors: Sequence[Tensor]) -> Total:
    return Total(key, len(tensors), sum(t.n_elements for t in tensors), sum(t.nbytes for t in tensors))


def _totals(tensors: Iterable[Tensor], key: Callable[[Tensor], str]) -> list[Total]:
    groups: dict[str, list[Tensor]] = {}
    for t in tensors:
        groups.setdefault(key(t), []).append(t)
    return [_sum(k, group) for k, group in groups.items()]


def _by_role(tensors: Iterable[Tensor]) -> tuple[Total, ...]:
    order = [role.value for role in Role]
    return tuple(sorted(_totals(tensors, lambda t: t.role.value), key=lambda t: order.index(t.key)))


def _by_layer(tensors: Iterable[Tensor]) -> tuple[LayerTotal, ...]:
    groups: dict[int | None, list[Tensor]] = {}
    for t in tensors:
        groups.setdefault(t.layer, []).append(t)
    rows = []
    for layer in sorted(groups, key=lambda n: math.inf if n is None else n):
        by_role: dict[Role, int] = {}
        for t in groups[layer]:
            by_role[t.role] = by_role.get(t.role, 0) + t.nbytes
        rows.append(LayerTotal(layer, len(groups[layer]), sum(by_role.values()), by_role))
    return tuple(rows)


def _total_json(total: Total) -> dict[str, Any]:
    return {
        "key": total.key,
        "tensors": total.tensors,
        "params": total.params,
        "bytes": total.nbytes,
        "bits_per_weight": total.bits_per_weight,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) >= LONG_ARRAY:
            return {"type": getattr(value, "element_type", "unknown"), "length": len(value)}
        return [_plain(v) for v in value]
    return value


def _shown(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) >= LONG_ARRAY:
            return f"[{len(value)} x {getattr(value, 'element_type', 'unknown')}]"
        head = ", ".join(_shown(v) for v in value[:_SHOWN_ELEMENTS])
        return f"[{head}{f', ... {len(value)} in all' if len(value) > _SHOWN_ELEMENTS else ''}]"
    text = str(value)
    return text if len(text) <= _SHOWN_TEXT else f"{text[:_SHOWN_TEXT]}... {len(text)} characters"


def _safe(text: str) -> str:
    """Without the control characters that would let a file's text drive the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _cell(text: str) -> Text:
    from rich.text import Text

    return Text(_safe(text))


def _size(n: int) -> str:
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{n} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def _count(n: int) -> str:
    value = float(n)
    for unit in ("", " K", " M", " B"):
        if value < 1000:
            return f"{n}" if not unit else f"{value:.2f}{unit}"
        value /= 1000
    return f"{value:.2f} T"
