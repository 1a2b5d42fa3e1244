"""What stays on the drive: the byte arithmetic against sums over the tensors, the speed against its bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tensortier import budget, catalogue, cost, gguf, levels, memory, paging, placement, rates, slots
from tensortier.rates import Reads, Speed
from tensortier.types import Estimate, Plan, Settings, Tier, Workload
from tests.unit.test_cost import RATES

GIB = 1 << 30
WORK = Workload("", 256, 64, 0)


def planned(path: Path, ram: int) -> tuple[Plan | None, Plan]:
    model = gguf.read(path)
    plan = Plan(str(path), settings=Settings(n_ctx=4096, threads=4))
    rows = memory.Formulas(model, {}).ask(plan)
    return paging.on_the_drive(model, plan, rows, ram, {}), plan


@pytest.mark.parametrize("ram", [4 * GIB, 8 * GIB, 16 * GIB])
def test_experts_go_first_and_ram_is_filled_not_more(ram: int, skeleton: Callable[[str], Path]) -> None:
    """Qwen3-30B, 18.6 GB: experts on the drive, everything else and as many experts as possible in RAM."""
    path = skeleton("qwen3-30b-a3b-q4_k_m")
    made, _ = planned(path, ram)
    assert made is not None and made.tier is not None
    model = gguf.read(path)
    where = placement.resolve(model, made.placement, {})
    assert {t.name for t in model.tensors if where[t.name] == "TIER"} == {
        t.name for t in model.tensors if t.role.is_routed_expert
    }
    rows = {row.device: row for row in made.memory}
    others = sum(t.nbytes for t in model.tensors if not t.role.is_routed_expert)
    assert rows["CPU"].weights_bytes == pytest.approx(others, abs=1 << 20)
    held = sum(row.total_bytes for row in made.memory)
    assert 0.98 * ram < held <= ram
    assert made.tier.dense_bytes == 0


def test_a_dense_model_leaves_whole_matrices(skeleton: Callable[[str], Path]) -> None:
    made, _ = planned(skeleton("llama-3.3-70b-q4_k_m"), 24 * GIB)
    assert made is not None and made.tier is not None
    assert made.tier.expert_bytes == 0
    assert 18 * GIB < made.tier.dense_bytes < 24 * GIB
    assert {o.device for o in made.placement.overrides} == {"TIER"}


def test_the_output_stays_where_it_would_make_the_ring_large(skeleton: Callable[[str], Path]) -> None:
    """Llama-70B's output has 0.86 GB, its other matrices at most 0.19: a ring for two of it would hold 1.7 GB back."""
    path = skeleton("llama-3.3-70b-q4_k_m")
    model = gguf.read(path)
    reads = []
    for ram in (4 * GIB, 16 * GIB):
        made, _ = planned(path, ram)
        assert made is not None and made.tier is not None
        where = placement.resolve(model, made.placement, {})
        paged = [t for t in model.tensors if where[t.name] == "TIER"]
        assert "output.weight" not in {t.name for t in paged}
        read = sum(t.nbytes for t in paged) - paging.dense_stays(model, made, {})
        # what RAM has room for, less the ring, is not read
        firm = sum(t.nbytes for t in model.tensors) - sum(t.nbytes for t in paged)
        room = made.tier.dense_bytes - 2 * max(t.nbytes for t in paged)
        assert sum(t.nbytes for t in model.tensors) - firm - room <= read * 1.001
        assert read <= sum(t.nbytes for t in model.tensors) - firm - room + max(t.nbytes for t in paged)
        estimate = paging.estimate(model, made, dataclasses.replace(RATES, drive=Speed(1e9)), WORK, {})
        assert read / 0.95e9 <= 1 / estimate.decode_tokens_per_second <= 1.5 * read / 0.95e9
        reads.append(read)
    assert reads[1] < reads[0]


