"""A plan in words, and which model and machine it was made for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from tensortier import cost, explain, gguf, memory, planid, rates, workloads
from tensortier.catalogue import hypothetical
from tensortier.errors import PlanError
from tensortier.types import (
    Candidate,
    Device,
    DeviceMemory,
    Estimate,
    Hardware,
    ModelInfo,
    Placement,
    Plan,
    Settings,
    Workload,
)

GIB = 1 << 30


@pytest.fixture(scope="module")
def gemma(skeleton: Callable[[str], Path]) -> ModelInfo:
    return gguf.read(skeleton("gemma-2-27b-q4_k_m"))


@pytest.fixture(scope="module")
def described() -> Hardware:
    return hypothetical(["RTX 4060 8GB"], 32 * GIB, cpu_bandwidth=60)


def test_the_shares_are_the_estimate(gemma: ModelInfo, described: Hardware) -> None:
    """Sums of the rows against the speeds that the time model gives as a whole."""
    plan = Plan(gemma.path, Placement(("CUDA0",), 20), Settings(n_ctx=4096, threads=8))
    free = {d.name: d.memory_free for d in described.devices}
    load = workloads.NAMED["chat"]
    found = cost.estimate(gemma, plan, rates.from_catalogue(described), load, free)
    rows = explain.shares(found)
    assert sum(r.decode_seconds for r in rows) == pytest.approx(1 / found.decode_tokens_per_second)
    assert sum(r.prefill_seconds for r in rows) == pytest.approx(
        load.prompt / found.prefill_tokens_per_second
    )
    assert sum(r.decode_share for r in rows) == pytest.approx(1)
    assert sum(r.prefill_share for r in rows) == pytest.approx(1)
    assert [r.decode_seconds for r in rows] == sorted((r.decode_seconds for r in rows), reverse=True)
    # 26 of 46 layers from main memory at 60 GB/s: that is what binds
    assert rows[0].what == "reading weights on CPU"
    lines = explain.predicted(dataclasses.replace(plan, estimate=found))
    assert any(line.startswith("decode is bound by reading weights on CPU") for line in lines)
    assert "from the catalogue's published figures" in lines[0]


def estimate(**changes: object) -> Estimate:
    found = Estimate(
        prefill_tokens_per_second=1234.5,
        prefill_interval=(1000.0, 1500.0),
        decode_tokens_per_second=12.34,
        decode_interval=(9.876, 15.0),
        seconds=100.0,
        prefill_seconds={"weights on CPU": 1.0},
        decode_seconds={"weights on CPU": 0.03, "splits": 0.01},
        provenance={"CPU": "measured"},
    )
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def test_speeds_have_three_digits_and_an_interval() -> None:
    assert explain.speed(1234.5, (1000.0, 1500.4)) == "1234 tokens/s (1000 to 1500)"
    assert explain.speed(12.34, (9.876, 15.04)) == "12.3 tokens/s (9.88 to 15.0)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (3.21, "3.2 s"), (45.4, "45 s"), (120, "120 s"), (330, "5.5 min"), (9000, "2.5 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert explain.duration(seconds) == text


def test_where_figures_are_from() -> None:
    assert explain.provenance(estimate()) == "measured on this machine"
    mixed = estimate(provenance={"CPU": "measured", "CUDA0": "catalogue", "CUDA1": "catalogue"})
    assert explain.provenance(mixed) == (
        "CPU: measured on this machine; CUDA0, CUDA1: from the catalogue's published figures"
    )


def test_without_an_estimate_nothing_is_promised() -> None:
    (line,) = explain.predicted(Plan("m.gguf"))
    assert "no speeds" in line


def test_the_workload_says_whether_it_was_assumed() -> None:
    chat = explain.workload(Workload(), True)
    assert "256 tokens of prompt, 300 of answer, 2048" in chat and "--workload changes it" in chat
    given = explain.workload(workloads.parse("512:64:0"), False)
    assert given.startswith("workload 512 tokens of prompt, 64 of answer, nothing") and "as given" in given


def test_the_ladder_has_the_chosen_plan_first() -> None:
    rows = (DeviceMemory("CUDA0", 5 * GIB, GIB, 0), DeviceMemory("CPU", 300 << 20, 0, 0))
    place, settings = Placement(), Settings()
    plan = Plan(
        "m.gguf",
        candidates=(
            Candidate("optimal", True, place, settings, rows, estimate(), "spills 12 tensors"),
            Candidate("whole layers", True, place, settings, rows, estimate(), "1.8x slower"),
            Candidate("everything on the GPU", False, place, settings, rows),
        ),
    )
    first, second, third = explain.ladder(plan)
    assert (first.name, first.note) == ("optimal", "chosen; spills 12 tensors")
    assert first.memory == ("CUDA0 6.0 GiB", "CPU 300 MiB")
    assert (first.decode, first.request) == ("12.3", "100 s")
    assert second.note == "1.8x slower"
    assert (third.decode, third.note) == ("-", "does not fit")


def test_what_was_chosen_is_marked() -> None:
    line = explain.choices(Settings(type_k="q8_0"), 4096, frozenset({"context", "ubatch"}))
    assert line == "context 4096 (chosen), KV cache q8_0 and f16, micro-batch 512 (chosen)"


# --- identity


def test_a_model_keeps_its_identity_at_another_path(tiny_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.gguf"
    copy.write_bytes(tiny_path.read_bytes())
    assert planid.of_model(gguf.read(copy)) == planid.of_model(gguf.read(tiny_path))


def test_a_split_model_is_the_same_model(gemma: ModelInfo) -> None:
    """Splitting renumbers files and offsets and may reorder tensors; nothing of that is the model's."""
    tensors = tuple(
        dataclasses.replace(t, file=i % 2, offset=i) for i, t in enumerate(reversed(gemma.tensors))
    )
    assert planid.of_model(dataclasses.replace(gemma, tensors=tensors)) == planid.of_model(gemma)


