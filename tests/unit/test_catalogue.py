"""The catalogue: its figures against data sheets, white papers and standards, names as people type them,
and machines made of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import tensortier
from tensortier import catalogue
from tensortier.catalogue import CatalogueGpu, find_drive, find_gpu, find_link, find_memory, hypothetical
from tensortier.errors import UsageError

GIB = 2**30

# Operations per clock and multiprocessor on FP16 tensor cores, dense, FP16 accumulation (NVIDIA's white papers)
TENSOR_RATE = {"Volta": 1024, "Turing": 1024, "Ampere": 1024, "GA100": 2048, "Ada": 1024, "Blackwell": 1024}
# FP32 operations per clock and unit
VECTOR_RATE = {
    **{"Volta": 128, "Turing": 128, "GA100": 128, "Pascal": 256, "Ampere": 256, "Ada": 256, "Blackwell": 256},
    **{"RDNA2": 128, "RDNA3": 256, "RDNA4": 256, "CDNA": 128, "CDNA2": 128, "Vega": 128},
}

# From vendors' data sheets, typed here a second time: name, GB, GB/s, TFLOPS (dense FP16; None: not checked)
DATA_SHEETS = [
    ("RTX 5090", 32, 1792, 419),
    ("RTX 5080", 16, 960, 225),
    ("RTX 5070 Ti", 16, 896, 176),
    ("RTX 5060 Ti 16GB", 16, 448, 95),
    ("RTX 4090", 24, 1008, 330.3),
    ("RTX 4080 SUPER", 16, 736, None),
    ("RTX 4070 Ti SUPER", 16, 672, None),
    ("RTX 4060", 8, 272, None),
    ("RTX 3090", 24, 936, 142),
    ("RTX 3080 10GB", 10, 760, 119),
    ("RTX 3060 12GB", 12, 360, None),
    ("RTX 2080 Ti", 11, 616, 107.6),
    ("GTX 1660 Ti", 6, 288, 11),
    ("RTX 4090 Laptop", 16, 576, None),
    ("RTX 4060 Laptop", 8, 256, None),
    ("RTX 3080 Ti Laptop", 16, 512, None),
    ("Tesla P40", 24, 347, None),
    ("Tesla T4", 16, 320, 65),
    ("V100 PCIe 32GB", 32, 900, 112),
    ("A100 SXM 80GB", 80, 2039, 312),
    ("A100 PCIe 40GB", 40, 1555, 312),
    ("A40", 48, 696, 149.7),
    ("L4", 24, 300, 121),
    ("L40S", 48, 864, 362),
    ("H100 SXM", 80, 3350, 989),
    ("H200", 141, 4800, 989),
    ("RTX A6000", 48, 768, 154.8),
    ("RTX 6000 Ada", 48, 960, 364),
    ("RX 7900 XTX", 24, 960, 122.8),
    ("RX 7900 XT", 20, 800, 103),
    ("RX 6800 XT", 16, 512, 41.5),
    ("RX 9070 XT", 16, 640, 195),
    ("Radeon PRO W7900", 48, 864, 122.6),
    ("MI300X", 192, 5300, 1307),
    ("MI100", 32, 1228, 184.6),
    ("Arc B580", 12, 456, None),
    ("Arc A770 16GB", 16, 560, None),
    ("M1 Max 64GB", 64, 400, None),
    ("M2 Ultra 192GB", 192, 800, None),
    ("M3 Ultra 512GB", 512, 819, None),
    ("M4 Pro 48GB", 48, 273, None),
    ("M4 Max 128GB", 128, 546, None),
    ("Radeon 8060S 128GB", 128, 256, None),
]

SPELLINGS = [
    ("4090", "GeForce RTX 4090"),
    ("rtx4090", "GeForce RTX 4090"),
    ("RTX-4090", "GeForce RTX 4090"),
    ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
    ("NVIDIA GEFORCE RTX™ 4090 24 GB", "GeForce RTX 4090"),
    ("geforce 3090ti", "GeForce RTX 3090 Ti"),
    ("RTX 4060 8GB", "GeForce RTX 4060"),
    ("RTX 4060 8 GiB", "GeForce RTX 4060"),
    ("rtx 3060 12gb", "GeForce RTX 3060 12GB"),
    ("3060 8g", "GeForce RTX 3060 8GB"),
    ("RTX 4060Ti 16G", "GeForce RTX 4060 Ti 16GB"),
    ("rtx-4060-ti-8gb", "GeForce RTX 4060 Ti 8GB"),
    ("rtx4060ti16gb", "GeForce RTX 4060 Ti 16GB"),
    ("2060 super", "GeForce RTX 2060 SUPER"),
    ("RTX 2060 12GB", "GeForce RTX 2060 12GB"),
    ("1660 ti", "GeForce GTX 1660 Ti"),
    ("4070 ti super", "GeForce RTX 4070 Ti SUPER"),
    ("RTX 4060 laptop", "GeForce RTX 4060 Laptop GPU"),
    ("RTX 4070 Mobile", "GeForce RTX 4070 Laptop GPU"),
    ("NVIDIA GeForce RTX 3080 Laptop GPU 16GB", "GeForce RTX 3080 Laptop GPU 16GB"),
    ("RTX 3080 16GB Laptop", "GeForce RTX 3080 Laptop GPU 16GB"),
    ("P40", "Tesla P40"),
    ("tesla t4", "T4"),
    ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
    ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
    ("h100 pcie", "H100 PCIe 80GB"),
    ("NVIDIA H200", "H200"),
    ("A6000", "RTX A6000"),
    ("RTX 6000 Ada", "RTX 6000 Ada Generation"),
    ("Quadro RTX 8000", "Quadro RTX 8000"),
    ("RTX PRO 6000 Max-Q", "RTX PRO 6000 Blackwell Max-Q"),
    ("AMD Radeon RX 7900 XTX", "Radeon RX 7900 XTX"),
    ("7900xtx", "Radeon RX 7900 XTX"),
    ("rx 6700xt", "Radeon RX 6700 XT"),
    ("9060 XT 16 GB", "Radeon RX 9060 XT 16GB"),
    ("W7800 48GB", "Radeon PRO W7800 48GB"),
    ("mi50 32gb", "Instinct MI50 32GB"),
    ("AMD Instinct MI300X", "Instinct MI300X"),
    ("Intel Arc B580 Graphics", "Arc B580"),
    ("a770 16gb", "Arc A770 16GB"),
    ("Apple M1", "M1"),
    ("m2 ultra 64 GB", "M2 Ultra"),
    ("M3 Max 96GB", "M3 Max (30-core GPU)"),
    ("M4 Max 40-core GPU", "M4 Max (40-core GPU)"),
    ("Ryzen AI Max+ 395", "Radeon 8060S"),
    ("890M", "Radeon 890M"),
]


def test_every_entry_has_a_name_of_its_own_and_a_source() -> None:
    assert len(catalogue.gpus()) >= 40
    assert {g.vendor for g in catalogue.gpus()} == {"nvidia", "amd", "intel", "apple"}
    for table in (catalogue.gpus(), catalogue.memories(), catalogue.drives(), catalogue.links()):
        names = [entry.name for entry in table]
        assert len(set(names)) == len(names)
        assert all(len(entry.source) > 10 for entry in table)


@pytest.mark.parametrize("card", catalogue.gpus(), ids=lambda g: g.name)
def test_figures_of_a_card_agree_with_each_other(card: CatalogueGpu) -> None:
    if card.bus_width_bits and card.data_rate_gbps:
        assert card.bandwidth_bytes_per_s is not None
        derived = card.bus_width_bits * card.data_rate_gbps * 1e9 / 8
        # Apple rounds down: 200 GB/s for 256 bits of LPDDR5-6400
        tolerance = 0.025 if card.vendor == "apple" else 0.015
        assert card.bandwidth_bytes_per_s == pytest.approx(derived, rel=tolerance)
    else:
        assert card.bandwidth_bytes_per_s is None and card.unified
    if card.boost_clock_hz and card.compute_units and card.fp32_flops:
        derived = VECTOR_RATE[card.architecture] * card.compute_units * card.boost_clock_hz
        assert card.fp32_flops == pytest.approx(derived, rel=0.002)
        if card.fp16_kind == "tensor":
            derived = TENSOR_RATE[card.architecture] * card.compute_units * card.boost_clock_hz
            assert card.fp16_flops == pytest.approx(derived, rel=0.015)
        if card.fp16_kind == "vector" and card.vendor != "apple":
            assert card.fp16_flops == pytest.approx(2 * card.fp32_flops, rel=0.015)
    assert (card.fp16_flops is None) == (card.fp16_kind is None)
    assert card.fp16_kind in (None, "tensor", "matrix", "vector")
    if card.fp16_flops and card.int8_ops:
        assert 0.99 <= card.int8_ops / card.fp16_flops <= 2.03
    if card.unified:
        assert card.memory_bytes is None and card.link_lanes is None
    else:
        assert card.memory_bytes is not None and 4 * GIB <= card.memory_bytes <= 192 * GIB
        assert card.link_generation in (3, 4, 5) and card.link_lanes in (4, 8, 16)
        assert card.memory_options_bytes == ()
    if card.bandwidth_bytes_per_s:
        assert 50e9 < card.bandwidth_bytes_per_s < 8e12
    assert card.fp16_flops is None or 4e12 < card.fp16_flops < 3e15
    assert card.fp32_flops is None or 2e12 < card.fp32_flops < 2e14


@pytest.mark.parametrize(("name", "gigabytes", "bandwidth", "teraflops"), DATA_SHEETS)
def test_figures_of_data_sheets(name: str, gigabytes: int, bandwidth: int, teraflops: float | None) -> None:
    card = find_gpu(name)
    assert card.memory_bytes == gigabytes * GIB
    assert card.bandwidth_bytes_per_s == pytest.approx(bandwidth * 1e9, rel=0.006)
    if teraflops is not None:
        assert card.fp16_flops == pytest.approx(teraflops * 1e12, rel=0.015)


def test_memory_of_standards() -> None:
    for memory in catalogue.memories():
        assert (
            memory.bandwidth_bytes_per_s * 8 == memory.transfers_per_s * memory.channels * memory.channel_bits
        )
    # processor makers' own figures
    published = {"EPYC 9004": 460.8, "EPYC 7003": 204.8, "EPYC 9005": 614.4, "Threadripper PRO 7000WX": 332.8}
    published |= {
        "DDR4-3200 x2": 51.2,
        "DDR5-5600 x2": 89.6,
        "LPDDR5X-8000 256-bit": 256,
        "Cascade Lake": 140.8,
    }
    for name, gigabytes_per_s in published.items():
        assert find_memory(name).bandwidth_bytes_per_s == pytest.approx(gigabytes_per_s * 1e9, rel=0.001)


def test_links_and_drives_of_standards() -> None:
    """PCI-SIG's figures: 15.75, 31.5 and 63 GB/s with 16 lanes."""
    for generation, gigabytes_per_s in ((3, 15.754), (4, 31.508), (5, 63.015)):
        for lanes in (1, 2, 4, 8, 16):
            link = find_link(f"PCIe {generation}.0 x{lanes}")
            expected = gigabytes_per_s * 1e9 * lanes / 16
            assert link.bandwidth_bytes_per_s == pytest.approx(expected, rel=1e-4)
        drive = find_drive(f"NVMe gen {generation}")
        assert drive.read_bytes_per_s == pytest.approx(gigabytes_per_s * 1e9 / 4, rel=1e-4)
    assert find_drive("sata ssd").read_bytes_per_s == 600e6
    order = ["hdd 5400 rpm", "HDD", "eMMC", "usb 3", "SSD", "USB 3.2 Gen 2", "nvme gen3", "NVMe PCIe 5.0 x4"]
    speeds = [find_drive(name).read_bytes_per_s for name in order]
    assert speeds == sorted(speeds)
    assert {d.kind for d in catalogue.drives()} <= {"nvme", "ssd", "hdd"}


