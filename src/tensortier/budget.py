"""How many bytes of each memory a plan may fill."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tensortier import placement
from tensortier.rates import Rates
from tensortier.types import Device, DeviceMemory, Hardware, ModelInfo, Settings

# Kept free on every GPU, as llama.cpp's own --fit does: its breakdown leaves out the driver's context and pools.
DEVICE_MARGIN = 1 << 30
PROCESS = "process"  # the row of a plan's memory for what the process takes beside the model
# Resident of a process that has loaded a model with a vocabulary of 49152 tokens, less what llama.cpp's breakdown
# says: 133 MiB. The vocabulary of llama.cpp's own files takes 170 to 530 bytes per token.
_PROGRAM_BYTES = 160 << 20  # Python, the bindings, llama.cpp's graphs, the store's bookkeeping
_VOCABULARY_BYTES = 512  # per token
_LOGIT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes of the devices that layers may be offloaded to, in llama.cpp's order, and of main memory."""

    free: Mapping[str, int]
    room: Mapping[str, int]  # free less a margin
    ram: int  # available now, less what the process itself takes
    shared: frozenset[str] = frozenset()  # devices whose memory is part of main memory
    helpers: tuple[str, ...] = ()  # devices that take wide products of weights in main memory (op offload)
    left_out: tuple[str, ...] = ()  # devices of which no speed is known
    process: int = 0  # bytes of main memory for the process beside the model

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


def process_bytes(model: ModelInfo, settings: Settings) -> int:
    """Of main memory, that the process takes beside what llama.cpp's breakdown tells: the program, the vocabulary, and
    the logits of each sequence."""
    logits = _LOGIT_BYTES * model.n_vocab * settings.n_seq_max
    return _PROGRAM_BYTES + _VOCABULARY_BYTES * model.n_vocab + logits


def budget_of(
    hardware: Hardware,
    rates: Rates | None,
    model: ModelInfo | None = None,
    settings: Settings = Settings(),  # noqa: B008 - frozen
) -> Budget:
    """Of a machine, for a process with ``model`` (None: its whole main memory). With ``rates``, devices without one are
    left out: nothing could be said of a plan with them."""
    process = 0 if model is None else process_bytes(model, settings)
    gpus = placement.gpus(hardware)
    known = [d for d in gpus if rates is None or d.name in rates.devices]
    return Budget(
        {d.name: d.memory_free for d in known},
        {d.name: room(d) for d in known},
        max(0, hardware.ram_available - process),
        frozenset(d.name for d in known if _shares_main_memory(d)),
        tuple(d.name for d in known if rates is not None and rates.of(d.name).offloads),
        tuple(d.name for d in gpus if d not in known),
        process,
    )


def room(device: Device) -> int:
    """Bytes we may fill of a device: free memory less the margin, which on a small device is a tenth of it."""
    return max(0, device.memory_free - min(DEVICE_MARGIN, device.memory_total // 10))


def _shares_main_memory(device: Device) -> bool:
    return device.kind == "igpu" or device.backend == "MTL" or bool(device.details.get("shares_main_memory"))
