"""The planner's decisions: what wins, what is said about it, what is refused."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bench import plan_grid

from tensortier import budget, catalogue, cost, gguf, measuring, memory, placement, planner, rates, workloads
from tensortier.errors import UsageError
from tensortier.gains import gains
from tensortier.levels import levels
from tensortier.types import Device, DeviceMemory, Hardware, ModelInfo, Placement, Plan, Settings, Workload
from tests.models import skeletons

GIB = 1 << 30
CHAT = workloads.NAMED["chat"]


def described(*cards: str, ram: int = 64, **options: str) -> Hardware:
    return catalogue.hypothetical(cards, ram * GIB, memory="DDR5-5600 x2", **options)


def planned(
    model: ModelInfo,
    hardware: Hardware,
    load: Workload = CHAT,
    settings: Settings | None = None,
    open: planner.Open | None = None,
    answers: memory.Answers | None = None,
) -> Plan:
    return planner.plan(
        model,
        hardware,
        settings or Settings(flash_attention="on"),
        workload=load,
        rates=rates.from_catalogue(hardware),
        open=open,
        answers=answers or memory.Formulas(model, {}),
    )


@pytest.fixture(scope="module")
def model(skeleton: Callable[[str], Path]) -> Callable[[str], ModelInfo]:
    return lambda name: gguf.read(skeleton(name))


@pytest.mark.parametrize("name", skeletons.NAMES)
def test_never_predicted_slower_than_fit(name: str, model: Callable[[str], ModelInfo]) -> None:
    """A part of ``bench/plan_grid.py``, which has every size of card and every workload."""
    loads = [CHAT, workloads.NAMED["long-document"]]
    spilled = 0
    for found in plan_grid.compare(name, model(name), (6, 12, 24), loads):
        assert not found.slower, found
        assert found.plan is not None
        spilled += not found.plan.candidates[0].name.startswith("everything")
    assert spilled >= 2


def of_the_model(plan: Plan) -> tuple[DeviceMemory, ...]:
    """Rows without the process' own."""
    *rows, process = plan.memory
    assert process.device == "process" and process.total_bytes > 100 << 20
    return tuple(rows)


def test_everything_fits_and_that_is_all_there_is_to_say(model: Callable[[str], ModelInfo]) -> None:
    plan = planned(model("gemma-3-12b-q4_k_m"), described("RTX 3090"))
    assert plan.placement == Placement(("CUDA0",), -1)
    assert plan.reasons == ("everything fits on CUDA0: nothing to decide",)
    assert [c.name for c in plan.candidates] == ["everything on CUDA0", "CPU only"]
    assert plan.warnings == ()


def test_the_ladder(model: Callable[[str], ModelInfo]) -> None:
    plan = planned(model("gemma-2-27b-q4_k_m"), described("RTX 3060 12GB"))
    first, *rest = plan.candidates
    assert (first.placement, first.settings, first.memory) == (plan.placement, plan.settings, plan.memory)
    assert first.estimate == plan.estimate and first.note == "chosen"
    assert {c.name for c in plan.candidates} >= {
        "CPU only", "whole layers", "llama.cpp --fit", "attention first", "optimal"
    }  # fmt: skip
    fitting = [c for c in rest if c.fits]
    assert [c.estimate.seconds for c in fitting if c.estimate] == sorted(
        c.estimate.seconds for c in fitting if c.estimate
    )
    # each estimate is that of its own placement and settings
    hardware = described("RTX 3060 12GB")
    speeds = rates.from_catalogue(hardware)
    free = {"CUDA0": hardware.devices[1].memory_free}
    for c in plan.candidates:
        told = cost.estimate(
            model("gemma-2-27b-q4_k_m"), Plan("", c.placement, c.settings), speeds, CHAT, free
        )
        assert c.estimate is not None and c.estimate.seconds == pytest.approx(told.seconds)
    (everything,) = [c for c in rest if c.name.startswith("everything")]
    assert not everything.fits and "too much for CUDA0" in everything.note
    (layers,) = [c for c in rest if c.name == "whole layers"]
    assert "KV cache" in layers.note and "slower" in layers.note


