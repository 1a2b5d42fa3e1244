"""A plan on the terminal: tables around the words of ``explain``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from tensortier import explain
from tensortier.budget import PROCESS
from tensortier.deciding import Planned
from tensortier.errors import UsageError
from tensortier.explain import readable_size
from tensortier.pageable import DEVICE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tensortier.levels import Level, RamLevel, Side

_BAR = 10  # characters of the longest
_WIDE = 132  # columns from which on there is room for bars
_TIGHT = 72  # columns below which the table of memory has no room for padding
_NARROW = 120  # columns below which tables save space
_RAM_LEVELS = "A share of the weights in RAM, the rest on the drive"
_LEVELS = "Whole layers, and the fastest placement of single tensors in the same memory"


def plan(planned: Planned, out: Console, *, explain: bool) -> None:
    """What ``tensortier plan`` prints; with ``explain`` also why."""
    found = planned.plan
    name = planned.model.name or found.model
    _say(out, f"{name}: {readable_size(planned.model.nbytes)} of weights")
    _say(out, *summary(planned))
    out.print(_memory(planned, out.width))
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
        is_text = i < left or name == "note"
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text)
    return table


def _memory(planned: Planned, width: int) -> Table:
    free = {d.name: d.memory_free for d in planned.hardware.devices}
    free["CPU"] = planned.hardware.ram_available
    table = _table(None, "device", "weights", "KV cache", "compute", "total", "free")
    table.padding = (0, 0) if width < _TIGHT else (0, 1)
    for row in planned.plan.memory:
        sizes = (row.weights_bytes, row.kv_bytes, row.compute_bytes, row.total_bytes)
        here = (
            readable_size(free[row.device])
            if row.device in free
            else "in RAM"
            if row.device in (DEVICE, PROCESS)
            else "?"
        )
        table.add_row(row.device, *(readable_size(size) for size in sizes), here)
    return table


def _explain(planned: Planned, out: Console) -> None:
    from rich.markup import escape

    from tensortier import gains

    found = planned.plan.estimate
    if found is None or planned.rates is None:
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
            held = ("\n" if out.width < _NARROW else ", ").join(rung.memory)
            cells = (rung.name, rung.prefill, rung.decode, rung.request, held, rung.note)
            table.add_row(*(escape(cell) for cell in cells))
        out.print(table)
    rows = gains.gains(
        planned.model,
        planned.hardware,
        planned.plan,
        workload=planned.workload,
        rates=planned.rates,
        hits=planned.hits,
    )
    if rows:
        table = _table("What would help", "", "a request", "saved", "decode")
        for gain in rows:
            saved = f"{gain.saved:.1%}" if gain.saved >= 0.001 else "nothing"
            then = explain.figure(gain.decode_tokens_per_second)
            table.add_row(escape(gain.what), explain.duration(gain.seconds), saved, then)
        out.print(table)
    if found.notes:
        _say(out, "", "Assumed:", *(f"  {note}" for note in found.notes))


def levels_of(planned: Planned) -> tuple[Level, ...] | tuple[RamLevel, ...]:
    """The offload slider, for the settings of the plan: over a GPU, or over RAM where there is none. Raises UsageError
    where no speed is known."""
    from tensortier import levels, memory

    if planned.rates is None:
        raise UsageError(
            "--levels compares speeds, and this machine was not measured: leave --no-calibrate out"
        )
    found, asked = planned.plan.settings, planned.wish.settings
    given = (planned.model, planned.hardware)
    over_gpus = levels.levels(*given, found, workload=planned.workload, rates=planned.rates)
    if over_gpus:
        return over_gpus
    with nullcontext(planned.answers) if planned.answers is not None else memory.Probe() as answers:
        return levels.ram_levels(
            *given,
            replace(found, load_mode=asked.load_mode, repack=asked.repack),
            workload=planned.workload,
            rates=planned.rates,
            answers=answers,
            hits=planned.hits,
        )


def levels_json(planned: Planned, found: Sequence[Level] | Sequence[RamLevel]) -> dict[str, Any]:
    """The same as JSON types."""
    return {
        "model": planned.plan.model,
        "workload": asdict(planned.workload),
        "settings": asdict(planned.plan.settings),
        "levels": [asdict(level) for level in found],
    }


def levels(planned: Planned, found: tuple[Level, ...] | tuple[RamLevel, ...], out: Console) -> None:
    """Of GPUs whole layers on the left, the fastest placement in the same memory on the right; of RAM one way."""
    from tensortier.levels import Level, RamLevel

    name = planned.model.name or planned.plan.model
    _say(out, f"{name}: {readable_size(planned.model.nbytes)} of weights", *summary(planned))
    bars = out.width >= _WIDE
    over_gpus = tuple(level for level in found if isinstance(level, Level))
    over_ram = tuple(level for level in found if isinstance(level, RamLevel))
    out.print(_gpu_levels(over_gpus, out, bars) if over_gpus else _ram_levels(over_ram, out, bars))
    estimate = planned.plan.estimate
    if estimate is not None:
        _say(out, f"{'GiB and ' if over_gpus else ''}tokens/s; {explain.provenance(estimate)}")
        decode = explain.speed(estimate.decode_tokens_per_second, estimate.decode_interval)
        _say(out, f"the plan for what is free: {'; '.join(planned.plan.reasons[:1])}; decode {decode}")
    _say(out, *(f"warning: {w}" for w in warnings(planned)))


def _gpu_levels(found: Sequence[Level], out: Console, bars: bool) -> Table:
    columns = ("VRAM", "RAM", "prefill", "decode", *([""] if bars else []))
    sides = [f"{kind}\n{column}" if column else "" for kind in ("layers", "single") for column in columns]
    table = _table(_LEVELS, "on the\nGPU", "layers", *sides, "fits")
    table.padding = (0, 0) if out.width < _NARROW else (0, 1)
    best = max(side.estimate.decode_tokens_per_second for level in found for side in _sides(level))
    for level in found:
        cells = [cell for side in _sides(level) for cell in _side(side, best if bars else None)]
        fits = "yes" if all(side.fits for side in _sides(level)) else "no"
        table.add_row(f"{level.share:.0%}", str(level.layers), *cells, fits)
    return table


def _ram_levels(found: Sequence[RamLevel], out: Console, bars: bool) -> Table:
    table = _table(
        _RAM_LEVELS, "in RAM", "RAM", "drive", "prefill", "decode", *([""] if bars else []), "fits"
    )
    table.padding = (0, 0) if out.width < _TIGHT else (0, 1)
    best = max(level.estimate.decode_tokens_per_second for level in found)
    for level in found:
        decode = level.estimate.decode_tokens_per_second
        table.add_row(
            f"{level.share:.0%}",
            explain.gib(level.ram),
            explain.gib(level.drive_bytes),
            explain.figure(level.estimate.prefill_tokens_per_second),
            explain.figure(decode),
            *([_bar(decode, best)] if bars else []),
            "yes" if level.fits else "no",
        )
    return table


def _bar(speed: float, best: float) -> str:
    return "#" * max(1, round(_BAR * speed / best))


def _sides(level: Level) -> tuple[Side, Side]:
    return level.by_layers, level.by_tensors


def _side(side: Side, best: float | None) -> tuple[str, ...]:
    """Cells, with a bar of the decode speed where the ``best`` is given."""
    vram = sum(row.total_bytes for row in side.memory if row.device != "CPU")
    ram = sum(row.total_bytes for row in side.memory if row.device == "CPU")
    decode = side.estimate.decode_tokens_per_second
    return (
        f"{vram / 2**30:.1f}",
        f"{ram / 2**30:.1f}",
        explain.figure(side.estimate.prefill_tokens_per_second),
        explain.figure(decode),
        *([] if best is None else [_bar(decode, best)]),
    )