@pytest.mark.parametrize(("typed", "name"), SPELLINGS)
def test_names_as_people_type_them(typed: str, name: str) -> None:
    assert find_gpu(typed).name == name


def test_every_card_is_found_by_its_own_name() -> None:
    for card in catalogue.gpus():
        assert find_gpu(card.name) == card


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("RTX 3060", "GeForce RTX 3060 8GB or GeForce RTX 3060 12GB"),
        ("4060 Ti", "RTX 4060 Ti 8GB or GeForce RTX 4060 Ti 16GB"),
        ("A100", "A100 PCIe 40GB, A100 PCIe 80GB, A100 SXM 40GB or A100 SXM 80GB"),
        ("A100 80GB", "A100 PCIe 80GB or A100 SXM 80GB"),
        ("M4 Max", r"32-core GPU\) with 36 GB or .*40-core GPU\) with 48, 64 or 128 GB"),
        ("RTX 4060 16GB", "not sold with 16 GB, but with 8 GB"),
        ("RTX 3060 6GB", "but with 8 or 12 GB"),
        ("M2 Ultra 100GB", "64, 128 or 192 GB"),
        ("RTX 4095", "nearest are .*RTX 4090"),
        ("RTX 6000", "nearest are Quadro RTX 6000, .*RTX 6000 Ada"),
        ("RX 7900 XTZ", "nearest are .*Radeon RX 7900 XTX"),
        ("A10G", "no card 'A10G'"),
        ("Voodoo 2", "nothing in the catalogue is like it"),
        ("GPU", "no card 'GPU'"),
        ("8GB", "no card '8GB'"),
        ("", "no card ''"),
        ("RTX 3060 8GB 12GB", "two memory sizes"),
    ],
)
def test_cards_that_cannot_be_told(typed: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        find_gpu(typed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB),
        ("8GB", 8 * 10**9),
        ("8g", 8 * GIB),
        ("8192MiB", 8 * GIB),
        ("1.5TiB", 1536 * GIB),
        (" 24 gib ", 24 * GIB),
        ("512kB", 512_000),
        ("100m", 100 * 2**20),
        ("0", 0),
        ("4096", 4096),
        ("0.1GB", 10**8),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert catalogue.parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "-1GiB", "nan", "inf", "NaNGB", "GiB", "8 apples", "8Gb8", "1e9", "0x10", "9" * 400, "٣GB"],
)
def test_sizes_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="write it like 8GiB"):
        catalogue.parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ddr5-6000 x2", "DDR5-6000 x2"),
        ("2x DDR4-3200", "DDR4-3200 x2"),
        ("dual channel DDR4 3200", "DDR4-3200 x2"),
        ("DDR5-5600 MHz, single-channel memory", "DDR5-5600 x1"),
        ("DDR5 4800 MT/s 12 channels", "DDR5-4800 x12"),
        ("8ch ddr4-2666", "DDR4-2666 x8"),
        ("LPDDR5X-7500 128 bit", "LPDDR5X-7500 128-bit"),
        ("epyc 9004", "EPYC 9004"),
        ("Genoa", "EPYC 9004"),
    ],
)
def test_main_memory_as_people_type_it(text: str, name: str) -> None:
    assert find_memory(text).name == name


