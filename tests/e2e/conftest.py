"""What all tests of whole commands start from."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def programs_take_signals() -> Iterator[None]:
    """Where the tests run as a job in the background, or after nohup, signals are ignored, and what they start would
    inherit that: it could not be interrupted."""
    usual = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL, "SIGTERM": signal.SIG_DFL}
    changed = []
    for name, handler in usual.items():
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
            changed.append(number)
    yield
    for number in changed:
        signal.signal(number, signal.SIG_IGN)
