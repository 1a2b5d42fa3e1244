"""Page faults of a mapped file: the formula against the kernel's rules played through, and against measurements."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tensortier import catalogue, cost, gguf, mapped, memory, planner, rates, system
from tensortier.rates import Speed
from tensortier.types import Estimate, Hardware, ModelInfo, Placement, Plan, Role, Settings, Tensor, Workload
from tests.unit.test_cost import RATES
from tests.unit.test_cost import model as small
from tests.unit.test_hardware import block, linux, make

KIB, MIB = 1 << 10, 1 << 20
UNIT = 32 * KIB


def tensor(name: str, role: Role, layer: int | None, nbytes: int) -> Tensor:
    return Tensor(name, role, layer, (1, 1, 1), "Q4_K", nbytes, 0, 0)


def mixture(expert: int, experts: int = 64, used: int = 8, layers: int = 12, dense: int = 0) -> ModelInfo:
    """``dense`` bytes in one matrix, and three matrices of ``expert`` bytes for each expert of each layer."""
    tensors = [tensor("output.weight", Role.OUTPUT, None, dense)] if dense else []
    for i in range(layers):
        for part in (Role.EXPERT_UP, Role.EXPERT_GATE, Role.EXPERT_DOWN) if experts else ():
            tensors.append(tensor(f"blk.{i}.{part.value}", part, i, expert * experts))
    return dataclasses.replace(
        small(experts=max(experts, 1), used=used), tensors=tuple(tensors), n_layers=layers, n_expert=experts
    )


class Kernel:
    """Linux's read-ahead for faults (do_sync_mmap_readahead, do_async_mmap_readahead) with no room problem: what was
    read stays until ``forget``."""

    def __init__(self, window: int) -> None:
        self.window = window // UNIT
        self.forget()
        self.units = self.windows = 0

    def forget(self) -> None:
        self.there: set[int] = set()
        self.marks: dict[int, int] = {}

    def _read(self, start: int, mark: int) -> None:
        new = [n for n in range(max(0, start), start + self.window) if n not in self.there]
        self.there.update(new)
        self.units += len(new)
        self.windows += 1
        if mark in new:
            self.marks[mark] = start + self.window

    def touch(self, unit: int) -> None:
        if unit not in self.there:
            start = unit - self.window // 2
            self._read(start, start + self.window * 3 // 4)
        elif (after := self.marks.pop(unit, None)) is not None:
            self._read(after, after)


@pytest.mark.parametrize("read_ahead", [128 * KIB, 512 * KIB, MIB, 4 * MIB, 8 * MIB])
@pytest.mark.parametrize("expert", [256 * KIB, 1152 * KIB, 8 * MIB])
@pytest.mark.parametrize("used", [2, 8, 40])
def test_what_is_read_is_what_the_kernels_rules_read(expert: int, read_ahead: int, used: int) -> None:
    """Cold, experts drawn at random, computed in their order."""
    draw = random.Random(7)
    kernel = Kernel(2 * read_ahead)
    rounds, size = max(8, 60 * MIB // expert), expert // UNIT
    for _ in range(rounds):
        kernel.forget()
        for one in sorted(n for n in range(512) if draw.random() < used / 64):
            for unit in range(one * size, (one + 1) * size):
                kernel.touch(unit)
    of = mixture(expert, 512, used * 8, layers=1)
    of = dataclasses.replace(of, tensors=of.tensors[:1])
    found = mapped.reads(of, of.tensors, 0, read_ahead)
    assert found.nbytes == pytest.approx(kernel.units * UNIT / rounds, rel=0.15)
    # where many are used, an expert often comes upon the mark that another one's window left: counted as a fault
    assert 0.75 < found.windows / (kernel.windows / rounds) < 1.6


def test_dense_weights_are_read_whole_and_ahead() -> None:
    of = mixture(0, experts=0, used=0, layers=1, dense=100 * MIB)
    kernel = Kernel(2 * MIB)
    for unit in range(100 * MIB // UNIT):
        kernel.touch(unit)
    found = mapped.reads(of, of.tensors, 99 * MIB, MIB)
    assert found.nbytes == 100 * MIB and found.ahead == 1.0
    assert found.windows == pytest.approx(kernel.windows, rel=0.05)
    assert mapped.reads(of, of.tensors, 100 * MIB, MIB).nbytes == 0
    # ten seconds of computing hide the reads; without computing they take what the drive takes
    assert found.seconds(10.0, 1e9, 1e-4) == pytest.approx(10.0, rel=0.01)
    assert found.seconds(0.0, 1e9, 1e-4) == pytest.approx(100 * MIB / 1e9 + 50e-4, rel=0.05)


# Stock llama.cpp in a memory control group of the model's size / ratio, on an idle machine of two cores: the drive
# gives 2.1 to 2.8 GB/s, and 256 KiB alone take 0.17 ms longer than that. MB and tokens/s of bench/validate_mapped.py,
# and where two figures are given, of bench/tier_moe.py and bench/tier_dense.py too (docs/lab-log.md).
MOE = mixture(1152 * KIB, dense=184 * 10**6)
DENSE = mixture(0, experts=0, used=0, dense=2300 * 10**6)
BESIDE = 157 * 10**6  # bytes of the group that hold no file


@pytest.mark.parametrize(
    ("of", "size", "ratio", "read_ahead", "compute", "megabytes", "speeds"),
    [
        (MOE, 3010, 1.33, 128 * KIB, 0.027, 116, (5.47,)),
        (MOE, 3010, 1.33, 1 * MIB, 0.027, 284, (3.42,)),
        (MOE, 3010, 1.33, 8 * MIB, 0.027, 1066, (0.93, 1.06)),
        (MOE, 3010, 2.0, 128 * KIB, 0.027, 232, (2.66,)),
        (MOE, 3010, 2.0, 1 * MIB, 0.027, 813, (1.30,)),
        (MOE, 3010, 2.0, 8 * MIB, 0.027, 2424, (0.37, 0.46)),
        (MOE, 3010, 4.0, 128 * KIB, 0.027, 372, (2.10,)),
        (MOE, 3010, 4.0, 8 * MIB, 0.027, 2346, (0.38, 0.42)),
        (DENSE, 2460, 1.33, 8 * MIB, 0.085, 2214, (0.76, 0.77)),
        (DENSE, 2460, 2.0, 128 * KIB, 0.085, 2293, (0.34,)),
        (DENSE, 2460, 2.0, 8 * MIB, 0.085, 2314, (0.71, 0.74)),
    ],
)
def test_measured(
    of: ModelInfo,
    size: int,
    ratio: float,
    read_ahead: int,
    compute: float,
    megabytes: float,
    speeds: tuple[float, ...],
) -> None:
    found = mapped.reads(of, of.tensors, size * 1e6 / ratio - BESIDE, read_ahead)
    assert 1 / 1.35 < found.nbytes / 1e6 / megabytes < 1.35
    told = 1 / found.seconds(compute, 2.2e9, 0.17e-3)
    for speed in speeds:
        assert 1 / 1.5 < told / speed < 1.5, told


@pytest.mark.parametrize("read_ahead", [128 * KIB, MIB, 8 * MIB])
def test_more_room_never_means_more_reading(read_ahead: int) -> None:
    read = [mapped.reads(MOE, MOE.tensors, room * 50e6, read_ahead).nbytes for room in range(1, 61)]
    # but for a seventh where the kernel shares its lists out in another way, from a whole number of GiB on
    assert all(more <= 1.15 * min(read[: i + 1]) for i, more in enumerate(read))
    assert read[-1] == 0.0 and read[-5] > 0.0


def test_the_embedding_is_looked_up_and_not_read() -> None:
    of = small()
    whole = sum(t.nbytes for t in of.tensors)
    embedding = of.tensors[0].nbytes
    assert mapped.reads(of, of.tensors, whole / 2, MIB).nbytes == whole - embedding
    tied = dataclasses.replace(of, tied_output=True)
    assert mapped.reads(tied, of.tensors, whole / 2, MIB).nbytes == whole


def mapped_plan(paged: int, **fields: object) -> Estimate:
    known = dataclasses.replace(RATES, drive=Speed(2e9), **fields)  # type: ignore[arg-type]
    of = small(experts=64, used=8)
    plan = Plan("m", Placement(), Settings(n_ctx=4096))
    return cost.estimate(of, plan, known, Workload("", 512, 64, 0), {}, paged=paged)


def test_a_plan_says_what_page_faults_take_and_what_is_not_known() -> None:
    of = small(experts=64, used=8)
    whole = sum(t.nbytes for t in of.tensors)
    in_ram = mapped_plan(0)
    assert "drive" not in in_ram.decode_seconds and not any("read-ahead" in n for n in in_ram.notes)
    told = mapped_plan(whole // 2)
    assert any("read-ahead of the drive is not known: 128 KiB are assumed" in n for n in told.notes)
    known = mapped_plan(whole // 2, read_ahead=8 * MIB)
    assert not any("read-ahead" in n for n in known.notes)
    # windows of 16 MiB around experts of 24 MiB in three matrices read more than windows of 256 KiB, and it shows
    assert known.decode_seconds["drive"] > 1.2 * told.decode_seconds["drive"]
    read = mapped.reads(of, of.tensors, whole - whole // 2, 8 * MIB)
    compute = sum(in_ram.decode_seconds.values())
    assert sum(known.decode_seconds.values()) == pytest.approx(
        read.seconds(compute, 2e9, cost.ASSUMED_LATENCY)
    )
    low, high = known.decode_interval
    assert low < known.decode_tokens_per_second < high
    # all experts are used by a prompt of 512 tokens: its pass over them is read once
    assert known.prefill_seconds["drive"] < whole * (1 / 2e9 + mapped.KERNEL_SECONDS_PER_BYTE)


@pytest.mark.parametrize(
    ("known", "told"),
    [
        (None, "if the drive's read-ahead is 128 KiB (it is not known)"),
        (256 * KIB, "by this drive's read-ahead of 256 KiB"),
        (8 * MIB, "by this drive's read-ahead of 8 MiB"),
    ],
)
def test_a_plan_tells_what_mapping_would_take(
    known: int | None, told: str, skeleton: Callable[[str], Path]
) -> None:
    m = gguf.read(skeleton("qwen3-30b-a3b-q4_k_m"))
    here = catalogue.hypothetical((), 8 << 30, cpu_bandwidth=60, drive="NVMe PCIe 4.0 x4")
    more = {} if known is None else {"read_ahead_bytes": known}
    drives = tuple(dataclasses.replace(d, details={**d.details, **more}) for d in here.drives)
    here = dataclasses.replace(here, drives=drives)
    settings = Settings(n_ctx=4096)
    plan = planner.plan(m, here, settings, rates=rates.from_catalogue(here), answers=memory.Formulas(m, {}))
    assert plan.tier is not None and plan.estimate is not None
    mapping = next(c.estimate for c in plan.candidates if c.name == "CPU only")
    assert mapping is not None
    times = mapping.seconds / plan.estimate.seconds
    number = f"{times:.0f}" if times >= 10 else f"{times:.1f}"
    assert f"as llama.cpp does, would take about {number} times as long, {told}" in plan.reasons[0]


MOUNTS = {
    "a disk": ("27 1 8:0 / / rw - ext4 /dev/sda rw\n", 512 * KIB),
    "a partition": ("27 1 8:2 / / rw - ext4 /dev/sda2 rw\n", 512 * KIB),
    "btrfs, which reads at least 4 MiB ahead": ("27 1 0:30 / / rw - btrfs /dev/sda2 rw\n", 4 * MIB),
    "a network file system": ("27 1 0:45 / / rw - nfs4 server:/x rw\n", 256 * KIB),
    "an overlay of other file systems": ("27 1 0:50 / / rw - overlay overlay rw\n", None),
    "memory": ("27 1 0:51 / / rw - tmpfs tmpfs rw\n", None),
}


@linux
@pytest.mark.parametrize("what", MOUNTS)
def test_the_read_ahead_of_a_drive(what: str, tmp_path: Path) -> None:
    mounts, expected = MOUNTS[what]
    make(tmp_path, {"proc/self/mountinfo": mounts, "sys/class/bdi/0:45/read_ahead_kb": "256\n"})
    block(tmp_path, "8:0", "sda", {"queue/read_ahead_kb": "512\n"})
    block(tmp_path, "8:2", "sda/sda2", {"partition": "2\n"})
    (tmp_path / "sys/class/block").mkdir(parents=True)
    (tmp_path / "sys/class/block/sda2").symlink_to(tmp_path / "sys/dev/block/8:2")
    found = system.drive("/", tmp_path)
    details: Mapping[str, object] = {} if expected is None else {"read_ahead_bytes": expected}
    assert found.details == details
    here = Hardware(
        cpu_model="", architecture="", physical_cores=1, logical_cores=1, performance_cores=1, usable_cpus=1,
        cpu_features=(), ram_total=0, ram_limit=0, ram_available=0, swap_total=0, os="Linux", devices=(),
        drives=(found,),
    )  # fmt: skip
    assert rates.read_ahead(here) == expected
    assert rates.from_catalogue(here).read_ahead == expected
