"""What a context has allocated, by llama.cpp's own account."""

from __future__ import annotations

from typing import Any

from tensortier._llama.libs import MemoryRow, native
from tensortier.errors import LibraryError
from tensortier.types import DeviceMemory


def allocated(context: Any) -> tuple[DeviceMemory, ...]:
    """Bytes per device of a context and its model; host memory (pinned, mapped and repacked too) is "CPU".
    Devices that hold nothing are left out.

    Where the file is mapped, the weights of the CPU are the mapped range from the first to the last tensor that
    stays there. Not counted, because llama.cpp does not: the output buffer for logits and a driver's own context.
    """
    rows = (MemoryRow * 64)()
    count = native().tt_memory_breakdown(context, rows, len(rows))
    if not 0 <= count <= len(rows):
        raise LibraryError(f"llama.cpp's memory breakdown has {count} rows; expected at most {len(rows)}")
    totals: dict[str, list[int]] = {}
    for row in rows[:count]:
        total = totals.setdefault(row.device.decode(), [0, 0, 0])
        for i, value in enumerate((row.weights, row.context, row.compute)):
            total[i] += value
    return tuple(DeviceMemory(name, *sizes) for name, sizes in sorted(totals.items()) if any(sizes))
