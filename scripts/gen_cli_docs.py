"""Write docs/cli.md from the command tree; with --check only say whether it is up to date (exit code 1: no).

The page depends on nothing but the source: not on the terminal, the machine or the version of typer's layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import typer.main

from tensortier.cli import PROGRAM
from tensortier.cli.app import app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

INTRODUCTION = f"""\
# The command line

Made from the program by `python scripts/gen_cli_docs.py`; change the help texts, not this page.

The result of a command goes to standard output, everything else to standard error. Exit codes: 0 done, 1 an
error, 2 a request that makes no sense as written, 130 ended by Ctrl-C (SIGINT), 143 by SIGTERM, 129 by SIGHUP (its
terminal was closed), 141 when the reader of standard output went away. `{PROGRAM} COMMAND --help` shows the same
in the terminal."""

OUTRO = f"""\
## The chat

`{PROGRAM} run` without a prompt, in a terminal:

```
{{chat_help}}
```
"""


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _default(parameter: Any) -> str:
    value = parameter.default
    if isinstance(value, Enum):
        value = value.value
    if value is None or value is False or callable(value) or parameter.required:
        return ""
    return f"`{value}`"


def _range(parameter: Any) -> str:
    low, high = getattr(parameter, "min", None), getattr(parameter, "max", None)
    if low is None and high is None:
        return ""
    if high is None:
        return f" At least {low:g}."
    return f" From {low:.10g} to {high:.10g}."


def _rows(parameters: list[Any]) -> Iterator[str]:
    yield "| | | default |"
    yield "|---|---|---|"
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            name = f"`{parameter.metavar}`"
        else:
            value = "" if getattr(parameter, "is_flag", False) else f" {parameter.metavar}"
            name = ", ".join(f"`{option}`" for option in parameter.opts)
            name += f"` {value.strip()}`".replace("` ", " `") if value else ""
        yield f"| {name} | {_escape(parameter.help or '')}{_range(parameter)} | {_default(parameter)} |"


def _section(command: Any, path: str, depth: int) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    groups = getattr(command, "commands", None)
    usage = [path] + [p.metavar if p.required else f"[{p.metavar}]" for p in arguments]
    usage += ["[OPTIONS]"] if options else []
    usage += ["COMMAND"] if groups else []
    yield f"{'#' * depth} {path}"
    yield f"```\n{' '.join(usage)}\n```"
    yield "\n".join(line.strip() for line in (command.help or "").strip().splitlines())
    if arguments:
        yield "\n".join(_rows(arguments))
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
    for title, members in panels.items():
        if len(panels) > 1:
            yield f"**{title}**"
        yield "\n".join(_rows(members))
    for name, sub in (groups or {}).items():
        yield from _section(sub, f"{path} {name}", depth + 1)


def page() -> str:
    """The whole text of docs/cli.md."""
    from tensortier.chat import HELP

    sections = _section(typer.main.get_command(app), PROGRAM, 2)
    return "\n\n".join([INTRODUCTION, *sections, OUTRO.format(chat_help=HELP)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 when it is stale")
    text = page()
    if parser.parse_args().check:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print("docs/cli.md is stale: run python scripts/gen_cli_docs.py", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