def test_depth_decides_between_layers_and_tensors(model: Callable[[str], ModelInfo]) -> None:
    """At depth attention has to be where the cache is; whole layers lose by a factor there and by little in a
    short chat (facts: 0.87 at 2k live tokens to 1.57 at 30k for one planner, 2.7 for a published pair)."""
    hardware = described("RTX 3060 12GB")

    def gap(depth: int) -> float:
        plan = planned(
            model("qwq-32b-q3_k_m"), hardware, Workload("", 256, 300, depth), Settings(n_ctx=32768, type_k="q8_0",
            type_v="q8_0", flash_attention="on")
        )  # fmt: skip
        (layers,) = [c for c in plan.candidates if c.name == "whole layers"]
        assert plan.estimate is not None and layers.estimate is not None
        return plan.estimate.decode_tokens_per_second / layers.estimate.decode_tokens_per_second

    short, deep = gap(1000), gap(30000)
    assert deep > 1.5 and deep > 1.3 * short


def test_settings_left_open(model: Callable[[str], ModelInfo]) -> None:
    """A long prompt through weights in RAM wants wide micro-batches; what was asked for stays."""
    mixture, hardware = model("mixtral-8x7b-q4_k_m"), described("RTX 3060 12GB")
    load = workloads.NAMED["long-document"]
    everything = planner.Open(context=True, kv_type=True, ubatch=True, op_offload=True)
    free = planned(mixture, hardware, load, open=everything)
    fixed = planned(mixture, hardware, load, Settings(n_ctx=25600, flash_attention="on"))
    assert free.settings.n_ctx == 25600 == -(-load.context // 1024) * 1024
    assert free.settings.n_ubatch > 512 and free.settings.n_batch >= free.settings.n_ubatch
    assert any("micro-batch" in reason for reason in free.reasons)
    assert (fixed.settings.n_ubatch, fixed.settings.type_k) == (512, "f16")
    assert free.estimate is not None and fixed.estimate is not None
    assert free.estimate.seconds < fixed.estimate.seconds
    if free.settings.type_k == "q8_0":
        assert any("quality" in reason for reason in free.reasons)


def test_no_flash_attention_no_quantized_cache(model: Callable[[str], ModelInfo]) -> None:
    settings = Settings(flash_attention="off")
    plan = planned(
        model("qwq-32b-iq4_xs"), described("RTX 3090"), Workload("", 256, 300, 20000), settings,
        planner.Open(context=True, kv_type=True),
    )  # fmt: skip
    assert plan.settings.type_v == "f16"


def test_context_is_no_longer_than_trained_for(model: Callable[[str], ModelInfo]) -> None:
    gemma = model("gemma-2-27b-q4_k_m")
    assert planner.context_for(gemma, Workload("", 100, 100, 0)) == 4096
    assert planner.context_for(gemma, Workload("", 100, 100, 4000)) == 5120
    assert planner.context_for(gemma, Workload("", 100, 100, 40000)) == 8192


class Stubborn:
    """Says that every device takes 700 MiB more than the formulas say as soon as any layer is split."""

    def __init__(self, model: ModelInfo) -> None:
        self.formulas = memory.Formulas(model, {})
        self.asked = 0

    def ask(self, plan: Plan) -> tuple[DeviceMemory, ...]:
        self.asked += 1
        more = 700 << 20 if plan.placement.overrides else 0
        return tuple(
            dataclasses.replace(row, compute_bytes=row.compute_bytes + more)
            for row in self.formulas.ask(plan)
        )


def test_what_wins_is_proved_and_planned_again_until_it_fits(model: Callable[[str], ModelInfo]) -> None:
    gemma, hardware = model("gemma-2-27b-q4_k_m"), described("RTX 3060 12GB")
    answers = Stubborn(gemma)
    plan = planned(gemma, hardware, answers=answers)
    (row,) = [r for r in plan.memory if r.device == "CUDA0"]
    (card,) = [d for d in hardware.devices if d.name == "CUDA0"]
    assert row.total_bytes <= budget.room(card)
    assert 2 <= answers.asked <= 7
    assert of_the_model(plan) == answers.ask(plan)
    easy = planned(gemma, hardware)
    assert plan.estimate is not None and easy.estimate is not None
    assert plan.estimate.seconds > easy.estimate.seconds


def test_more_than_main_memory_is_paged_and_said(model: Callable[[str], ModelInfo]) -> None:
    """Where mapping the file was asked for; ``test_paging`` has what is done otherwise."""
    settings = Settings(flash_attention="on", load_mode="mmap")
    plan = planned(model("gpt-oss-120b-mxfp4"), described("RTX 4060", ram=32), settings=settings)
    assert plan.settings.load_mode == "mmap" and not plan.settings.repack
    assert any("read from the drive" in reason for reason in plan.reasons)
    assert plan.estimate is not None and "drive" in plan.estimate.decode_seconds
    assert any("1.5 GB/s are assumed" in note for note in plan.estimate.notes)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (Settings(n_ctx=8192, load_mode="none"), "--load-mode auto"),
        (Settings(n_ctx=131072), r"--context \d+"),
        (Settings(n_ctx=65536, flash_attention="on"), "q8_0"),
    ],
)
def test_what_cannot_run_says_what_would(
    settings: Settings, told: str, model: Callable[[str], ModelInfo]
) -> None:
    """Llama-70B keeps 320 KiB per token: 20 GiB at 65536."""
    ram = 14 if settings.n_ctx == 65536 else 30
    with pytest.raises(UsageError, match=told) as caught:
        planned(model("llama-3.3-70b-q4_k_m"), described("GTX 1650 GDDR6", ram=ram), settings=settings)
    assert "GiB of main memory are missing" in str(caught.value) and "\n" not in str(caught.value)


