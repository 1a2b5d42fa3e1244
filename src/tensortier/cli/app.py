"""The commands put together, and every way they can end turned into an exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer

from tensortier.cli import (
    EXIT_INTERRUPTED,
    PROGRAM,
    backend,
    common,
    hardware,
    inspect,
    models,
    plan,
    run,
    serve,
    simulate,
    trace,
)
from tensortier.errors import TensortierError

EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
_LONGEST = 1000  # characters of an error

app = typer.Typer(
    name=PROGRAM,
    help="Run a language model that is bigger than your memory: "
    "every tensor where your machine runs it fastest.",
    epilog="Start with: tensortier run",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("serve")(serve.serve)
app.command("inspect")(inspect.inspect)
app.command("plan")(plan.plan)
app.command("hardware")(hardware.hardware)
app.command("trace")(trace.trace)
app.command("simulate")(simulate.simulate)
app.add_typer(models.app, name="models")
app.add_typer(backend.app, name="backend")


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import PackageNotFoundError, version

        def installed(package: str) -> str:
            try:
                return version(package)
            except PackageNotFoundError:
                return "(not installed)"

        print(f"{PROGRAM} {installed(PROGRAM)}, llama-cpp-python {installed('llama-cpp-python')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the versions and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the traceback of an unexpected error.")
    ] = False,
) -> None:
    del version  # handled by the callback, before anything else
    common.set_verbose(verbose)


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    # an argument of any length may be quoted in it
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


def _fail(message: str, code: int) -> int:
    print(f"{PROGRAM}: error: {_one_line(message)}", file=sys.stderr)
    return code


def _invoke(arguments: list[str]) -> None:
    # Not command.main(): that one turns Ctrl-C, a closed pipe and the end of input into its own exit codes.
    command = typer.main.get_command(app)
    with command.make_context(PROGRAM, arguments) as context:
        command.invoke(context)
    sys.stdout.flush()  # here, where a closed pipe is still handled


def _complete_streams() -> None:
    """Standard streams that the process was started without lead to nowhere, so that neither a message nor a
    file gets their numbers. Raises OSError where there is no standard output: a result would be lost."""
    lost = sys.stdout is None
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)  # normally the number that is free
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            stream = os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
    if lost:
        raise OSError("standard output is closed, and the result goes there")


def _show_warning(message: Warning | str, *_details: Any, **_more: Any) -> None:
    """A library's warning, as our own look."""
    common.note(f"tensortier: warning: {_one_line(str(message))}")


def execute(given: list[str]) -> int:
    """Run one command and return its exit code; see ``tensortier.cli.main``."""
    common.set_verbose(False)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.showwarning = _show_warning
        return _execute(given)


def _execute(given: list[str]) -> int:
    try:
        _complete_streams()
    except OSError as exc:
        return _fail(str(exc), 1)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a terminal that cannot show a character gets "?" instead of a crash
            reconfigure(errors="replace")
    try:
        _invoke(given or ["--help"])
    except typer.Exit as exc:
        return exc.exit_code
    except TensortierError as exc:
        return _fail(str(exc), exc.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The interpreter flushes standard output once more on its way out: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as exc:
        format_message = getattr(exc, "format_message", None)
        if format_message is not None:  # what the option parser raises, in every version of typer
            return _fail(format_message(), int(getattr(exc, "exit_code", 2)))
        if isinstance(exc, OSError):
            where = f"{exc.filename}: " if exc.filename else ""
            return _fail(f"{where}{exc.strerror}" if exc.strerror else str(exc), 1)
        if common.is_verbose():
            traceback.print_exc()
        return _fail(f"{type(exc).__name__}: {exc} (this is a bug; --verbose shows where)", 1)
    return 0
