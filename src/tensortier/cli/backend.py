"""``tensortier backend``: ggml backends built as loadable modules."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tensortier.cli.common import console, note, print_json
from tensortier.errors import UsageError
from tensortier.explain import readable_size

app = typer.Typer(
    help="List and build ggml backends (rpc, vulkan, cuda) that llama.cpp loads at run time.",
    invoke_without_command=True,
)


@app.callback()
def backend(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_backends(json=False)


@app.command("list")
def list_backends(json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """List the backends: those built on this machine, and those that can be."""
    from tensortier import backends

    modules = backends.installed()
    if json:
        print_json([asdict(module) | {"path": str(module.path)} for module in modules])
        return
    from rich.table import Table

    table = Table("backend", "state", "llama-cpp-python", "size", "file", box=None, pad_edge=False)
    for module in modules:
        size = readable_size(module.size)
        table.add_row(module.name, module.state, module.version, size, str(module.path))
    for name in backends.NAMES:
        if not any(module.name == name for module in modules):
            table.add_row(name, f"not built: tensortier backend build {name}", "", "", "")
    console().print(table)


@app.command("build")
def build(
    name: Annotated[
        str, typer.Argument(metavar="NAME", show_default=False, help="Which one: rpc, vulkan or cuda.")
    ],
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            metavar="N",
            min=1,
            help="Compilers at a time. Without it: one per core, for cuda as many as the memory allows.",
        ),
    ] = None,
    cuda_architectures: Annotated[
        str | None,
        typer.Option(
            "--cuda-architectures",
            metavar="LIST",
            help="For cuda: what to compile for, as CMake takes it, such as 86 or '80;90'. "
            "Without it: the cards of this machine.",
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--source",
            metavar="PATH",
            help="Source distribution of llama-cpp-python, packed or not. Without it: pip downloads it.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build it again even if it is there.")] = False,
) -> None:
    """Compile a backend from the source of the installed llama.cpp; nothing else has to be rebuilt."""
    from tensortier import backends

    for known in backends.NAMES:
        if name == known:
            break
    else:
        raise UsageError(f"there is no backend {name!r} to build: choose one of {', '.join(backends.NAMES)}")
    if cuda_architectures is not None and known != "cuda":
        raise UsageError(f"--cuda-architectures means nothing for {known}: it belongs to cuda")
    path = backends.build(
        known,
        source=source,
        jobs=jobs,
        cuda_architectures=cuda_architectures,
        progress=note,
        force=force,
    )
    print(path)
