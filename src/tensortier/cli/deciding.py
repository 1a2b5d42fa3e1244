"""Plans made at the terminal: warnings and the bar of a measurement on standard error."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tensortier import deciding
from tensortier.cli.common import note, progress_bar
from tensortier.deciding import Planned, Wish
from tensortier.types import Hardware, Settings

if TYPE_CHECKING:
    from tensortier.rates import Rates


def make_plan(wish: Wish, *, quiet: bool = False) -> Planned:
    """``deciding.make_plan``, which has to keep the budget of main memory. ``quiet``: no word and no bar while the
    machine is measured."""
    planned = deciding.make_plan(wish, functools.partial(measured, quiet=quiet), warn)
    deciding.check_ram(planned)
    return planned


def warn(text: str) -> None:
    """A warning on standard error."""
    note(f"tensortier: warning: {text}")


def measured(
    machine: Hardware, settings: Settings, rpc: Sequence[str], *, quiet: bool = False, bar: bool = True
) -> Rates | None:
    """Measures this machine and says so, with a progress bar if there is a terminal; what was left out is a warning."""
    from tensortier import measuring

    if not quiet:
        note(f"measuring this machine once, about {measuring.SECONDS} s (--no-calibrate skips it) ...")
    with progress_bar(bar and sys.stderr.isatty() and not quiet, "measuring") as report:
        found = measuring.measured(machine, settings, rpc, warn, report)
    for line in () if found is None else found.notes:
        warn(line)
    return found