@pytest.mark.parametrize(
    ("find", "text", "message"),
    [
        (find_memory, "DDR4-3200", "how many channels.*'DDR4-3200 x2'"),
        (find_memory, "LPDDR5X-8000", "how wide is its bus.*128-bit"),
        (find_memory, "LPDDR5X-8000 x2", "not understood"),
        (find_memory, "DDR5-6000 x3", "nearest are .*DDR5-6000 x2"),
        (find_memory, "DDR4-1234 x2", "no DDR4-1234 x2"),
        (find_memory, "DDR5-6000 x2 cheap", "not understood"),
        (find_memory, "DDR5", "not understood"),
        (find_memory, "EPYC 9005X", "nearest are .*EPYC 9005"),
        (find_drive, "NVMe", "NVMe PCIe 3.0 x4, NVMe PCIe 4.0 x4 or NVMe PCIe 5.0 x4"),
        (find_drive, "floppy", "no drive 'floppy'"),
        (find_link, "PCIe 9.0 x4", "nearest are PCIe"),
        (find_link, "", "no link ''"),
    ],
)
def test_parts_that_cannot_be_told(find: object, text: str, message: str) -> None:
    assert callable(find)
    with pytest.raises(UsageError, match=message):
        find(text)


def test_a_machine_with_one_card() -> None:
    machine = hypothetical(["RTX 4060 8GB"], 32 * GIB, cpu_bandwidth=60, cores=6, drive="NVMe gen 4")
    cpu, card = machine.devices
    assert (cpu.name, cpu.kind, cpu.memory_total) == ("CPU", "cpu", 32 * GIB)
    assert cpu.details["bandwidth_bytes_per_s"] == 60e9
    assert machine.ram_available == cpu.memory_free == 30 * GIB
    assert (card.name, card.kind, card.backend) == ("CUDA0", "gpu", "CUDA")
    assert card.memory_total == 8 * GIB - 384 * 2**20 == 8 * GIB - card.details["reserve_bytes"]
    assert card.details["bandwidth_bytes_per_s"] == 272e9
    assert card.details["link"] == "PCIe 4.0 x8"
    assert machine.performance_cores == 6 and machine.warnings == ()
    assert machine.drives[0].kind == "nvme"
    assert machine.drives[0].details["read_bytes_per_s"] == pytest.approx(7.877e9, rel=1e-3)
    for part in (*machine.devices, *machine.drives):
        assert part.details["provenance"] == "catalogue"
        assert any(k.endswith("source") and v for k, v in part.details.items())
        json.dumps(dict(part.details))


