"""Commands as text that a shell splits back into the same words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence

from tensortier.errors import UsageError

_PLAIN = re.compile(r"[A-Za-z0-9_./:\\+-]+")


def quote(argv: Sequence[str], shell: str = "posix") -> str:
    """``argv`` on one line for ``shell``: "posix", "powershell" or "cmd".

    PowerShell: single quotes, in which nothing is special. cmd: double quotes, in which ``^``, ``|`` and ``&``
    are literal; only ``%NAME%`` of an existing variable would still be replaced.

    Raises:
        UsageError: an unknown shell, or a word that the shell cannot pass on (a double quote on Windows).
    """
    if shell not in _SHELLS:
        raise UsageError(f"unknown shell {shell!r}; one of: {', '.join(_SHELLS)}")
    if shell != "posix" and any('"' in word for word in argv):
        raise UsageError("a double quote in a file name or pattern cannot be passed on by this shell")
    return _SHELLS[shell](argv)


def _powershell(argv: Sequence[str]) -> str:
    command, *rest = (w if _PLAIN.fullmatch(w) else "'" + w.replace("'", "''") + "'" for w in argv)
    return " ".join([f"& {command}" if command.startswith("'") else command, *rest])


def _cmd(argv: Sequence[str]) -> str:
    # A backslash before the closing quote would escape it.
    return " ".join(w if _PLAIN.fullmatch(w) else '"' + re.sub(r"(\\+)$", r"\1\1", w) + '"' for w in argv)


_SHELLS: dict[str, Callable[[Sequence[str]], str]] = {
    "posix": shlex.join,
    "powershell": _powershell,
    "cmd": _cmd,
}