def test_too_little_ram_for_what_cannot_leave_it(skeleton: Callable[[str], Path]) -> None:
    made, _ = planned(skeleton("llama-3.3-70b-q4_k_m"), 1 * GIB)
    assert made is None


def test_more_ram_is_never_slower_and_never_beats_all_in_memory(skeleton: Callable[[str], Path]) -> None:
    path = skeleton("qwen3-30b-a3b-q4_k_m")
    model = gguf.read(path)
    speeds = []
    for ram in (3, 4, 6, 8, 12, 16):
        made, plan = planned(path, ram * GIB)
        assert made is not None
        found = paging.estimate(model, made, RATES, WORK, {})
        # a token reads at least what it misses, at the drive's speed
        experts, _ = paging.paged_bytes(model, made, {})
        assert made.tier is not None
        missed = (experts - made.tier.expert_bytes) * model.n_expert_used / model.n_expert
        assert found.decode_tokens_per_second <= 1.5e9 / missed
        low, high = found.decode_interval
        assert low <= found.decode_tokens_per_second <= high
        speeds.append(found.decode_tokens_per_second)
    assert speeds == sorted(speeds)
    assert speeds[-1] < cost.estimate(model, plan, RATES, WORK, {}).decode_tokens_per_second


class Known:
    """Hit rates that somebody knows."""

    source, profile = "as told", "routing.trace"

    def __init__(self, **told: float) -> None:
        self.told = told

    @property
    def policies(self) -> Sequence[str]:
        return list(self.told)

    def rate(self, policy: str, capacity: Sequence[int], layers: Sequence[int]) -> float:
        assert len(layers) == 48 and len(capacity) in (1, 48)
        return self.told[policy]


def test_the_policy_that_finds_most_and_its_time(skeleton: Callable[[str], Path]) -> None:
    path = skeleton("qwen3-30b-a3b-q4_k_m")
    model = gguf.read(path)
    plan = Plan(str(path), settings=Settings(n_ctx=4096, threads=4))
    rows = memory.Formulas(model, {}).ask(plan)
    speeds = dataclasses.replace(RATES, drive=Speed(1e9))
    found = {}
    for hits in (None, Known(lru=0.9, static=0.903), Known(lru=0.6, static=0.7)):
        made = paging.on_the_drive(model, plan, rows, 8 * GIB, {}, hits)
        assert made is not None and made.tier is not None
        estimate = paging.estimate(model, made, speeds, WORK, {}, hits)
        found[made.tier.policy, made.tier.profile] = estimate
        assert estimate.provenance["hit rate"] == ("assumed" if hits is None else "trace")
    assert list(found) == [("lru", None), ("static", "routing.trace")]
    # bound by the drive: what a token misses, at the drive's speed, and not much longer
    layers = slots.layers_of(model, [t for t in model.tensors if t.role.is_routed_expert])
    token = sum(layer.slot_bytes * layer.experts for layer in layers) * 8 / 128
    for key, missed in ((("lru", None), 0.1), (("static", "routing.trace"), 0.3)):
        seconds = found[key].decode_seconds["drive"]
        assert 0.5 * missed * token / 1e9 < seconds < 1.2 * missed * token / 1e9
    assert "as told" in found["lru", None].notes[-1] and "90%" in found["lru", None].notes[-1]


def test_weights_from_the_drive_are_computed_as_they_are_in_the_file(skeleton: Callable[[str], Path]) -> None:
    """Reordered weights are read at 50 GB/s, plain ones at 10: experts from the drive are plain."""
    path = skeleton("qwen3-30b-a3b-q4_k_m")
    model = gguf.read(path)
    cpu = RATES.of("CPU")
    slow = dataclasses.replace(cpu, other_narrow=dataclasses.replace(cpu.other_narrow, value=10e9))
    speeds = dataclasses.replace(RATES, drive=Speed(1e15), plain=slow)
    made, plan = planned(path, 8 * GIB)
    assert made is not None
    here = cost.estimate(model, plan, speeds, WORK, {}).decode_seconds["weights on CPU"]
    there = paging.estimate(model, made, speeds, WORK, {}).decode_seconds["weights on CPU"]
    experts = sum(t.nbytes for t in model.tensors if t.role.is_routed_expert) * 8 / 128
    assert there - here == pytest.approx(experts / 10e9 - experts / 50e9, rel=1e-6)