def test_devices_are_numbered_as_ggml_numbers_them() -> None:
    names = ["RTX 3090", "RX 7900 XTX", "P40", "Arc B580", "890M"]
    machine = hypothetical(names, 64 * GIB, memory="DDR5-5600 x2")
    assert [d.name for d in machine.devices] == ["CPU", "CUDA0", "Vulkan0", "CUDA1", "Vulkan1", "Vulkan2"]
    assert [d.kind for d in machine.devices] == ["cpu", "gpu", "gpu", "gpu", "gpu", "igpu"]
    # an 890M reads main memory, and may map half of it
    assert machine.devices[-1].details["bandwidth_bytes_per_s"] == 89.6e9
    assert machine.devices[-1].memory_total == 32 * GIB
    # nvidia-smi shows 23040 MiB of a P40's 24576, and a driver takes a part of that
    assert machine.devices[3].memory_total == (23040 - 384) * 2**20
    assert machine.warnings == ("number of cores not given: 8 are assumed",)


def test_driver_reserve_is_enough_for_what_cards_report() -> None:
    """MiB that CUDA or nvidia-smi report on Linux, no desktop."""
    reported = {"RTX 4090": 24217, "H100 SXM": 81559, "H200": 143771, "T4": 15360, "L4": 23034, "L40S": 46068}
    for name, mebibytes in reported.items():
        total = hypothetical([name], 64 * GIB, cpu_bandwidth=100).devices[1].memory_total >> 20
        assert mebibytes * 0.97 < total <= mebibytes


