"""What several commands share: the console, JSON output, the verbose switch, sizes for reading."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_PIPED_WIDTH = 140  # columns of a table that no terminal limits
_LEAST_WIDTH = 60
_verbose = False


def set_verbose(value: bool) -> None:
    """Remember for this process whether unexpected errors show their traceback."""
    global _verbose
    _verbose = value


def is_verbose() -> bool:
    return _verbose


def console() -> Console:
    """The console for tables on standard output: coloured on a terminal only, wide when piped."""
    from rich.console import Console

    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit():
        # narrower, rich would leave out columns, down to nothing at all
        width = max(Console().width, _LEAST_WIDTH)
    else:
        width = _PIPED_WIDTH
    return Console(highlight=False, width=width)


@contextmanager
def progress_bar(show: bool, what: str) -> Iterator[Callable[[float], None] | None]:
    """A function that takes the fraction done, 0 to 1, and draws it on standard error; None when not shown. The
    bar is gone at the end."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn(what), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=1.0)
        yield lambda fraction: progress.update(task, completed=fraction)


def print_json(value: Any) -> None:
    """One JSON document on standard output. ``value`` is what ``json`` takes, or JSON text already."""
    print(value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False))


def note(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)
