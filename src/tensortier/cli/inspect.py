"""``tensortier inspect``: what is in a GGUF file."""

from __future__ import annotations

from typing import Annotated

import typer

from tensortier.cli.common import console, print_json


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="A GGUF file (of a split one the first), a name from 'tensortier models', or a remote file: "
            "hf://owner/repo/file.gguf or https://...",
        ),
    ],
    match: Annotated[
        str | None,
        typer.Option(
            "--match",
            metavar="REGEX",
            help="Show what an override pattern would hit, and how many bytes it would move.",
        ),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", metavar="N", min=0, help="How many of the largest tensors to list.")
    ] = 10,
    json: Annotated[
        bool, typer.Option("--json", help="Print everything, every tensor and key, as JSON.")
    ] = False,
) -> None:
    """Show what is in a model file: tensors by role and layer, sizes, quantization."""
    from tensortier import gguf, library
    from tensortier.inspect import render, summarize

    source = model if gguf.is_remote(model) else library.find(model)
    report = summarize(gguf.read(source), match=match, top=top)
    if json:
        print_json(report.to_json())
    else:
        render(report, console())