def test_the_advice_is_true(model: Callable[[str], ModelInfo]) -> None:
    """The context that the message names fits, and the next step does not."""
    llama, hardware = model("llama-3.3-70b-q4_k_m"), described("GTX 1650 GDDR6", ram=16)
    with pytest.raises(UsageError) as caught:
        planned(llama, hardware, settings=Settings(n_ctx=131072))
    n = int(str(caught.value).split("--context ")[1].split(")")[0])
    assert n % 1024 == 0
    planned(llama, hardware, settings=Settings(n_ctx=n))
    with pytest.raises(UsageError):
        planned(llama, hardware, settings=Settings(n_ctx=n + 2048))


def test_a_plan_with_weights_on_the_drive_says_all_of_it(model: Callable[[str], ModelInfo]) -> None:
    """What was chosen is said as for any plan, and every note of the ladder compares with the plan that was made."""
    m = model("llama-3.3-70b-q4_k_m")
    here = catalogue.hypothetical(("RTX 4060 8GB",), 32 << 30, cpu_bandwidth=60, drive="NVMe PCIe 4.0 x4")
    speeds = rates.from_catalogue(here)
    wishes = planner.Open(context=True, kv_type=True, ubatch=True, op_offload=True)
    deep = Workload("", 256, 256, 7000)
    answers = memory.Formulas(m, {})
    plan = planner.plan(m, here, Settings(), workload=deep, rates=speeds, open=wishes, answers=answers)
    assert plan.tier is not None and plan.settings.type_k == "q8_0"
    assert any(reason.startswith("KV cache in q8_0") for reason in plan.reasons)
    assert plan.reasons[-1].startswith("context of 8192 tokens")
    assert plan.estimate is not None
    for other in plan.candidates[1:]:
        assert other.estimate is not None
        times = other.estimate.seconds / plan.estimate.seconds
        if other.fits:
            assert times > 1.2 and other.note.startswith(f"{times:.1f}x slower"), other.note
    advice = [w for w in plan.warnings if "KV cache are in RAM" in w]
    assert advice and "quantized" not in advice[0], "it is quantized already"


