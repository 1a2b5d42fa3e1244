"""The command line: parse, call one function, print.

One file per command. Everything heavy is imported inside the command that needs it, so that ``--help`` and a
mistyped option answer at once. Standard output carries the result only; standard error carries the rest.

This module imports next to nothing: signals are taken care of before the rest is imported.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType

PROGRAM = "tensortier"
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
# By default they end a process where it stands, and its temporary files stay behind.
_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A Ctrl-C. Where it breaks off code that runs through exec(), as the making of dataclasses and named
    tuples does, CPython remembers a plain KeyboardInterrupt even if it is handled later, and ends the process
    by the signal instead of returning its exit code (``run_eval_code_obj`` in pythonrun.c). It looks for that
    very class: this one is let pass."""


class Terminated(BaseException):
    """The process is to end: by ``kill``, or because its terminal has been closed."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


def _terminate(signum: int, frame: FrameType | None) -> None:
    del frame
    raise Terminated(signum)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise Interrupted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0; 1 for an error; 2 for a request that makes no sense as
    written; 130 after Ctrl-C; 143 and 129, without a word, after SIGTERM and SIGHUP. Not 0, and without a word, when
    the reader of standard output has gone.

    ``arguments`` are those after the program's name; None takes the process's own.
    """
    # Not where the signal is ignored, as of a job in the background, or handled by a caller in his own way;
    # outside of the main thread getsignal answers too, but nothing may be set.
    ours = _in_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ending = [s for s in _ENDING if _in_main_thread() and signal.getsignal(s) is signal.SIG_DFL]
    try:
        for number in ending:
            signal.signal(number, _terminate)
        if ours:
            signal.signal(signal.SIGINT, _interrupt)
        from tensortier.cli.app import execute

        code = execute(list(sys.argv[1:] if arguments is None else arguments))
        if ours:  # inside the block: a Ctrl-C may come until the moment it is set back
            # a program that is ending does not need to be told to end
            signal.signal(signal.SIGINT, signal.SIG_IGN if arguments is None else signal.default_int_handler)
        return code
    except KeyboardInterrupt:
        print(f"{PROGRAM}: error: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Terminated as exc:
        return exc.exit_code
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()
