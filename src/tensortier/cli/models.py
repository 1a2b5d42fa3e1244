"""``tensortier models``: the models on this machine, and those that come to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensortier.cli.common import console, note, print_json
from tensortier.explain import readable_size

if TYPE_CHECKING:
    from tensortier.hub import HubModel
    from tensortier.upkeep import Removal, Verification

app = typer.Typer(
    help="List the models on this machine; download, remove and verify models.",
    invoke_without_command=True,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no notes.")]


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

    from tensortier import library, modelfiles

    warnings: list[str] = []
    found = library.list_models(warnings)
    for warning in warnings:
        note(f"tensortier: warning: {warning}")
    if json:
        print_json([asdict(model) for model in found])
    else:
        library.render(found, console())
    for part in modelfiles.unfinished():
        record = part.record
        note(
            f"tensortier: {record.repo}/{record.file} is downloaded to {_percent(part.done, record.size)} of "
            f"{readable_size(record.size)}: `tensortier models pull {record.repo}/{record.file}` goes on"
        )


@app.command("search")
def search(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="Words in the repository's name.")],
    limit: Annotated[int, typer.Option("--limit", min=1, max=100, help="Repositories at most.")] = 10,
    json: JsonOption = False,
) -> None:
    """Search the Hugging Face hub for GGUF models, the most downloaded first."""
    from dataclasses import asdict

    from tensortier import hub

    found = hub.search(query, limit)
    if json:
        print_json([asdict(model) for model in found])
    elif not found:
        note("tensortier: no repository with GGUF files is found by these words")
    else:
        _print_found(found)


@app.command("pull")
def pull(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="owner/repo:QUANTIZATION, hf://owner/repo/file.gguf, or owner/repo to be asked.",
        ),
    ],
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Download a model from the Hugging Face hub, all parts of a split one.

    A download that was broken off goes on where it ended. Its SHA-256 is compared with the hub's before the file
    gets its name. HF_TOKEN opens gated models; HF_ENDPOINT is the address of another hub.
    """
    from tensortier import hub
    from tensortier.transfer import Download

    say: Callable[[str], None] = (lambda _line: None) if quiet else _note

    def wait(seconds: float, reason: str) -> None:
        import time

        say(f"{reason}; asking again in {seconds:.0f} s")
        time.sleep(seconds)

    reference = hub.parse(model)
    found = hub.model(reference.repo, reference.revision, wait)
    choice = hub.choose(found, reference.wanted)
    with _byte_bar(not quiet, choice.name) as bar:
        download = Download(
            found.repo, choice.files, revision=found.revision, progress=bar.update, say=bar.print_line(say)
        )
        missing = download.missing()
        if not missing:
            say(f"{choice.name} is here already")
        else:
            begun = choice.size - missing
            rest = f", {readable_size(missing)} of them still missing" if begun else ""
            bar.print_line(say)(f"{choice.name}: {readable_size(choice.size)} from {found.repo}{rest}")
        try:
            paths = download.run()
        except BaseException:
            kept = choice.size - download.missing()
            if kept:
                say(f"{readable_size(kept)} are kept: the same command goes on from there")
            raise
    if json:
        files = [
            {"path": str(path), "size": file.size, "sha256": file.sha256}
            for path, file in zip(paths, choice.files, strict=True)
        ]
        transferred = download.transferred
        print_json(
            {"repo": found.repo, "revision": found.revision, "files": files, "transferred": transferred}
        )
    else:
        print(paths[0])


