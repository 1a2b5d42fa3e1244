"""The bytes of an answer's tokens as text: whole characters only, ended before the first stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Bytes in, text out, however the bytes are cut.

    What could still become a stop string is held back. The answer ends at the stop string that is complete first
    (of those that end together, the longest); neither it nor what follows is given out. Bytes that are not
    UTF-8 are left out.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max(map(len, self._stops), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._held = ""
        self.seen = 0  # characters that came in
        self.given = 0  # characters that were given out
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """Text that is certain now; nothing more once ``stopped`` is set."""
        return self._advance(self._decoder.decode(data))

    def finish(self) -> str:
        """What was held back, when no more bytes come."""
        text = self._advance(self._decoder.decode(b"", final=True))
        if not self.stopped:
            text += self._held
            self.given += len(self._held)
        self._held = ""
        return text

    def _advance(self, new: str) -> str:
        if self.stopped:
            return ""
        self.seen += len(new)
        text = self._held + new
        if not self._stops:
            self.given += len(text)
            return text
        end = self._first_stop(text)
        if end is not None:
            self.stopped = True
            text, self._held = text[:end], ""
        else:
            keep = self._undecided(text)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.given += len(text)
        return text

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string begins that is complete first."""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _undecided(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
