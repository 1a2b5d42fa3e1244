"""What is here: processor, memory, every ggml device, NVIDIA's own account of its cards, the drive of a path.

No native library is loaded: ggml is asked in a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensortier import errors, system
from tensortier.errors import LibraryError
from tensortier.types import Device, Hardware

if TYPE_CHECKING:
    from rich.console import Console

_DEVICES_COMMAND = (sys.executable, "-m", "tensortier._llama.devices")
_DEVICES_SECONDS = 120  # a GPU's driver may compile kernels when it is first asked


def probe(path: str | Path | None = None, *, rpc: Sequence[str] = ()) -> Hardware:
    """Look at this machine, and at the servers ``rpc`` ("host:port").

    ``path``: whose drive is reported; None means the current folder. Sizes are in bytes. Raises LibraryError
    when llama.cpp cannot be asked for its devices, a BackendError's reason included.
    """
    cpu, memory = system.cpu(), system.memory()
    devices, warnings = _devices(rpc)
    cards = _nvml_cards()
    return Hardware(
        cpu_model=cpu.model,
        architecture=platform.machine() or "unknown",
        physical_cores=cpu.physical_cores,
        logical_cores=cpu.logical_cores,
        performance_cores=cpu.performance_cores,
        usable_cpus=cpu.usable_cpus,
        cpu_features=cpu.features,
        ram_total=memory.total,
        ram_limit=memory.limit,
        ram_available=memory.available,
        swap_total=memory.swap_total,
        os=system.operating_system(),
        devices=_with_details(devices, cards),
        drives=(system.drive(Path.cwd() if path is None else path),),
        cards=cards,
        warnings=warnings,
    )


def to_json(hardware: Hardware) -> dict[str, Any]:
    """Only dicts, lists, strings and numbers. Sizes are in bytes."""
    return dataclasses.asdict(hardware)


def render(hardware: Hardware, console: Console) -> None:
    """Print it for a person."""
    from rich.markup import escape
    from rich.table import Table

    h = hardware
    cores = f"{h.physical_cores} cores, {h.logical_cores} threads"
    if h.performance_cores != h.physical_cores:
        cores += f", {h.performance_cores} performance cores"
    if h.usable_cpus != h.logical_cores:
        cores += f"; this process may use {h.usable_cpus} threads"
    ram = f"{_gib(h.ram_available)} available of {_gib(h.ram_total)}"
    if h.ram_limit < h.ram_total:
        ram += f"; this process is limited to {_gib(h.ram_limit)}"
    facts = Table.grid(padding=(0, 2))
    facts.add_row("Processor", escape(f"{h.cpu_model} ({h.architecture})"))
    facts.add_row("Cores", cores)
    facts.add_row("Instructions", " ".join(h.cpu_features) or "unknown")
    facts.add_row("Memory", ram)
    facts.add_row("Swap", _gib(h.swap_total) if h.swap_total else "none")
    facts.add_row("System", escape(h.os))
    for d in h.drives:
        facts.add_row("Drive", escape(f"{d.kind}, {_gib(d.free)} free of {_gib(d.total)}: {d.path}"))
        facts.add_row("", escape(f"{d.device} ({d.filesystem}) on {d.mount_point}"))
    console.print(facts)
    table = Table(
        "Device", "Kind", "Backend", "Free", "Memory", "Description", title="Devices", title_justify="left"
    )
    for device in h.devices:
        free, total = _device_memory(device.memory_free), _device_memory(device.memory_total)
        row = (device.name, device.kind, device.backend, free, total, device.description)
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    driven = [d.details.get("uuid") for d in h.devices if d.details]
    for card in h.cards:
        console.print(escape(_describe_card(card)))
    if h.cards and not driven and not any(d.backend in ("CUDA", "Vulkan") for d in h.devices):
        console.print("No backend drives the card: run `tensortier backend build cuda` (or vulkan)")
    for warning in h.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _device_memory(size: int) -> str:
    return _gib(size) if size else "unknown"  # backends report 0 where they cannot tell


def _describe_card(card: Mapping[str, Any]) -> str:
    def say(key: str, text: str) -> str:
        return text.format(card[key]) if key in card else ""

    link = ""
    if "pcie_generation" in card and "pcie_width" in card:
        link = f"PCIe {card['pcie_generation']}.0 x{card['pcie_width']}"
        if "pcie_generation_max" in card and "pcie_width_max" in card:
            link += f" (at most {card['pcie_generation_max']}.0 x{card['pcie_width_max']})"
    used = f"{_gib(card['memory_used'])} in use" if "memory_used" in card else ""
    parts = [
        say("name", "{}"),
        say("compute_capability", "compute capability {}"),
        used,
        link,
        say("power_limit_watts", "{:.0f} W"),
        say("driver", "driver {}"),
        say("cuda_version", "CUDA {}"),
    ]
    return ", ".join(p for p in parts if p)


def _devices(rpc: Sequence[str]) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    """ggml's devices and what it warns of, asked in a process of its own."""
    argv = [*_DEVICES_COMMAND, *rpc]
    try:
        answer = subprocess.run(argv, capture_output=True, text=True, timeout=_DEVICES_SECONDS, check=False)
    except subprocess.TimeoutExpired as exc:
        raise LibraryError(
            f"llama.cpp did not list its devices within {_DEVICES_SECONDS} s: a driver or an RPC server hangs"
        ) from exc
    if answer.returncode != 0:
        lines = answer.stderr.strip().splitlines()
        why = lines[-1] if lines else f"it ended with code {answer.returncode} and said nothing"
        raise LibraryError(f"llama.cpp could not list its devices: {why}")
    try:
        found = json.loads(answer.stdout)
        if "error" in found:
            raise getattr(errors, found["kind"])(found["error"])
        devices = tuple(Device(**row) for row in found["devices"])
        return devices, tuple(found["warnings"])
    except (ValueError, TypeError, KeyError) as exc:
        raise LibraryError(f"the list of llama.cpp's devices cannot be read: {exc!r}") from exc


