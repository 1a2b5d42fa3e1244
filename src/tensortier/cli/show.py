"""A plan on the terminal: tables around the words of ``explain``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensortier import explain
from tensortier.cli.common import readable_size
from tensortier.cli.deciding import Planned

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def plan(planned: Planned, out: Console, *, explain: bool) -> None:
    """What ``tensortier plan`` prints; with ``explain`` also why."""
    found = planned.plan
    name = planned.model.name or found.model
    _say(out, f"{name}: {readable_size(planned.model.nbytes)} of weights")
    _say(out, *summary(planned))
    out.print(_memory(planned))
    _say(out, *predicted(planned), *found.reasons)
    _say(out, *(f"  {override.pattern} -> {override.device}" for override in found.placement.overrides))
    if explain:
        _explain(planned, out)
    _say(out, *(f"warning: {w}" for w in warnings(planned)))


def warnings(planned: Planned) -> tuple[str, ...]:
    """Of the machine, of its measurement, and of the plan."""
    notes = () if planned.rates is None else planned.rates.notes
    measured = (f"when this machine was measured, {note}" for note in notes)
    return (*planned.hardware.warnings, *measured, *planned.plan.warnings)


def summary(planned: Planned) -> list[str]:
    """What was asked, and the settings that were given or chosen."""
    settings, undecided = planned.plan.settings, planned.wish.undecided
    open_now = {"context": undecided.context, "kv": undecided.kv_type, "ubatch": undecided.ubatch}
    chosen = frozenset() if planned.wish.manual.given else frozenset(k for k, v in open_now.items() if v)
    context = settings.n_ctx or planned.model.context_length
    return [
        explain.workload(planned.workload, planned.wish.workload is None),
        f"{explain.choices(settings, context, chosen)}, threads {settings.threads}, load mode {settings.load_mode}",
    ]


def predicted(planned: Planned) -> list[str]:
    """Speeds, or that there are none and what would give them."""
    if planned.plan.estimate is None and planned.rates is None:
        return ["no speeds are predicted: this machine was not measured (tensortier hardware --calibrate)"]
    return explain.predicted(planned.plan)


def _say(out: Console, *lines: str) -> None:
    for line in lines:
        out.print(line, markup=False)


def _table(title: str | None, *columns: str, left: int = 1) -> Table:
    """The first ``left`` columns and the last, where it holds notes, are aligned to the left."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left or name == "note" else "right")
    return table


def _memory(planned: Planned) -> Table:
    free = {d.name: d.memory_free for d in planned.hardware.devices}
    free["CPU"] = planned.hardware.ram_available
    table = _table(None, "device", "weights", "KV cache", "compute", "total", "free")
    for row in planned.plan.memory:
        sizes = (row.weights_bytes, row.kv_bytes, row.compute_bytes, row.total_bytes)
        here = readable_size(free[row.device]) if row.device in free else "unknown"
        table.add_row(row.device, *(readable_size(size) for size in sizes), here)
    return table


def _explain(planned: Planned, out: Console) -> None:
    from rich.markup import escape

    found = planned.plan.estimate
    if found is None:
        return
    out.print()
    table = _table("Where the time goes", "", "one token", "share", "the prompt", "share")
    for row in explain.shares(found):
        table.add_row(
            escape(row.what),
            f"{row.decode_seconds * 1000:.2f} ms",
            f"{row.decode_share:.0%}",
            f"{row.prefill_seconds * 1000:.0f} ms",
            f"{row.prefill_share:.0%}",
        )
    out.print(table)
    rungs = explain.ladder(planned.plan)
    if rungs:
        table = _table("What was compared", "plan", "prefill", "decode", "a request", "memory", "note")
        for rung in rungs:
            cells = (rung.name, rung.prefill, rung.decode, rung.request, rung.memory, rung.note)
            table.add_row(*(escape(cell) for cell in cells))
        out.print(table)
    if found.notes:
        _say(out, "", "Assumed:", *(f"  {note}" for note in found.notes))
