"""The slider over VRAM: for described machines by formula, and with an RPC device against llama.cpp itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tensortier import catalogue, gguf, hardware, memory, placement, rates
from tensortier.deciding import Wish
from tensortier.errors import UsageError
from tensortier.server import slider, tensormap
from tensortier.types import DeviceMemory, Placement, Plan, Settings, Workload
from tests import calibrations

GIB = 1 << 30
MIB = 1 << 20


def held(rows: tuple[DeviceMemory, ...], device: str) -> int:
    return sum(r.total_bytes for r in rows if r.device == device)


def described(path: Path, *cards: str, ram: int = 64, load: Workload | None = None) -> slider.Base:
    machine = catalogue.hypothetical(cards, ram * GIB, memory="DDR5-5600 x2", drive="NVMe PCIe 4.0 x4")
    answers = memory.Formulas(gguf.read(path), {d.name: d.memory_free for d in machine.devices})
    return slider.base(Wish(str(path), workload=load), machine, rates.from_catalogue(machine), answers)


def curve_of(base: slider.Base) -> slider.Curve:
    found = slider.curve(base, memory.Formulas(base.model, base.budget.free))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("model", "cards", "ram"),
    [
        ("gemma-2-27b-q4_k_m", ("RTX 4060 8GB",), 64),
        ("qwen3-30b-a3b-q4_k_m", ("RTX 4060 8GB",), 12),
        ("qwen3-30b-a3b-q4_k_m", ("RTX 4090", "RTX 4060 8GB"), 64),
    ],
)
def test_every_step_keeps_to_its_budget(
    skeleton: Callable[[str], Path], model: str, cards: tuple[str, ...], ram: int
) -> None:
    base = described(skeleton(model), *cards, ram=ram)
    curve = curve_of(base)
    room = base.budget.room
    assert curve.kind == slider.VRAM and curve.devices == tuple(room) and curve.free == sum(room.values())
    slack = 2 * MIB
    for step in curve.steps:
        for side in (step.by_tensors, step.by_layers):
            assert sum(held(side.memory, d) for d in room) <= step.budget + slack or side.layers == 0
            for device in room if step.fits else ():
                assert held(side.memory, device) <= room[device]
            in_ram = sum(r.total_bytes for r in side.memory if r.device not in room)
            assert in_ram <= base.budget.ram + base.budget.process
        assert step.by_tensors.estimate.seconds <= step.by_layers.estimate.seconds * 1.0001
    times = [s.by_tensors.estimate.seconds for s in curve.steps]
    # the optimizer stops near the optimum
    assert all(after <= before * 1.02 for before, after in itertools.pairwise(times))
    assert [s.budget for s in curve.steps] == sorted({s.budget for s in curve.steps})
    assert curve.steps[-1].budget == pytest.approx(curve.needed, rel=0.001)
    more = slider.BEYOND if curve.needed > curve.free else 0
    assert [s.fits for s in curve.steps] == [True] * slider.STEPS + [False] * more


def test_stairs_are_all_numbers_of_layers(skeleton: Callable[[str], Path]) -> None:
    """The most layers that a brute force finds within a budget are those of the step."""
    base = described(skeleton("gemma-2-27b-q4_k_m"), "RTX 4060 8GB")
    curve = curve_of(base)
    assert len(curve.stairs) == base.model.n_layers + 2
    assert curve.stairs[-1].budget == curve.needed
    for step in curve.steps[:: slider.STEPS // 4]:
        assert step.by_layers.layers == max(n for n, s in enumerate(curve.stairs) if s.budget <= step.budget)


def test_the_plan_at_a_step_is_the_steps(skeleton: Callable[[str], Path]) -> None:
    base = described(skeleton("qwen3-30b-a3b-q4_k_m"), "RTX 4060 8GB")
    curve = curve_of(base)
    answers = memory.Formulas(base.model, base.budget.free)
    for step in (curve.steps[8], curve.steps[20]):
        plan = slider.plan_at(base, step.budget, answers)
        assert plan.estimate is not None
        assert held(plan.memory, "CUDA0") <= step.budget
        assert plan.estimate.seconds == pytest.approx(step.by_tensors.estimate.seconds, rel=0.03)
    with pytest.raises(UsageError):
        slider.plan_at(base, -1, answers)


def test_a_deep_context_has_a_cliff(skeleton: Callable[[str], Path]) -> None:
    """Whole layers drag their KV cache to RAM; single tensors leave it on the card."""
    deep = Workload("deep", 256, 300, 30000)
    base = described(skeleton("qwq-32b-iq4_xs"), "RTX 3090", load=deep)
    curve = curve_of(base)
    step = curve.steps[16]
    layers, tensors = step.by_layers.estimate, step.by_tensors.estimate
    assert tensors.decode_tokens_per_second > 1.5 * layers.decode_tokens_per_second
    nearly, all_of_it = (curve.stairs[n].estimate.decode_tokens_per_second for n in (-7, -1))
    assert all_of_it > 2 * nearly


def test_a_card_that_everything_fits_on(skeleton: Callable[[str], Path]) -> None:
    base = described(skeleton("gemma-3-12b-q4_k_m"), "RTX 4090")
    curve = curve_of(base)
    assert len(curve.steps) == slider.STEPS and curve.needed < curve.free
    last = curve.steps[-1].by_tensors
    assert last.layers == base.model.n_layers + 1 and not last.placement.overrides and not last.tier
    where = placement.resolve(base.model, last.placement, base.budget.free)
    assert {d for name, d in where.items() if name != "token_embd.weight"} == {"CUDA0"}


def test_with_a_real_second_device(moe_path: Path, rpc_device: str, tmp_path: Path) -> None:
    """Budgets are kept by llama.cpp's own account, for the curve's placements and for the plans."""
    machine = hardware.probe(moe_path, rpc=[rpc_device])
    speeds = rates.from_calibration(calibrations.made_up(machine), machine, Settings())
    wish = Wish(str(moe_path), Settings(n_ctx=4096, type_k="f16"), rpc=(rpc_device,))
    with memory.Probe() as probe:
        base = slider.base(wish, machine, speeds, probe)
        curve = slider.curve(base, probe)
        assert curve is not None and curve.kind == slider.VRAM and curve.devices == ("RPC0",)
        for step in (curve.steps[4], curve.steps[11], curve.steps[20]):
            for side in (step.by_tensors, step.by_layers):
                plan = Plan(str(moe_path), side.placement, base.settings, rpc=(rpc_device,))
                assert held(probe.ask(plan), "RPC0") <= step.budget + 4 * MIB or side.layers == 0
            made = slider.plan_at(base, step.budget, probe)
            assert held(made.memory, "RPC0") <= step.budget
            assert made.memory[0].device and made.rpc == (rpc_device,)
        assert curve.steps[-1].by_tensors.layers == base.model.n_layers + 1
        everything = Plan(str(moe_path), Placement(("RPC0",), -1), base.settings, rpc=(rpc_device,))
        assert curve.needed == pytest.approx(held(probe.ask(everything), "RPC0"), abs=MIB)


# --- reasons


def reasons(base: slider.Base, side: slider.Side) -> dict[str, tuple[str, str]]:
    """Device and reason of each tensor."""
    free = base.budget.free
    found = tensormap.tensor_map(base.model, side.placement, side.tier, free, tuple(free))
    codes = tensormap._CODES
    told = [found.places[codes.index(code)] for code in found.codes]
    return {t.name: (p.device, p.reason) for t, p in zip(base.model.tensors, told, strict=True)}


def test_reasons_say_where_and_why(skeleton: Callable[[str], Path]) -> None:
    base = described(skeleton("qwen3-30b-a3b-q4_k_m"), "RTX 4060 8GB")
    step = curve_of(base).steps[20]
    told = reasons(base, step.by_tensors)
    where = placement.resolve(base.model, step.by_tensors.placement, base.budget.free)
    assert {name: device for name, (device, _) in told.items()} == where
    spilled = [name for name, device in where.items() if device == "CPU" and "_exps" in name]
    assert spilled and all("first to leave CUDA0" in told[name][1] for name in spilled)
    assert "looked up" in told["token_embd.weight"][1]
    assert "KV cache" in told["blk.3.attn_q.weight"][1] and "Small" in told["blk.3.attn_norm.weight"][1]
    layers = reasons(base, curve_of(base).steps[10].by_layers)
    assert "no room for this layer on CUDA0" in layers["blk.0.attn_q.weight"][1]


def test_reasons_of_the_drive(skeleton: Callable[[str], Path]) -> None:
    base = described(skeleton("qwen3-30b-a3b-q4_k_m"), "RTX 4060 8GB", ram=12)
    told = reasons(base, curve_of(base).steps[0].by_tensors)
    device, reason = told["blk.3.ffn_up_exps.weight"]
    assert device == "TIER" and "8 of 128 experts" in reason