def _nvml_cards() -> tuple[Mapping[str, Any], ...]:
    """NVIDIA's management library on every card; empty without a driver. What a card does not answer is
    left out."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()  # the normal case on a machine without NVIDIA's driver
    try:
        return tuple(_nvml_card(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as exc:
        raise LibraryError(f"NVIDIA's driver does not describe its cards: {exc}") from exc
    finally:
        pynvml.nvmlShutdown()


def _nvml_card(nvml: Any, index: int) -> Mapping[str, Any]:
    card = nvml.nvmlDeviceGetHandleByIndex(index)

    def cuda_version() -> str:
        number = nvml.nvmlSystemGetCudaDriverVersion_v2()
        return f"{number // 1000}.{number % 1000 // 10}"

    def capability() -> str:
        return ".".join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(card)))

    questions: dict[str, Callable[[], Any]] = {
        "name": lambda: _text(nvml.nvmlDeviceGetName(card)),
        "uuid": lambda: _text(nvml.nvmlDeviceGetUUID(card)),
        "pci_bus_id": lambda: _text(nvml.nvmlDeviceGetPciInfo(card).busId),
        "driver": lambda: _text(nvml.nvmlSystemGetDriverVersion()),
        "cuda_version": cuda_version,
        "compute_capability": capability,
        "memory_total": lambda: int(nvml.nvmlDeviceGetMemoryInfo(card).total),
        "memory_used": lambda: int(nvml.nvmlDeviceGetMemoryInfo(card).used),
        "pcie_generation": lambda: nvml.nvmlDeviceGetCurrPcieLinkGeneration(card),
        "pcie_generation_max": lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(card),
        "pcie_width": lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(card),
        "pcie_width_max": lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(card),
        "power_limit_watts": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1000,
    }
    answers: dict[str, Any] = {"index": index}
    for key, ask in questions.items():
        try:
            answers[key] = ask()
        except nvml.NVMLError:
            continue  # laptops and virtual cards do not answer everything
    return answers


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _with_details(devices: Sequence[Device], cards: Sequence[Mapping[str, Any]]) -> tuple[Device, ...]:
    """Give devices NVML's answers where it is certain which card is which: by PCI address, or, where ggml
    tells none, by a name that only one card and one device of the backend have."""
    names = [card.get("name") for card in cards]
    by_address = {_pci_address(card["pci_bus_id"]): card for card in cards if "pci_bus_id" in card}
    found = []
    for device in devices:
        same = sum(1 for d in devices if d.backend == device.backend and d.description == device.description)
        details = None
        if device.backend in ("CUDA", "Vulkan"):  # what a remote server offers is not one of our cards
            if device.device_id:
                details = by_address.get(_pci_address(device.device_id))
            elif same == 1 and names.count(device.description) == 1:
                details = cards[names.index(device.description)]
        found.append(device if details is None else dataclasses.replace(device, details=details))
    return tuple(found)


def _pci_address(text: str) -> str:
    """ggml writes the domain with four digits, NVML with eight."""
    domain, _, rest = text.casefold().partition(":")
    return f"{domain.lstrip('0') or '0'}:{rest}"