@pytest.mark.parametrize(
    "change",
    [{"name": "x"}, {"qtype": "Q8_0"}, {"shape": (1, 2)}, {"nbytes": 7}],
    ids=lambda c: next(iter(c)),
)
def test_any_other_tensor_is_another_model(gemma: ModelInfo, change: dict[str, object]) -> None:
    changed = dataclasses.replace(gemma.tensors[5], **change)  # type: ignore[arg-type]
    tensors = (*gemma.tensors[:5], changed, *gemma.tensors[6:])
    other = dataclasses.replace(gemma, tensors=tensors)
    assert planid.of_model(other) != planid.of_model(gemma)
    with pytest.raises(PlanError, match="another model"):
        planid.check_model(Plan("x", model_id=planid.of_model(gemma)), other)


def test_no_identity_suits_any_model_and_machine(gemma: ModelInfo, described: Hardware) -> None:
    planid.check_model(Plan("x"), gemma)
    planid.check_machine(Plan("x"), described)


def machine(**changes: object) -> Hardware:
    found = hypothetical([], 32 * GIB, cpu_bandwidth=60)
    cpu = Device("CPU", "cpu", "A processor", 32 * GIB, 20 * GIB, "CPU")
    card = Device("CUDA0", "gpu", "A card", 8 * GIB, 7 * GIB, "CUDA")
    found = dataclasses.replace(found, devices=(cpu, card))
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def test_free_memory_is_no_part_of_a_machine() -> None:
    found = machine()
    devices = tuple(dataclasses.replace(d, memory_free=1) for d in found.devices)
    assert planid.of_machine(machine(devices=devices, ram_available=1)) == planid.of_machine(found)


def test_what_differs_between_machines_is_said() -> None:
    here = machine()
    plan = Plan("m.gguf", machine_id=planid.of_machine(here))
    planid.check_machine(plan, here)
    with pytest.raises(
        PlanError, match=r"there 32.0 GiB of RAM; here 16.0 GiB of RAM\. .*tensortier plan m.gguf"
    ):
        planid.check_machine(plan, machine(ram_total=16 * GIB))
    with pytest.raises(PlanError, match=r"there CUDA0 is A card with 8\.0 GiB; here fewer devices"):
        planid.check_machine(plan, machine(devices=here.devices[:1]))


def test_a_described_machine_is_never_this_one(described: Hardware) -> None:
    plan = Plan("m.gguf", machine_id=planid.of_machine(described))
    for here in (machine(), described):
        with pytest.raises(PlanError, match=r"only described.*RTX 4060"):
            planid.check_machine(plan, here)


def test_formulas_and_identity_need_no_file(gemma: ModelInfo, described: Hardware) -> None:
    """A plan for a model that is not here has the identity that the file will have once it is."""
    remote = dataclasses.replace(gemma, files=("https://example.com/gemma.gguf",))
    answers = memory.Formulas(remote, {d.name: d.memory_free for d in described.devices})
    assert answers.ask(Plan(remote.path))
    planid.check_model(Plan(remote.path, model_id=planid.of_model(remote)), gemma)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1234"),
        (99.96, "100.0"),
        (12.34, "12.3"),
        (0.126, "0.13"),
        (0.0169, "0.017"),
        (0.0009, "0.0009"),
    ],
)
def test_no_speed_is_shown_as_nothing(value: float, text: str) -> None:
    assert explain.figure(value) == text
