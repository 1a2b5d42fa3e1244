"""What the kernel reads of a mapped model that main memory does not hold, and how long that takes.

llama.cpp maps the file without advice on single tensors and tells Linux that it reads in sequence, which doubles the
drive's read-ahead (``posix_fadvise``). A page that is missing then makes the kernel read a *window* of that size around
it. A quarter of a window behind the page lies a mark: who comes there makes it read the next window before it is asked
for, whose mark is its first page. So a matrix that is used brings in up to half a window in front of it and one or
more behind it, wanted or not.

For experts, of which a token uses some anywhere in the file, that is a renewal process. With the share p of experts
used, of m bytes each, and windows of W bytes: what one fault brings in reaches E bytes ahead (``_reach``); the next
expert in use that is not there begins g = m (1 - p) / p bytes further on average, and W / 2 of what lies between is
read with it. The share of a tensor that a token reads is then (E + g (1 - exp(-W / 2g))) / (E + g). For dense weights
it is everything.

Linux's page cache (two lists, not the multi-generational one) keeps a page that was used while it was in memory for
two rounds of its inactive list, and then on an active one, which may be sqrt(10 x GiB) times as large. Where all that a
token reads passes through the inactive list in fewer than those rounds, the active list fills with pages that are
needed again, and the rest is read past it. Else nothing is found: each page is dropped just before it is needed.

Checked against this kernel by ``bench/validate_mapped.py``; figures in docs/lab-log.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tensortier.types import ModelInfo, Role, Tensor

DEFAULT_READ_AHEAD = 128 << 10  # bytes: Linux's own where nothing else is set
_SEQUENTIAL = 2  # times the read-ahead, for who says that he reads in sequence
# To bring in a page: allocate, charge, map, and drop another one. 2 us for 4 KiB, by the system time of the runs in
# docs/lab-log.md.
KERNEL_SECONDS_PER_BYTE = 0.5e-9
_GIB = 1 << 30


@dataclass(frozen=True)
class Read:
    """From the drive, in one pass through the model."""

    nbytes: float
    windows: float  # asked for one after the other
    ahead: float  # share of the bytes in long runs, which are asked for well before they are used, 0 to 1

    def seconds(self, compute: float, bandwidth: float, latency: float) -> float:
        """Of the whole pass, that takes ``compute`` seconds with everything in memory, by a drive that gives its first
        byte after ``latency`` seconds and then ``bandwidth`` bytes/s. In long runs reading overlaps with computing and
        with the kernel's work; of what else is used, each window is made, read and waited for in turn."""
        drive = self.nbytes / bandwidth + self.windows * latency
        work = compute + self.nbytes * KERNEL_SECONDS_PER_BYTE
        return drive + work - self.ahead * min(drive, work)


@dataclass(frozen=True)
class _Part:
    """Of a tensor of experts, as one pass reads it where nothing is in memory."""

    share: float  # of the bytes
    windows: float  # per byte


def reads(
    model: ModelInfo, tensors: Iterable[Tensor], room: float, read_ahead: int, *, tokens: int = 1
) -> Read:
    """What a pass of ``tokens`` tokens reads of the mapped ``tensors``, once passes like it have been there before.

    Args:
        room: bytes of main memory for them.
        read_ahead: bytes, as the drive's is set.
    """
    window = float(_SEQUENTIAL * max(read_ahead, 4096))
    found = [t for t in tensors if model.tied_output or t.role is not Role.EMBEDDING]
    experts = [t for t in found if t.role.is_routed_expert]
    dense = float(sum(t.nbytes for t in found if not t.role.is_routed_expert))
    routed = float(sum(t.nbytes for t in experts))
    if dense + routed <= room:
        return Read(0.0, 0.0, 0.0)
    used = 1 - (1 - model.n_expert_used / max(1, model.n_expert)) ** tokens
    parts = [(t.nbytes, _part(t.nbytes / max(1, model.n_expert), used, window)) for t in experts]
    asked = sum(n * part.share for n, part in parts)
    dense_held, found_share = _held(dense, routed, asked, used * routed, room)
    left = dense * (1 - dense_held)
    from_experts = asked * (1 - found_share)
    total = left + from_experts
    ahead = left + from_experts * used  # runs of experts are as long as many are used
    return Read(
        total,
        left / window + (1 - found_share) * sum(n * part.windows for n, part in parts),
        ahead / total if total else 0.0,
    )


def _part(expert: float, used: float, window: float) -> _Part:
    around = window / 2
    reach = max(_reach(expert, window), expert)
    gap = expert * (1 - used) / used
    before = gap * (1 - math.exp(-around / gap)) if gap else 0.0
    cycle = reach + gap
    behind = reach - around if gap else reach  # asked for at a mark
    return _Part((reach + before) / cycle, (1 + behind / window) / cycle)


def _reach(wanted: float, window: float) -> float:
    """Bytes behind a fault that are read because the ``wanted`` ones behind it are used."""
    reach = window / 2
    if wanted > window / 4:  # the mark of the first window
        reach += window
        while wanted > reach - window:  # the first page of the next one
            reach += window
    return reach


def _held(dense: float, routed: float, asked: float, used: float, room: float) -> tuple[float, float]:
    """Shares of dense weights and of experts that a pass finds in memory, which asks for ``asked`` bytes of experts and
    uses ``used`` of them. What every pass uses is found where it is a small part of the room."""
    active = room * _active_share(room)
    held = 1.0 if dense <= active and routed else 0.0
    inner = room - dense * held
    flow = asked + dense * (1 - held)
    stays = 2 * inner / (1 + min(1.0, used / asked)) if asked else 0.0
    if stays < flow:
        return held, 0.0
    kept = max(0.0, active - dense * held) / routed
    rest = (1 - kept) * flow
    rounds = 2 * (room - active) / (rest * (1 + min(1.0, used / asked))) if rest else 1.0
    again = 1 - (1 - asked / routed) ** rounds if rounds >= 1 else 0.0
    return held, min(1.0, kept + (1 - kept) * again, inner / routed)


def _active_share(room: float) -> float:
    """Of a list of pages that may be active (``inactive_is_low`` in the kernel's mm/vmscan.c)."""
    gib = int(room / _GIB)
    ratio = math.isqrt(10 * gib) if gib else 1
    return ratio / (1 + ratio)
