"""A measurement of this machine that nobody made: tests of what is done with one need not wait for it.

Its figures are round and of the right size, not those of any machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

from tensortier import calibrate, paths
from tensortier.calibrate.records import (
    Attention,
    Calibration,
    Copy,
    Elementwise,
    LayerCost,
    Product,
    Split,
    fingerprint,
)
from tensortier.types import Hardware

CPU_BYTES_PER_SECOND = 20e9
GPU_BYTES_PER_SECOND = 200e9


def made_up(hardware: Hardware) -> Calibration:
    """Every GPU ten times as fast as the CPU, over a link of 10 GB/s."""
    tables: dict[type[Any], list[Any]] = {}
    threads = max(1, min(hardware.performance_cores, hardware.usable_cpus))

    def add(kind: type[Any], **values: object) -> None:
        values = {"threads": threads, "spread": 0.05, **values}
        known = {f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}
        tables.setdefault(kind, []).append(kind(**known))

    for device in hardware.devices:
        on_cpu = device.kind == "cpu"
        speed = CPU_BYTES_PER_SECOND if on_cpu else GPU_BYTES_PER_SECOND
        for kind, batch, repacked, experts, columns in itertools.product(
            ("F16", "Q8_0", "Q6_K", "Q4_K", "Q4_1", "Q4_0"),
            (1, 128),
            (False, True) if on_cpu else (False,),
            (False, True),
            (1024, 4096),
        ):
            add(
                Product,
                device=device.name,
                type=kind,
                columns=columns,
                batch=batch,
                experts=experts,
                repacked=repacked,
                bytes_per_second=speed / batch**0.5,
            )
        for kind, batch, cells in itertools.product(("F16", "Q8_0"), (1, 128), (256, 8192)):
            add(
                Attention,
                device=device.name,
                type=kind,
                head_dim=128,
                cells=cells,
                batch=batch,
                elements_per_second=speed / 2,
            )
        add(
            LayerCost,
            device=device.name,
            layer_seconds=50e-6,
            moe_layer_seconds=50e-6,
            token_seconds=500e-6,
        )
        add(Elementwise, device=device.name, seconds=1e-9)
        if not on_cpu:
            add(Copy, device=device.name, to_device=True, pinned=True, bytes_per_second=10e9)
            for experts in (False, True):
                add(Split, device=device.name, experts=experts, seconds=50e-6)
    return Calibration(
        fingerprint(hardware),
        0.0,
        products=tuple(tables[Product]),
        attention=tuple(tables[Attention]),
        layers=tuple(tables[LayerCost]),
        elementwise=tuple(tables[Elementwise]),
        copies=tuple(tables.get(Copy, ())),
        splits=tuple(tables.get(Split, ())),
    )


def environment(folder: Path, *machines: Hardware) -> dict[str, str]:
    """Of a process whose cache is ``folder``: it holds a measurement of each of ``machines``, and the backends that
    were built."""
    cache = folder / "tensortier"
    cache.mkdir(parents=True, exist_ok=True)
    backends, built = cache / "backends", paths.cache_dir() / "backends"
    built.mkdir(parents=True, exist_ok=True)  # else the link leads nowhere until something is built
    if not backends.is_symlink():
        backends.symlink_to(built, target_is_directory=True)
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        for machine in machines:
            calibrate.save(machine, made_up(machine))
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before
    return {**os.environ, "XDG_CACHE_HOME": str(folder)}


def measured(home: Path, *machines: Hardware) -> Path:
    """``home``, with a measurement of each of ``machines`` in its cache."""
    environment(home / ".cache", *machines)
    return home