@app.command("remove")
def remove(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Names from 'tensortier models', owner/repo:QUANTIZATION, or paths."
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: JsonOption = False,
) -> None:
    """Delete downloaded models, or what has arrived of one. Files of other programs are never touched."""
    import sys

    from tensortier import upkeep
    from tensortier.errors import UsageError

    removals = list({r.files: r for r in map(upkeep.removal, names)}.values())  # two names may mean one model
    for removal in removals:
        _print_removal(removal)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(
                "nobody can be asked whether to delete it, standard input is no terminal: give --yes"
            )
        if not typer.confirm("Delete it?", err=True):
            note("tensortier: nothing was deleted")
            raise typer.Exit(1)
    for removal in removals:
        upkeep.remove(removal)
    freed = sum(r.freed for r in removals)
    if json:
        print_json({"files": [str(f) for r in removals for f in r.files], "freed": freed})
    else:
        print(f"{readable_size(freed)} freed")


@app.command("verify")
def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...", help="Names or paths; all models on this machine when none is given."
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check models for damage: the structure of the file, and the SHA-256 of downloads.

    The digest is known for what tensortier, Ollama or the Hugging Face tools have downloaded. The exit code is 1
    when a model is damaged.
    """
    from tensortier import library, upkeep

    warnings: list[str] = []
    wanted = [library.locate(name) for name in dict.fromkeys(names)] if names else library.located(warnings)
    for warning in warnings:
        note(f"tensortier: warning: {warning}")
    done, total = 0, sum(upkeep.size_to_read(model) for model in wanted)
    found: list[Verification] = []
    with _byte_bar(not quiet, "verifying") as bar:

        def progress(read: int) -> None:
            nonlocal done
            done += read
            bar.update(done, total)

        for model in wanted:
            found.append(upkeep.verify(model, progress))
            if not json:
                bar.clear(lambda: _print_verification(found[-1]))
    if json:
        print_json([_verification_json(v) for v in found])
    if any(v.damage for v in found):
        raise typer.Exit(1)


def _print_found(found: list[HubModel]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from tensortier import hub

    table = Table("Repository", "Downloads", "Likes", "Models")
    for column in table.columns[1:3]:
        column.justify = "right"
    table.columns[3].overflow = "fold"
    for model in found:
        sizes = ", ".join(
            f"{c.quantization or c.name} ({readable_size(c.size)})"
            for c in hub.choices(model)
            if not c.missing
        )
        shown = f"[red]{escape(model.error)}[/]" if model.error else escape(sizes)
        gated = " (gated)" if model.gated else ""
        table.add_row(escape(model.repo) + gated, f"{model.downloads:,}", f"{model.likes:,}", shown)
    console().print(table)


def _print_removal(removal: Removal) -> None:
    _note(f"{removal.name}: {readable_size(removal.freed)} in {len(removal.files)} files")
    for file in removal.files:
        note(f"  {file}")


def _print_verification(found: Verification) -> None:
    if found.damage:
        print(f"DAMAGED  {found.name}: {found.damage}")
        return
    sources = sorted({f.expected_from for f in found.files if f.expected})
    if sources and all(f.expected for f in found.files):
        print(f"ok       {found.name}: structure, and SHA-256 of {' and '.join(sources)}")
    else:
        print(f"ok       {found.name}: structure; nobody recorded its SHA-256")


def _verification_json(found: Verification) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(found), "damaged": bool(found.damage)}


def _percent(done: int, total: int) -> str:
    return f"{100 * done // max(total, 1)} %"


def _note(text: str) -> None:
    note(f"tensortier: {text}")


class _ByteBar:
    """Bytes done of a total, drawn on standard error where that is a terminal."""

    def __init__(self, progress: Any, task: Any) -> None:
        self._progress = progress
        self._task = task

    def update(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)

    def clear(self, action: Callable[[], None]) -> None:
        """Print something while the bar is away."""
        if self._progress is None:
            action()
            return
        self._progress.stop()
        action()
        self._progress.start()

    def print_line(self, say: Callable[[str], None]) -> Callable[[str], None]:
        return lambda line: self.clear(lambda: say(line))


@contextmanager
def _byte_bar(show: bool, what: str) -> Iterator[_ByteBar]:
    import sys

    if not show or not sys.stderr.isatty():
        yield _ByteBar(None, None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _ByteBar(progress, progress.add_task(what, total=None))
