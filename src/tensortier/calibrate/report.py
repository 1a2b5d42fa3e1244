"""A calibration as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensortier.calibrate.drive import BLOCKS, DEPTHS
from tensortier.calibrate.kernels import LONG, SHORT, WIDE
from tensortier.calibrate.records import Calibration

if TYPE_CHECKING:
    from rich.console import Console


def render(calibration: Calibration, console: Console) -> None:
    """Prints what was measured, in GB/s (10^9 bytes per second) unless a column says otherwise."""
    from rich.table import Table

    def speed(value: float | None) -> str:
        return "" if value is None else f"{value / 1e9:.3g}"

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left")
        for name in columns:
            made.add_column(name, justify="left" if name in ("device", "type", "block") else "right")
        return made

    found: dict[tuple[str, str, int, bool], dict[tuple[int, int, bool], float]] = {}
    for p in calibration.products:
        row = found.setdefault((p.device, p.type, p.threads, p.repacked), {})
        row[p.columns, p.batch, p.experts] = p.bytes_per_second
    products = table(
        "Weights read while computing, GB/s",
        *("device", "type", "threads", "kernel", "1 token", f"{SHORT} columns", f"{WIDE} tokens", "experts"),
    )
    columns = ((LONG, 1, False), (SHORT, 1, False), (LONG // 2, WIDE, False), (LONG // 2, WIDE, True))
    for (device, kind, threads, repacked), speeds in found.items():
        kernel = "repacked" if repacked else ""
        cells = (speed(speeds.get(key)) for key in columns)
        products.add_row(device, kind, str(threads), kernel, *cells)
    console.print(products)
    attention = table(
        "Attention, 10^9 cached values per second",
        "device",
        "type",
        "threads",
        "width",
        "cells",
        "tokens",
        "G/s",
    )
    for a in calibration.attention:
        attention.add_row(
            a.device, a.type, str(a.threads), str(a.head_dim), str(a.cells), str(a.batch),
            speed(a.elements_per_second),
        )  # fmt: skip
    console.print(attention)
    for row_ in calibration.layers:
        console.print(
            f"{row_.device}, {row_.threads} threads: {row_.layer_seconds * 1e6:.0f} µs per layer, "
            f"{row_.moe_layer_seconds * 1e6:.0f} more with experts, {row_.token_seconds * 1e6:.0f} per token",
            markup=False,
        )
    for c in calibration.copies:
        way = f"to {c.device}" if c.to_device else f"from {c.device}"
        kind = "pinned" if c.pinned else "pageable"
        console.print(f"copies {way}, {kind}: {speed(c.bytes_per_second)} GB/s", markup=False)
    for s in calibration.splits:
        console.print(
            f"{s.device}: {s.seconds * 1e6:.0f} µs to leave it for "
            f"{'experts on ' if s.experts else ''}the CPU and come back",
            markup=False,
        )
    if calibration.drives:
        drive = table(
            "Drive, random reads past the page cache, GB/s", "block", *(f"{n} in flight" for n in DEPTHS)
        )
        reads = {(d.block, d.depth): d.bytes_per_second for d in calibration.drives}
        for block in BLOCKS:
            drive.add_row(f"{block // 1024} KiB", *(speed(reads.get((block, n))) for n in DEPTHS))
        console.print(drive)
    for note in calibration.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"measured in {calibration.seconds:.0f} s", markup=False)