def test_where_ram_is_short_computing_takes_less_of_it(model: Callable[[str], ModelInfo]) -> None:
    """Qwen3-30B in 1.5 GiB: with micro-batches of 512 tokens, which take 300 MiB, other weights than experts have to
    leave RAM too. A micro-batch that was asked for stays."""
    m = model("qwen3-30b-a3b-q4_k_m")
    here = catalogue.hypothetical((), 16 << 30, cpu_bandwidth=60, drive="NVMe PCIe 4.0 x4")
    process = budget.process_bytes(m, Settings())
    here = dataclasses.replace(here, ram_available=process + (1250 << 20))
    speeds = rates.from_catalogue(here)
    asked = Settings(n_ctx=4096)
    answers = memory.Formulas(m, {})
    plan = planner.plan(m, here, asked, rates=speeds, open=planner.Open(ubatch=True), answers=answers)
    assert plan.tier is not None and plan.settings.n_ubatch < 512
    assert any(reason.startswith(f"micro-batch {plan.settings.n_ubatch}") for reason in plan.reasons)
    assert sum(row.total_bytes for row in plan.memory) <= here.ram_available
    fixed = planner.plan(m, here, asked, rates=speeds, answers=answers)
    assert fixed.settings.n_ubatch == 512
    assert fixed.estimate is not None and plan.estimate is not None
    assert fixed.estimate.seconds > plan.estimate.seconds


def test_the_largest_model_is_planned_in_seconds(model: Callable[[str], ModelInfo]) -> None:
    """DeepSeek-V3 in 16 GiB, with every setting left open: 16 choices, each with 256 experts in 58 layers."""
    m = model("deepseek-v3-q4_k_m")
    here = catalogue.hypothetical((), 16 << 30, cpu_bandwidth=60, drive="NVMe PCIe 4.0 x4")
    speeds = rates.from_catalogue(here)
    speeds = dataclasses.replace(speeds, plain=speeds.of("CPU"))
    wishes = planner.Open(True, True, True, True, True)
    begun = time.thread_time()
    plan = planner.plan(m, here, Settings(), rates=speeds, open=wishes, answers=memory.Formulas(m, {}))
    assert plan.tier is not None
    assert time.thread_time() - begun < 5


def test_a_ratio_of_assumed_speeds_is_not_told(model: Callable[[str], ModelInfo]) -> None:
    m = model("qwen3-30b-a3b-q4_k_m")
    here = catalogue.hypothetical((), 8 << 30, cpu_bandwidth=60, drive="NVMe PCIe 4.0 x4")
    published = rates.from_catalogue(here)
    guessed = measuring.assumed(here)
    assert guessed is not None
    told = [
        planner.plan(m, here, Settings(n_ctx=4096), rates=speeds, answers=memory.Formulas(m, {})).reasons[0]
        for speeds in (published, guessed)
    ]
    assert ["mapping the file instead" in reason for reason in told] == [True, False]


def test_graphics_that_share_main_memory_are_counted_in_what_is_left(
    model: Callable[[str], ModelInfo],
) -> None:
    m = model("qwen3-30b-a3b-q4_k_m")
    here = catalogue.hypothetical(("M1",), 8 << 30)
    speeds = rates.from_catalogue(here)
    plan = planner.plan(m, here, Settings(n_ctx=4096), rates=speeds, answers=memory.Formulas(m, {}))
    left = here.ram_available - sum(row.total_bytes for row in plan.memory)
    assert plan.tier is not None and 0 <= left < 1 << 20


def test_a_card_without_room(model: Callable[[str], ModelInfo]) -> None:
    m = model("qwen3-30b-a3b-q4_k_m")
    here = described("RTX 4060 8GB")
    full = dataclasses.replace(
        here,
        devices=tuple(dataclasses.replace(d, memory_free=0) if d.kind == "gpu" else d for d in here.devices),
    )
    speeds = rates.from_catalogue(full)
    plan = planner.plan(m, full, Settings(n_ctx=4096), rates=speeds, answers=memory.Formulas(m, {}))
    assert plan.reasons[0] == "no room on CUDA0: all in RAM"


