"""How long measuring may take, and what is done without where the machine is slow or busy."""

from __future__ import annotations

import time

LIMIT_SECONDS = 60.0  # for each device, and for the drive; an idle machine takes a quarter to a half of that
# Shares of the limit: a figure may be taken again while no more is spent than the first, and the second times the share
# of figures that are taken. So the rest has time to be taken once.
_AT_FIRST, _IN_ALL = 0.2, 0.6

clock = time.monotonic  # a stand-in in tests


class Pace:
    """Of the figures of one device, of which there are ``figures``. Its time begins with the first. What is under way
    when it is up is not broken off."""

    def __init__(self, figures: int = 0) -> None:
        self.figures = figures
        self._started: float | None = None
        self.taken = 0
        self.once = 0  # figures whose runs did not agree, and that were not taken again

    def next(self) -> bool:
        """Whether there is time for one more figure, which counts as taken then. There is for the first."""
        if self.over():
            return False
        self._started = clock() if self._started is None else self._started
        self.taken += 1
        return True

    def again(self) -> bool:
        """Whether there is time to take the figure under way again."""
        late = _AT_FIRST + _IN_ALL * self.taken / max(1, self.figures)
        if self._spent() <= late * LIMIT_SECONDS:
            return True
        self.once += 1
        return False

    def over(self) -> bool:
        return self._started is not None and self._spent() >= LIMIT_SECONDS

    def notes(self, device: str) -> list[str]:
        """What was done without, for the user."""
        found = []
        if self.taken < self.figures:
            found.append(
                f"measuring {device} was ended after {LIMIT_SECONDS:.0f} s with {self.taken} of {self.figures} "
                "figures: the others are estimated from these, with wide intervals"
            )
        if self.once:
            found.append(
                f"measuring {device} took long: {self.once} figures whose runs did not agree were not taken again, and "
                "have wide intervals"
            )
        return found

    def _spent(self) -> float:
        return 0.0 if self._started is None else clock() - self._started
