"""``tensortier hardware``: what this machine has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tensortier.cli.common import console, print_json, progress_bar
from tensortier.cli.options import RpcOption, split_servers

if TYPE_CHECKING:
    from tensortier.calibrate import Calibration
    from tensortier.types import Hardware


def hardware(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH",
            show_default=False,
            help="Also show the drive that holds this file or folder.",
        ),
    ] = None,
    rpc: RpcOption = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure what the devices and the drive achieve (under half a minute, on an idle machine; on a slow "
            "or busy one a minute at most for each device and the drive, with fewer figures) and keep it; without it, "
            "what was measured before is shown.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show the processor, the memory, every device that llama.cpp can use, and the drive of PATH."""
    from tensortier import calibrate as calibration
    from tensortier.hardware import probe, render, to_json

    servers = split_servers(rpc)
    found = probe(path, rpc=servers)
    measured = _measure(found, path, servers) if calibrate else calibration.load(found)
    if json:
        answer = to_json(found)
        answer["calibration"] = None if measured is None else asdict(measured)
        print_json(answer)
        return
    render(found, console())
    if measured is not None:
        calibration.render(measured, console())


def _measure(found: Hardware, path: str | None, rpc: Sequence[str]) -> Calibration:
    from pathlib import Path

    from tensortier import calibrate as calibration
    from tensortier import measuring
    from tensortier.cli.deciding import warn

    with progress_bar(sys.stderr.isatty(), "measuring") as report:
        measured = calibration.calibrate(
            found,
            rpc=rpc,
            drive_path=Path(path) if path else None,
            progress=None if report is None else lambda fraction, _what: report(fraction),
        )
    measuring.keep(found, measured, warn)
    return measured