def test_warnings(model: Callable[[str], ModelInfo]) -> None:
    qwq = model("qwq-32b-iq4_xs")
    card = described("RTX 3060 12GB", ram=32)
    layers = Placement(("CUDA0",), 20)
    plan = planner.manual_plan(
        qwq, card, Settings(n_ctx=8192, threads=32), layers, rates=rates.from_catalogue(card),
        answers=memory.Formulas(qwq, {}),
    )  # fmt: skip
    told = " | ".join(plan.warnings)
    assert "of the KV cache are in RAM" in told and "32 threads on 8 performance cores" in told
    assert plan.estimate is not None and plan.reasons == ("placed by hand",)
    small = dataclasses.replace(card, ram_available=15 * GIB, ram_limit=32 * GIB)
    plan = planner.manual_plan(qwq, small, Settings(), layers, answers=memory.Formulas(qwq, {}))
    assert any("of RAM free" in warning for warning in plan.warnings)
    windows = dataclasses.replace(card, os="Windows")
    full = dataclasses.replace(windows.devices[1], memory_free=11 * GIB)
    windows = dataclasses.replace(windows, devices=(windows.devices[0], full))
    plan = planner.manual_plan(
        qwq, windows, Settings(n_ctx=8192), Placement(("CUDA0",), 37), answers=memory.Formulas(qwq, {})
    )
    assert any("shared memory" in w for w in plan.warnings) == (plan.memory[1].total_bytes > 0.95 * 11 * GIB)
    assert plan.memory[1].total_bytes > 0.95 * 11 * GIB


def test_a_device_without_known_speed_is_left_out_and_said(model: Callable[[str], ModelInfo]) -> None:
    gemma, hardware = model("gemma-3-12b-q4_k_m"), described("RTX 3090")
    unknown = Device("RPC0", "gpu", "", 8 * GIB, 8 * GIB, "RPC")
    both = dataclasses.replace(hardware, devices=(*hardware.devices, unknown))
    plan = planner.plan(
        gemma, both, Settings(), rates=rates.from_catalogue(hardware), answers=memory.Formulas(gemma, {})
    )
    assert plan.placement.devices == ("CUDA0",)
    assert any("RPC0 is not used" in warning for warning in plan.warnings)


def test_graphics_that_share_main_memory_share_the_budget(model: Callable[[str], ModelInfo]) -> None:
    """An M-series machine with 16 GiB cannot hold 12 GiB on its graphics and 8 GiB beside them."""
    hardware = catalogue.hypothetical(["M4 Pro"], 24 * GIB)
    plan = planned(model("mixtral-8x7b-q4_k_m"), hardware)
    here = budget.budget_of(hardware, None, model("mixtral-8x7b-q4_k_m"), plan.settings)
    assert here.shared == {hardware.devices[1].name}
    assert sum(r.total_bytes for r in plan.memory) <= hardware.ram_available
    mapped = planned(model("mixtral-8x7b-q4_k_m"), hardware, settings=Settings(load_mode="mmap"))
    paged = here.paged(mapped.memory, pageable=True)
    assert paged == max(0, sum(r.total_bytes for r in mapped.memory) - hardware.ram_available) > 0


def processor_seconds() -> float:
    """Of this process and of those it has started that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.mark.parametrize("mib", [0, 60, 200, 2000])
def test_a_real_model_on_a_real_device(mib: int, smollm2_path: Path, rpc_device: str) -> None:
    """llama.cpp's own bytes, on the RPC device with its free memory set by hand."""
    size = mib << 20
    base = described("RTX 3090", ram=16)
    details = {
        "bandwidth_bytes_per_s": 200e9,
        "fp16_flops": 20e12,
        "link_bandwidth_bytes_per_s": 10e9,
    }
    remote = Device("RPC0", "gpu", "", size, size, "RPC", details=details)
    hardware = dataclasses.replace(base, devices=(remote, base.devices[0]))
    begun = processor_seconds()
    model = gguf.read(smollm2_path)
    plan = planner.plan(
        model,
        hardware,
        Settings(n_ctx=1024),
        rates=rates.from_catalogue(hardware),
        workload=Workload("", 100, 100, 100),
        rpc=(rpc_device,),
    )
    assert processor_seconds() - begun < 5  # under a second is usual
    used = {r.device: r.total_bytes for r in plan.memory}.get("RPC0", 0)
    assert used <= 0.9 * size
    assert of_the_model(plan) == memory.predict(plan)
    if mib == 2000:
        assert plan.reasons == ("everything fits on RPC0: nothing to decide",)


