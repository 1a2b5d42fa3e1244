"""``tensortier models``: the models on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from tensortier.cli.common import console, note, print_json

app = typer.Typer(
    help="List the models on this machine: name, size, architecture, quantization.",
    invoke_without_command=True,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


@app.callback()
def models(context: typer.Context, json: JsonOption = False) -> None:
    if context.invoked_subcommand is None:
        list_models(json)
    elif json:
        raise typer.BadParameter("give --json after the subcommand", param_hint="--json")


@app.command("list")
def list_models(json: JsonOption = False) -> None:
    """List the models on this machine; any of the names works as MODEL."""
    from dataclasses import asdict

    from tensortier import library

    warnings: list[str] = []
    found = library.list_models(warnings)
    for warning in warnings:
        note(f"tensortier: warning: {warning}")
    if json:
        print_json([asdict(model) for model in found])
    else:
        library.render(found, console())
