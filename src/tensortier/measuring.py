"""What this machine achieves, for a plan: the measurement that is kept, or a new one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tensortier.errors import LibraryError, UsageError
from tensortier.types import Device, Hardware, Settings

if TYPE_CHECKING:
    from tensortier.calibrate import Calibration
    from tensortier.rates import Rates

SECONDS = 30  # that measuring takes on an idle machine; ``calibrate.LIMIT_SECONDS`` at most for each device
Say = Callable[[str], None]  # takes a warning, one line
# Where neither a measurement nor the user says it: two channels of DDR4-3200. Enough to choose a placement by, as
# main memory is far slower than a card's; not enough to promise a speed.
_ASSUMED_MAIN_MEMORY = 51.2e9


def kept(machine: Hardware, settings: Settings, say: Say) -> Rates | None:
    """From the measurement that is kept of this machine as it is now; None where there is none."""
    from tensortier import calibrate, rates

    found = calibrate.load(machine)
    return (
        None if found is None else _complete(rates.from_calibration(found, machine, settings), machine, say)
    )


def measured(
    machine: Hardware,
    settings: Settings,
    rpc: Sequence[str],
    say: Say,
    progress: Callable[[float], None] | None = None,
) -> Rates | None:
    """Measure this machine, with the servers ``rpc`` that are part of it, and keep that. None where a device cannot be
    measured. ``progress`` is called with the fraction done, 0 to 1."""
    from tensortier import calibrate, rates

    try:
        found = calibrate.calibrate(
            machine,
            rpc=rpc,
            progress=None if progress is None else lambda fraction, _what: progress(fraction),
        )
    except LibraryError as exc:
        say(f"this machine could not be measured, so no speeds are predicted: {exc}")
        return None
    keep(machine, found, say)
    return _complete(rates.from_calibration(found, machine, settings), machine, say)


def keep(machine: Hardware, found: Calibration, say: Say) -> None:
    """Write a measurement to the cache, or say why that was not possible: what was measured holds all the same."""
    from tensortier import calibrate

    try:
        calibrate.save(machine, found)
    except OSError as exc:
        reason = exc.strerror or str(exc)
        say(f"the measurement could not be kept in {calibrate.path(machine)}: {reason}")


def assumed(machine: Hardware) -> Rates | None:
    """To choose a placement by, not to promise a speed: the catalogue's figures of the cards that are here, and a
    usual main memory. None where a card is not in the catalogue."""
    from tensortier import catalogue, placement, rates

    offloaded = {card.name for card in placement.gpus(machine)}
    devices: list[Device] = []
    for device in machine.devices:
        if device.kind == "cpu":
            details = {**device.details, "bandwidth_bytes_per_s": _ASSUMED_MAIN_MEMORY}
        elif device.name in offloaded:
            try:
                card = catalogue.find_gpu(device.description)
            except UsageError:
                return None
            bandwidth = card.bandwidth_bytes_per_s or _ASSUMED_MAIN_MEMORY
            details = {**device.details, "bandwidth_bytes_per_s": bandwidth, "fp16_flops": card.fp16_flops}
            details |= {"fp32_flops": card.fp32_flops, "shares_main_memory": card.unified}
        else:
            continue
        devices.append(replace(device, details=details))
    found = rates.from_catalogue(replace(machine, devices=tuple(devices)))
    told = {name: replace(of, provenance="assumed") for name, of in found.devices.items()}
    return replace(found, devices=told)


def _complete(found: Rates, machine: Hardware, say: Say) -> Rates | None:
    """``found``, unless a device is missing that layers may go to."""
    from tensortier import placement

    missing = [c.name for c in placement.gpus(machine) if c.name not in found.devices]
    if not missing and "CPU" in found.devices:
        return found
    say(f"{', '.join(missing or ['CPU'])} could not be measured: no speeds are predicted")
    return None