def test_no_solver_where_nothing_is_to_decide(smollm2_path: Path) -> None:
    """Starting up must not wait for it."""
    import subprocess
    import sys

    code = (
        "import sys; from tensortier import gguf, hardware, memory, planner, rates, catalogue\n"
        "from tensortier.types import Settings\n"
        f"model = gguf.read({str(smollm2_path)!r})\n"
        "machine = catalogue.hypothetical(['RTX 3090'], 1 << 36, cpu_bandwidth=60)\n"
        "planner.plan(model, machine, Settings(), rates=rates.from_catalogue(machine),"
        " answers=memory.Formulas(model, {}))\n"
        "print('highspy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_levels(model: Callable[[str], ModelInfo]) -> None:
    qwq, hardware = model("qwq-32b-iq4_xs"), described("RTX 3060 12GB", "RTX 4060")
    settings = Settings(n_ctx=16384, flash_attention="on", threads=8)
    found = levels(
        qwq, hardware, settings, workload=workloads.NAMED["agent"], rates=rates.from_catalogue(hardware)
    )
    assert [level.share for level in found] == [n / 10 for n in range(11)]
    assert (found[0].layers, found[-1].layers) == (0, 65)
    whole = sum(t.nbytes for t in qwq.tensors) - next(
        t.nbytes for t in qwq.tensors if t.name == "token_embd.weight"
    )
    faster = 0
    for level in found:
        layers, tensors = level.by_layers, level.by_tensors
        on_gpus = sum(r.weights_bytes for r in layers.memory if r.device != "CPU")
        assert on_gpus <= level.share * whole
        if level.layers < 65:
            where = placement.resolve(
                qwq, dataclasses.replace(layers.placement, n_gpu_layers=level.layers + 1), {}
            )
            more = sum(t.nbytes for t in qwq.tensors if where[t.name] != "CPU")
            assert more > level.share * whole, "one more layer would still be within the share"
        held = {r.device: r.total_bytes for r in layers.memory}
        for row in tensors.memory:
            assert row.device == "CPU" or row.total_bytes <= held[row.device] + 256 * len(qwq.tensors)
        assert tensors.estimate.seconds <= layers.estimate.seconds
        faster += tensors.estimate.seconds < 0.8 * layers.estimate.seconds
    assert faster >= 5
    assert found[0].by_layers.fits and not found[-1].by_layers.fits
    nothing = dataclasses.replace(hardware, devices=hardware.devices[:1])
    assert not levels(qwq, nothing, settings, workload=CHAT, rates=rates.from_catalogue(nothing))


def test_gains(model: Callable[[str], ModelInfo]) -> None:
    """Each against a plan made for the better machine in the ordinary way."""
    gemma, hardware = model("gemma-2-27b-q4_k_m"), described("RTX 3060 12GB")
    plan = planned(gemma, hardware)
    found = {
        g.what: g for g in gains(gemma, hardware, plan, workload=CHAT, rates=rates.from_catalogue(hardware))
    }
    assert set(found) == {"1 GiB more on CUDA0", "a 10 % faster link", "10 % faster RAM"}
    card = dataclasses.replace(hardware.devices[1], memory_free=hardware.devices[1].memory_free + GIB)
    larger = planned(gemma, dataclasses.replace(hardware, devices=(hardware.devices[0], card)))
    assert larger.estimate is not None
    assert found["1 GiB more on CUDA0"].seconds == pytest.approx(larger.estimate.seconds, rel=0.015)
    cpu = hardware.devices[0]
    details = {**cpu.details, "bandwidth_bytes_per_s": cpu.details["bandwidth_bytes_per_s"] * 1.1}
    quicker = dataclasses.replace(
        hardware, devices=(dataclasses.replace(cpu, details=details), hardware.devices[1])
    )
    faster = planned(gemma, quicker)
    assert faster.estimate is not None
    assert found["10 % faster RAM"].seconds == pytest.approx(faster.estimate.seconds, rel=0.015)
    assert all(0 <= g.saved < 0.5 for g in found.values())
    assert found["10 % faster RAM"].saved > 0.02


def test_gains_on_the_drive(model: Callable[[str], ModelInfo]) -> None:
    """More RAM and a faster drive, against plans made for such a machine in the ordinary way."""
    m = model("qwen3-30b-a3b-q4_k_m")
    for cards in ((), ("RTX 4060 8GB",)):
        here = described(*cards, ram=8, drive="NVMe PCIe 4.0 x4")
        speeds = rates.from_catalogue(here)
        plan = planned(m, here)
        assert plan.tier is not None and plan.estimate is not None
        found = {g.what: g for g in gains(m, here, plan, workload=CHAT, rates=speeds)}
        assert set(found) == {
            "1 GiB more of RAM", "a drive twice as fast", "10 % faster RAM",
            *(("1 GiB more on CUDA0", "a 10 % faster link") if cards else ()),
        }  # fmt: skip
        assert speeds.drive is not None
        drive = dataclasses.replace(speeds.drive, value=2 * speeds.drive.value)
        twice = planner.plan(
            m, here, Settings(n_ctx=4096), workload=CHAT,
            rates=dataclasses.replace(speeds, drive=drive), answers=memory.Formulas(m, {}),
        )  # fmt: skip
        larger = planned(m, dataclasses.replace(here, ram_available=here.ram_available + GIB))
        for what, then in (("a drive twice as fast", twice), ("1 GiB more of RAM", larger)):
            assert then.estimate is not None
            assert found[what].seconds == pytest.approx(then.estimate.seconds, rel=0.01)
            assert found[what].saved == pytest.approx(
                1 - then.estimate.seconds / plan.estimate.seconds, abs=0.01
            )
            assert found[what].saved > 0.05


def test_the_process_counts_what_each_sequence_takes(model: Callable[[str], ModelInfo]) -> None:
    """Logits of one token for each, f32."""
    m = model("gemma-3-12b-q4_k_m")
    one, four = (budget.process_bytes(m, Settings(n_seq_max=n)) for n in (1, 4))
    assert four - one == 3 * 4 * m.n_vocab
    plan = planned(m, described("RTX 3090"), settings=Settings(n_seq_max=4))
    assert plan.memory[-1] == DeviceMemory("process", 0, 0, four)


def test_kernels_are_chosen_for_the_workload(model: Callable[[str], ModelInfo]) -> None:
    """Plain weights are computed twice as fast with many columns here, and read 1.3 times slower with one."""
    m, here = model("gemma-3-12b-q4_k_m"), described(ram=32)
    speeds = rates.from_catalogue(here)
    cpu = speeds.of("CPU")
    plain = dataclasses.replace(
        cpu,
        other_narrow=dataclasses.replace(cpu.other_narrow, value=cpu.other_narrow.value / 1.3),
        other_wide=dataclasses.replace(cpu.other_wide, value=cpu.other_wide.value * 2),
    )
    both = dataclasses.replace(speeds, plain=plain)
    long, chat = Workload("", 8000, 50, 0), Workload("", 50, 500, 0)
    for load, known, free, repack in (
        (long, both, True, False), (chat, both, True, True), (long, speeds, True, True), (long, both, False, True),
    ):  # fmt: skip
        plan = planner.plan(
            m, here, Settings(n_ctx=16384), workload=load, rates=known, open=planner.Open(repack=free),
            answers=memory.Formulas(m, {}),
        )  # fmt: skip
        assert plan.settings.repack == repack
        assert any("stay as they are in the file" in r for r in plan.reasons) == (not repack)
        # as if those had been the only kernels
        only = known.kernels(repack=repack)
        alone = cost.estimate(m, plan, dataclasses.replace(only, plain=None), load, {})
        assert plan.estimate is not None and plan.estimate.seconds == pytest.approx(alone.seconds)
    # where a GPU takes the prompts' products, nobody asks
    card = described("RTX 3060 12GB")
    with_card = dataclasses.replace(rates.from_catalogue(card), plain=plain)
    plan = planner.plan(
        m, card, Settings(n_ctx=16384), workload=long, rates=with_card, open=planner.Open(repack=True),
        answers=memory.Formulas(m, {}),
    )  # fmt: skip
    assert plan.settings.repack
