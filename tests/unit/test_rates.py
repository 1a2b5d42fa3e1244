"""Rates from a calibration: figures made from known speeds must give those speeds back."""

from __future__ import annotations

import dataclasses

import pytest

from tensortier import catalogue, rates
from tensortier.calibrate.records import Attention, Calibration, Copy, DriveRead, LayerCost, Product, Split
from tensortier.types import Device, Drive, Hardware, Settings

GB = 1e9
SETTINGS = Settings(threads=8)
Q8_BYTES = 34 / 32  # per weight


def machine() -> Hardware:
    hardware = catalogue.hypothetical(["RTX 4060 8GB"], 32 << 30, cpu_bandwidth=60, cores=8)
    cpu = Device("CPU", "cpu", "some processor", 32 << 30, 30 << 30, "CPU")
    return dataclasses.replace(hardware, devices=(cpu, *hardware.devices[1:]))


def product(
    speed: float, *, threads: int = 8, columns: int = 4096, batch: int = 1, experts: bool = False,
    repacked: bool = False, kind: str = "Q8_0",
) -> Product:  # fmt: skip
    return Product("CPU", kind, threads, columns, batch, experts, repacked, speed, 0.01)


def calibration(*products: Product) -> Calibration:
    return Calibration(
        "",
        1.0,
        products,
        (
            Attention("CPU", "F16", 8, 128, 512, 1, 20 * GB, 0.0),
            Attention("CPU", "F16", 8, 128, 8192, 1, 10 * GB, 0.0),
            Attention("CPU", "F16", 1, 128, 512, 1, 4 * GB, 0.0),
        ),
        (LayerCost("CPU", 8, 3e-5, 1e-5, 1e-4, 0.0),),
        copies=(Copy("CUDA0", True, False, 6 * GB, 0.0), Copy("CUDA0", True, True, 12 * GB, 0.0)),
        splits=(Split("CUDA0", False, 1e-4, 0.0),),
        drives=(DriveRead("/", 1 << 20, 1, GB), DriveRead("/", 1 << 20, 4, 2 * GB)),
    )


def test_bytes_along_a_row_and_the_cost_of_a_row() -> None:
    """A kernel of 40 GB/s that spends 100 ns more on every row, measured on rows of 4096 and 512 weights."""

    def measured(columns: int) -> float:
        size = columns * Q8_BYTES
        return size / (size / (40 * GB) + 100e-9)

    rows = (product(measured(4096)), product(measured(512), columns=512), product(GB, batch=256))
    cpu = rates.from_calibration(calibration(*rows), machine(), SETTINGS).of("CPU")
    assert cpu.narrow["Q8_0"].value == pytest.approx(40 * GB)
    assert cpu.narrow["Q8_0"].row_seconds == pytest.approx(100e-9)
    assert cpu.narrow["Q8_0"].seconds(1e6, 10) == pytest.approx(1e6 / (40 * GB) + 1e-6)


def test_wide_products_count_multiply_adds() -> None:
    """One GB of Q8_0 is 32/34 G weights; with 256 columns each is multiplied 256 times."""
    rows = (product(40 * GB), product(0.5 * GB, batch=256), product(0.2 * GB, batch=256, experts=True))
    cpu = rates.from_calibration(calibration(*rows), machine(), SETTINGS).of("CPU")
    assert cpu.wide["Q8_0"].value == pytest.approx(0.5 * GB / Q8_BYTES * 256)
    assert cpu.wide_experts["Q8_0"].value == pytest.approx(0.2 * GB / Q8_BYTES * 256)


@pytest.mark.parametrize(("repack", "speed"), [(True, 34 * GB), (False, 18 * GB)])
def test_the_kernel_that_llama_cpp_takes(repack: bool, speed: float) -> None:
    rows = (
        product(18 * GB, kind="Q4_0"),
        product(34 * GB, kind="Q4_0", repacked=True),
        product(GB, kind="Q4_0", batch=256),
    )
    settings = dataclasses.replace(SETTINGS, repack=repack)
    cpu = rates.from_calibration(calibration(*rows), machine(), settings).of("CPU")
    assert cpu.narrow["Q4_0"].value == pytest.approx(speed)