def test_experts_that_are_there_are_computed_while_the_others_arrive(skeleton: Callable[[str], Path]) -> None:
    """A token takes what is no expert's, and the longer of reading and computing experts, and a little of the other."""
    path = skeleton("qwen3-30b-a3b-q4_k_m")
    model = gguf.read(path)
    made, plan = planned(path, 8 * GIB)
    assert made is not None
    experts = sum(t.nbytes for t in model.tensors if t.role.is_routed_expert) * 8 / 128 / 50e9
    in_memory = 1 / cost.estimate(model, plan, RATES, WORK, {}).decode_tokens_per_second
    for speed, least in ((1e15, in_memory), (1e9, in_memory - experts)):
        found = paging.estimate(model, made, dataclasses.replace(RATES, drive=Speed(speed)), WORK, {})
        seconds = 1 / found.decode_tokens_per_second
        reading = (1 - hit_share(found)) * experts * 50e9 / (0.95 * speed)
        assert least + (reading if speed == 1e9 else 0) <= seconds * 1.001
        assert seconds <= (least + reading + 0.25 * min(experts, reading)) * 1.02


def hit_share(found: Estimate) -> float:
    """Told in a note."""
    (note,) = [n for n in found.notes if "are found in RAM" in n]
    return int(note.split("%")[0].split()[-1]) / 100


def test_reads_are_those_that_were_measured() -> None:
    plan = Plan("m", tier=Tier(1, 2, "lfu"))
    speeds = dataclasses.replace(RATES, reads=Reads(7, 12345))
    made = paging.read_as_measured(plan, speeds)
    assert made.tier == dataclasses.replace(plan.tier, queue_depth=7, read_bytes=12345)  # type: ignore[type-var]
    assert paging.read_as_measured(plan, RATES) == plan
    assert paging.read_as_measured(Plan("m"), speeds) == Plan("m")


@pytest.mark.parametrize("name", ["qwen3-30b-a3b-q4_k_m", "llama-3.3-70b-q4_k_m"])
def test_levels_of_ram(name: str, skeleton: Callable[[str], Path]) -> None:
    """Rows add up to the budget, the drive has the rest, and the ends are the least that runs and a plain plan."""
    model = gguf.read(skeleton(name))
    machine = catalogue.hypothetical((), 32 * GIB, memory="DDR5-5600 x2", drive="NVMe PCIe 4.0 x4")
    speeds = rates.from_catalogue(machine)
    settings = Settings(n_ctx=4096, threads=8)
    shares = (0.0, 0.3, 0.6, 0.9, 1.0)
    found = levels.ram_levels(model, machine, settings, workload=WORK, rates=speeds, shares=shares)
    process = budget.process_bytes(model, settings)
    for level, share in zip(found, shares, strict=True):
        assert level.ram == sum(row.total_bytes for row in level.memory)
        assert level.memory[-1].total_bytes == process
        weights = sum(row.weights_bytes for row in level.memory)
        assert weights + level.drive_bytes == pytest.approx(model.nbytes, rel=0.002)
        assert level.fits == (level.ram <= machine.ram_available)
        if 0 < share < 1:
            assert share - 0.02 < level.share <= share + 1e-3
            assert level.tier is not None and level.settings.load_mode == "none"
    assert found[0].share < 0.08 and found[-1].tier is None and found[-1].drive_bytes == 0
    plain = Plan(model.path, settings=settings)
    assert found[-1].estimate == cost.estimate(model, plain, speeds, WORK, {})
    decode = [level.estimate.decode_tokens_per_second for level in found]
    assert decode == sorted(decode) and len(set(decode)) == len(decode)
