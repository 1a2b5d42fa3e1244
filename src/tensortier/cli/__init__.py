"""The command line: parse, call one function, print.

One file per command. Everything heavy is imported inside the command that needs it, so that ``--help`` and a
mistyped option answer at once. Standard output carries the result only; standard error carries the rest.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from tensortier.cli import backend, common, hardware, inspect, models, run
from tensortier.errors import TensortierError

PROGRAM = "tensortier"
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

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
app.command("inspect")(inspect.inspect)
app.command("hardware")(hardware.hardware)
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
    return " ".join(message.split())


def _fail(message: str, code: int) -> int:
    print(f"{PROGRAM}: error: {_one_line(message)}", file=sys.stderr)
    return code


def _invoke(arguments: list[str]) -> None:
    # Not command.main(): that one turns Ctrl-C, a closed pipe and the end of input into its own exit codes.
    command = typer.main.get_command(app)
    with command.make_context(PROGRAM, arguments) as context:
        command.invoke(context)
    sys.stdout.flush()  # here, where a closed pipe is still handled


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0; 1 for an error; 2 for a request that makes no sense as
    written; 130 after Ctrl-C. Not 0, and without a word, when the reader of standard output has gone.

    ``arguments`` are those after the program's name; None takes the process's own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    common.set_verbose(False)
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
            return _fail(str(exc), 1)
        if common.is_verbose():
            traceback.print_exc()
        return _fail(f"{type(exc).__name__}: {exc} (this is a bug; --verbose shows where)", 1)
    return 0