@pytest.mark.parametrize(
    ("chip", "gibibytes", "reported"),
    # recommendedMaxWorkingSetSize in MiB, as printed in reports to llama.cpp and Ollama
    [("M1 Pro", 16, 10922), ("M2 Max", 32, 21845), ("M2 Max", 96, 73728), ("M1 Max", 64, 49152)],
)
def test_apples_memory_is_shared(chip: str, gibibytes: int, reported: int) -> None:
    machine = hypothetical([f"Apple {chip}"], gibibytes * GIB)
    cpu, card = machine.devices
    assert (card.name, card.backend, card.kind) == ("MTL0", "MTL", "gpu")
    assert card.memory_total >> 20 == reported
    assert card.details["shares_main_memory"] and card.details["link"] == "main memory"
    assert cpu.details["bandwidth_bytes_per_s"] == card.details["bandwidth_bytes_per_s"] >= 200e9
    assert hypothetical([chip], gibibytes * 10**9).ram_total == gibibytes * GIB


@pytest.mark.parametrize(
    ("link", "card", "name"),
    [
        (None, "RTX 3090", "PCIe 4.0 x16"),
        ("PCIe 3.0 x16", "RTX 4060", "PCIe 3.0 x8"),
        ("PCIe 5.0 x16", "RTX 4060", "PCIe 4.0 x8"),
        ("gen4 x4", "RTX 3090", "PCIe 4.0 x4"),
        ("OCuLink", "RTX 3090", "OCuLink"),
        ("Thunderbolt 4", "RTX 3090", "Thunderbolt 4"),
        ("tb5", "T4", "PCIe 3.0 x4"),
    ],
)
def test_a_card_gets_no_more_than_its_slot_and_itself(link: str | None, card: str, name: str) -> None:
    details = hypothetical([card], 32 * GIB, cpu_bandwidth=50, link=link).devices[1].details
    assert details["link"] == name
    assert details["link_bandwidth_bytes_per_s"] == find_link(name).bandwidth_bytes_per_s


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": ["RTX 4060"]}, "how fast is main memory"),
        ({"gpu": ["RTX 4060"], "cpu_bandwidth": 50, "memory": "DDR5-6000 x2"}, "given twice"),
        ({"gpu": ["RTX 4060"], "cpu_bandwidth": float("nan")}, "cannot be the bandwidth"),
        ({"gpu": ["RTX 4060"], "cpu_bandwidth": -3}, "cannot be the bandwidth"),
        ({"gpu": ["RTX 4060"], "cpu_bandwidth": 0}, "cannot be the bandwidth"),
        ({"gpu": ["RTX 4061"], "cpu_bandwidth": 50}, "nearest are"),
        ({"gpu": [], "cpu_bandwidth": 50, "ram": 0}, "needs main memory"),
        ({"gpu": [], "cpu_bandwidth": 50, "ram": -GIB}, "needs main memory"),
        ({"gpu": [], "cpu_bandwidth": 50, "cores": 0}, "0 cores cannot be"),
        ({"gpu": [], "cpu_bandwidth": 50, "link": "PCIe 4.0 x16"}, "needs a card"),
        ({"gpu": ["M2 Max"], "link": "PCIe 4.0 x16"}, "needs a card"),
        ({"gpu": ["M2 Max", "RTX 4090"]}, "part of the processor"),
        ({"gpu": ["890M"]}, "how fast is main memory"),
        ({"gpu": ["M2 Max 64GB"]}, "of 64 GiB: 32.0 GiB contradicts"),
        ({"gpu": ["M2 Ultra"]}, "64, 128 or 192 GiB"),
    ],
)
def test_machines_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        hypothetical(**{"ram": 32 * GIB, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_the_data_is_part_of_the_package() -> None:
    """scikit-build-core copies whole package folders into the wheel, data files included."""
    root = Path(__file__).parents[2]
    settings = (root / "pyproject.toml").read_text()
    assert re.search(r'wheel\.packages = \["src/tensortier"\]', settings)
    assert "wheel.exclude" not in settings
    assert (Path(tensortier.__file__).parent / "catalogue.json").is_file()