def test_fewer_threads_lie_between_one_and_all() -> None:
    rows = (product(40 * GB), product(10 * GB, threads=1), product(GB, batch=256))
    found = calibration(*rows)
    speeds = [
        rates.from_calibration(found, machine(), Settings(threads=n)).of("CPU").narrow["Q8_0"].value
        for n in (1, 2, 4, 8)
    ]
    assert speeds[0] == pytest.approx(10 * GB)
    assert speeds[3] == pytest.approx(40 * GB)
    assert speeds == sorted(speeds)
    one = rates.from_calibration(found, machine(), Settings(threads=1)).of("CPU")
    assert one.attention[0].speed.value == pytest.approx(4 * GB)


def test_a_card_that_was_not_measured_has_the_catalogue_s_figures() -> None:
    found = rates.from_calibration(calibration(product(GB), product(GB, batch=256)), machine(), SETTINGS)
    assert found.of("CPU").provenance == "measured"
    assert found.of("CUDA0").provenance == "catalogue"
    assert found.drive is not None and found.drive.value == 2 * GB


def test_a_described_machine() -> None:
    """An RTX 4060 has 272 GB/s (NVIDIA's data sheet); what is reached of it is assumed and said."""
    hardware = catalogue.hypothetical(["RTX 4060 8GB"], 32 << 30, cpu_bandwidth=60)
    found = rates.from_catalogue(hardware)
    card, cpu = found.of("CUDA0"), found.of("CPU")
    assert card.memory.value == pytest.approx(272 * GB * rates.GPU_BANDWIDTH_SHARE)
    assert cpu.memory.value == pytest.approx(60 * GB * rates.CPU_BANDWIDTH_SHARE)
    assert card.offloads and not cpu.offloads
    assert any("assumed" in note for note in card.notes)


def test_reads_that_are_nearly_as_fast_as_the_best_with_the_least_under_way() -> None:
    """Of 8 to 16 MiB in reads of one at most: 2.6 GB/s is the best of those, 2.5 is nearly that with half as much, and
    what is faster takes more."""
    mib = 1 << 20
    rows = {(1, 1): 1.0, (1, 4): 2.6, (1, 8): 2.5, (1, 16): 2.6, (4, 4): 3.0, (4, 16): 4.0, (0.5, 16): 2.5}
    drives = tuple(DriveRead("/", int(b * mib), d, speed * GB) for (b, d), speed in rows.items())
    there = tuple(dataclasses.replace(d, mount_point="/data", bytes_per_second=GB) for d in drives)
    base = calibration(product(GB), product(GB, batch=256))
    here = machine()
    found = rates.from_calibration(dataclasses.replace(base, drives=drives), here, SETTINGS)
    assert found.reads == rates.Reads(8, mib)
    assert found.drive is not None and found.drive.value == 2.5 * GB
    assert found.drive_latency == pytest.approx(mib / GB - mib / (2.5 * GB))
    # the drive that the model is on, where it is among those that were measured
    models = dataclasses.replace(here, drives=(catalogue_drive("/data"),))
    both = rates.from_calibration(dataclasses.replace(base, drives=drives + there), models, SETTINGS)
    assert both.drive is not None and both.drive.value == GB
    none = rates.from_calibration(dataclasses.replace(base, drives=()), here, SETTINGS)
    assert none.drive is None and none.reads is None


def catalogue_drive(mount: str) -> Drive:
    return Drive(mount, mount, "", "ext4", "nvme", 1 << 40, 1 << 39)


def test_plain_kernels_are_kept_beside_the_reordered_ones() -> None:
    rows = (
        product(20 * GB), product(5 * GB, batch=256), product(40 * GB, repacked=True),
        product(9 * GB, batch=256, repacked=True),
    )  # fmt: skip
    found = rates.from_calibration(calibration(*rows), machine(), SETTINGS)
    assert found.of("CPU").narrow["Q8_0"].value == pytest.approx(40 * GB)
    assert found.of("TIER").narrow["Q8_0"].value == pytest.approx(20 * GB)
    assert found.kernels(repack=False).of("CPU") == found.of("TIER")
    assert found.kernels(repack=True) == found
