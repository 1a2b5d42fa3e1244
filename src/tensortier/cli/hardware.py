"""``tensortier hardware``: what this machine has."""

from __future__ import annotations

from typing import Annotated

import typer

from tensortier.cli.common import console, print_json
from tensortier.cli.options import RpcOption, split_servers


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
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show the processor, the memory, every device that llama.cpp can use, and the drive of PATH."""
    from tensortier.hardware import probe, render, to_json

    found = probe(path, rpc=split_servers(rpc))
    if json:
        print_json(to_json(found))
    else:
        render(found, console())
