"""How many bytes of each memory a plan may fill."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tensortier import placement
from tensortier.rates import Rates
from tensortier.types import Device, DeviceMemory, Hardware

# Kept free on every GPU, as llama.cpp's own --fit does: its breakdown leaves out the driver's context and pools.
DEVICE_MARGIN = 1 << 30


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes of the devices that layers may be offloaded to, in llama.cpp's order, and of main memory."""

    free: Mapping[str, int]
    room: Mapping[str, int]  # free less a margin
    ram: int  # available now
    shared: frozenset[str] = frozenset()  # devices whose memory is part of main memory
    helpers: tuple[str, ...] = ()  # devices that take wide products of weights in main memory (op offload)
    left_out: tuple[str, ...] = ()  # devices of which no speed is known

    def ram_beside(self, rows: Sequence[DeviceMemory]) -> int:
        """Bytes of main memory that devices which share it leave to the CPU."""
        return self.ram - sum(r.total_bytes for r in rows if r.device in self.shared)

    def paged(self, rows: Sequence[DeviceMemory], *, pageable: bool) -> int | None:
        """Bytes of weights that main memory does not hold and that are read from the drive in turn; None where
        what cannot be paged does not fit either. ``pageable``: weights can (they are mapped from the file)."""
        cpu = next((r for r in rows if r.device == "CPU"), DeviceMemory("CPU", 0, 0, 0))
        over = max(0, cpu.total_bytes - self.ram_beside(rows))
        if over > cpu.weights_bytes or (over and not pageable):
            return None
        return over


def budget_of(hardware: Hardware, rates: Rates | None) -> Budget:
    """Of a machine. With ``rates``, devices without one are left out: nothing could be said of a plan with them."""
    gpus = placement.gpus(hardware)
    known = [d for d in gpus if rates is None or d.name in rates.devices]
    return Budget(
        {d.name: d.memory_free for d in known},
        {d.name: room(d) for d in known},
        hardware.ram_available,
        frozenset(d.name for d in known if _shares_main_memory(d)),
        tuple(d.name for d in known if rates is not None and rates.of(d.name).offloads),
        tuple(d.name for d in gpus if d not in known),
    )


def room(device: Device) -> int:
    """Bytes we may fill of a device: free memory less the margin, which on a small device is a tenth of it."""
    return max(0, device.memory_free - min(DEVICE_MARGIN, device.memory_total // 10))


def _shares_main_memory(device: Device) -> bool:
    return device.kind == "igpu" or device.backend == "MTL" or bool(device.details.get("shares_main_memory"))
