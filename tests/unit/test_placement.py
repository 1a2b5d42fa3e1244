"""Placement rules against llama.cpp's own account, and the command line's options."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensortier import budget, gguf, memory, placement, planner
from tensortier.errors import PatternError, UsageError
from tensortier.types import Device, Hardware, ModelInfo, Override, Placement, Plan, Settings
from tests.backend_fixtures import rpc_server

GIB = 1 << 30


def machine(*gpu_gib: float, ram_gib: float = 1000) -> Hardware:
    """A machine with these GPUs; only what placement reads is real."""
    gpus = tuple(
        Device(f"CUDA{i}", "gpu", "card", int(g * GIB), int(g * GIB), "CUDA") for i, g in enumerate(gpu_gib)
    )
    ram = int(ram_gib * GIB)
    cpu = Device("CPU", "cpu", "processor", ram, ram, "CPU")
    return Hardware(
        cpu_model="",
        architecture="x86_64",
        physical_cores=2,
        logical_cores=2,
        performance_cores=2,
        usable_cpus=2,
        cpu_features=(),
        ram_total=ram,
        ram_limit=ram,
        ram_available=ram,
        swap_total=0,
        os="Linux",
        devices=(*gpus, cpu),
        drives=(),
    )


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> ModelInfo:
    return gguf.read(smollm2_path)


@pytest.fixture(scope="module")
def moe(moe_path: Path) -> ModelInfo:
    return gguf.read(moe_path)


@pytest.fixture(scope="module")
def two_servers(rpc_module: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("servers")
    with rpc_server(folder / "a.log") as a, rpc_server(folder / "b.log") as b:
        yield a, b


@pytest.mark.parametrize("fixture", ["smollm2", "moe"])
def test_resolve_agrees_with_llama_cpp(
    fixture: str, two_servers: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    """Random placements over two devices: bytes of weights per device, against ``no_alloc``'s layout."""
    model: ModelInfo = request.getfixturevalue(fixture)
    rng = random.Random(5)
    names = ("RPC0", "RPC1")
    patterns = [r"ffn_up", r"^blk\.(3|7)\.", r"attn_[kv]\.", r"blk\.1\d\.ffn_(gate|down)", r"output", r"norm"]
    embedding = next(t.nbytes for t in model.tensors if t.name == "token_embd.weight")
    with memory.Probe() as probe:
        for _ in range(12):
            place = Placement(
                devices=rng.choice([names, names[:1], names[::-1]]),
                n_gpu_layers=rng.choice([-1, 0, 1, 5, 17, 30, 31, 99]),
                overrides=tuple(
                    Override(p, rng.choice(["CPU", *names])) for p in rng.sample(patterns, rng.randrange(3))
                ),
            )
            place = Placement(
                place.devices, place.n_gpu_layers, (3.0, 1.0)[: len(place.devices)], place.overrides
            )
            plan = Plan(model.path, place, Settings(n_ctx=256), rpc=two_servers)
            told = {row.device: row.weights_bytes for row in probe.ask(plan)}
            where = placement.resolve(model, place, {})
            expected = placement.bytes_per_device(model, where)
            output = placement.layer_devices(model, place, {})[-1]
            # an embedding that is tied is read as the output too: a second copy where that is elsewhere
            if (
                not any(t.name == "output.weight" for t in model.tensors)
                and output != where["token_embd.weight"]
            ):
                expected[output] = expected.get(output, 0) + embedding
            slack = 256 * len(model.tensors)  # alignment of each tensor
            for device in set(told) | set(expected):
                difference = told.get(device, 0) - expected.get(device, 0)
                assert 0 <= difference <= slack, f"{place}: {device} {told} {expected}"


def flags(model: ModelInfo, hardware: Hardware, **options: Any) -> tuple[Placement, tuple[str, ...]]:
    return placement.from_flags(model, hardware, **options)


def test_no_options_mean_all_layers_on_all_gpus(smollm2: ModelInfo) -> None:
    place, warnings = flags(smollm2, machine(8, 8))
    assert place == Placement(("CUDA0", "CUDA1"), -1)
    assert warnings == ()


def test_override_texts(smollm2: ModelInfo) -> None:
    place, warnings = flags(smollm2, machine(8), override_tensors=["ffn_up=CPU,a{2}=CUDA0"])
    assert place.overrides == (Override("ffn_up", "CPU"), Override("a{2}", "CUDA0"))
    assert warnings == ("the pattern 'a{2}' matches no tensor of this model",)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"override_tensors": ["ffn_up"]}, PatternError, "PATTERN=DEVICE"),
        ({"override_tensors": ["=CPU"]}, PatternError, "PATTERN=DEVICE"),
        ({"override_tensors": ["(=CPU"]}, PatternError, r"\("),
        ({"override_tensors": ["x=GPU9"]}, UsageError, "CUDA0, CPU"),
        ({"devices": ["CUDA1"]}, UsageError, "CUDA1"),
        ({"devices": ["CPU"]}, UsageError, "not offloaded"),
        ({"devices": ["CUDA0", "cuda0"]}, UsageError, "twice"),
        ({"n_gpu_layers": -2}, UsageError, "-2"),
        ({"n_cpu_moe": -1}, UsageError, "n-cpu-moe"),
        ({"n_cpu_ffn": -1}, UsageError, "n-cpu-ffn"),
        ({"tensor_split": [1, 2]}, UsageError, "1 devices"),
        ({"tensor_split": [-1]}, UsageError, "shares"),
        ({"tensor_split": [0]}, UsageError, "shares"),
    ],
)
def test_bad_options(smollm2: ModelInfo, options: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        flags(smollm2, machine(8), **options)


def test_cpu_moe_family(moe: ModelInfo, smollm2: ModelInfo) -> None:
    """Bytes moved, counted here by name, apart from the patterns."""
    free = {"CUDA0": GIB}

    def on_cpu(model: ModelInfo, **options: Any) -> set[str]:
        place, warnings = flags(model, machine(8), **options)
        assert warnings == ()
        where = placement.resolve(model, place, free)
        return {name for name, device in where.items() if device == "CPU"} - {"token_embd.weight"}

    experts = {t.name for t in moe.tensors if "_exps." in t.name}
    assert len(experts) == 90
    assert on_cpu(moe, cpu_moe=True) == experts
    assert on_cpu(moe, n_cpu_moe=3) == {n for n in experts if int(n.split(".")[1]) < 3}
    assert on_cpu(moe, n_cpu_moe=1000) == experts
    dense = {
        t.name
        for t in smollm2.tensors
        if ".ffn_up." in t.name or ".ffn_gate." in t.name or ".ffn_down." in t.name
    }
    assert on_cpu(smollm2, n_cpu_ffn=2) == {n for n in dense if int(n.split(".")[1]) < 2}


def test_options_that_do_nothing_are_named(smollm2: ModelInfo, moe: ModelInfo) -> None:
    assert "--cpu-moe" in flags(smollm2, machine(8), cpu_moe=True)[1][0]
    assert "--n-cpu-moe 4" in flags(smollm2, machine(8), n_cpu_moe=4)[1][0]
    assert "--n-cpu-ffn 4" in flags(moe, machine(8), n_cpu_ffn=4)[1][0]
    assert "no GPU" in flags(smollm2, machine(), n_gpu_layers=99)[1][0]


def test_device_names_may_be_those_of_buffer_types() -> None:
    hardware = machine(8)
    remote = Device("RPC0", "gpu", "", GIB, GIB, "RPC", "RPC0[127.0.0.1:5000]")
    both = Hardware(**{**hardware.__dict__, "devices": (*hardware.devices, remote)})
    assert placement.device_name(both, "rpc0", "-ot") == "RPC0"
    assert placement.device_name(both, "RPC0[127.0.0.1:5000]", "-ot") == "RPC0"
    assert placement.gpus(both)[0] is remote
    with pytest.raises(UsageError):
        placement.device_name(both, "RPC", "-ot")


def test_compact_overrides_hit_exactly_what_they_name(moe: ModelInfo) -> None:
    rng = random.Random(1)
    blocks = [t for t in moe.tensors if t.layer is not None]
    for size in (1, 2, 40, len(blocks)):
        chosen = rng.sample(blocks, size)
        place = Placement(("CUDA0",), -1, overrides=planner.to_cpu(chosen))
        where = placement.resolve(moe, place, {})
        got = {name for name, device in where.items() if device == "CPU"}
        assert got - {"token_embd.weight"} == {t.name for t in chosen}
        assert all("," not in o.pattern for o in place.overrides)


class TestSimplePlan:
    """Devices that are not here cannot be asked, so an RPC server stands for the GPU and its free memory, as
    the planner sees it, is set by hand; llama.cpp answers every memory question."""

    def plan(self, model: ModelInfo, rpc_device: str, mib: float) -> Plan:
        size = int(mib * (1 << 20))
        base = machine()
        device = Device("RPC0", "gpu", "", size, size, "RPC")
        hardware = Hardware(**{**base.__dict__, "devices": (device, *base.devices)})
        return planner.simple_plan(model, hardware, Settings(n_ctx=1024), rpc=(rpc_device,))

    @pytest.mark.parametrize("fixture", ["smollm2", "moe"])
    def test_every_budget_is_kept(
        self, fixture: str, rpc_device: str, request: pytest.FixtureRequest
    ) -> None:
        model: ModelInfo = request.getfixturevalue(fixture)
        last = -1
        for mib in (0, 20, 60, 120, 200, 300, 2000):
            plan = self.plan(model, rpc_device, mib)
            used = {r.device: r.total_bytes for r in plan.memory}.get("RPC0", 0)
            assert used <= 0.9 * mib * (1 << 20)
            assert used >= last, "more memory is never used worse"
            last = used
        assert plan.reasons == ("everything fits on RPC0",)
        assert plan.placement.overrides == ()

    def test_attention_and_kv_come_first(self, smollm2: ModelInfo, rpc_device: str) -> None:
        plan = self.plan(smollm2, rpc_device, 200)
        assert plan.placement.n_gpu_layers == -1
        where = placement.resolve(smollm2, plan.placement, {})
        spilled = [t for t in smollm2.tensors if where[t.name] == "CPU" and t.name != "token_embd.weight"]
        assert spilled and all(t.role.is_dense_ffn for t in spilled)
        kv = {r.device: r.kv_bytes for r in plan.memory}
        assert kv.get("CPU", 0) == 0 and kv["RPC0"] > 0

    def test_what_does_not_fit_in_ram_is_said(self, smollm2: ModelInfo) -> None:
        process = budget.process_bytes(smollm2, Settings()) / GIB
        plan = planner.simple_plan(smollm2, machine(ram_gib=process + 0.1), Settings())
        assert "CPU has 0.10 GiB free" in plan.warnings[0]


def test_one_card_under_two_backends_counts_once() -> None:
    """As llama.cpp chooses its devices: by PCI address; integrated graphics of one backend only."""
    card = Device("CUDA0", "gpu", "", GIB, GIB, "CUDA", device_id="0000:01:00.0")
    again = Device("Vulkan0", "gpu", "", GIB, GIB, "Vulkan", device_id="0000:01:00.0")
    other = Device("Vulkan1", "gpu", "", GIB, GIB, "Vulkan", device_id="0000:02:00.0")
    nameless = [Device(f"X{i}", "gpu", "", GIB, GIB, "X") for i in range(2)]
    integrated = [Device(n, "igpu", "", GIB, GIB, n[:-1]) for n in ("Vulkan0", "Vulkan1", "SYCL0")]

    def chosen(*devices: Device) -> list[str]:
        return [d.name for d in placement.gpus(dataclasses.replace(machine(), devices=devices))]

    assert chosen(card, again, other, *nameless, *integrated) == ["CUDA0", "Vulkan1", "X0", "X1"]
    assert chosen(*integrated) == ["Vulkan0", "Vulkan1"]


def test_a_layer_on_the_border_goes_where_single_precision_sends_it(smollm2: ModelInfo) -> None:
    """0.1 + 0.2 is 0.3 in llama.cpp's floats and more than that in Python's; numpy does it in theirs."""
    rng = random.Random(3)
    names = ("A", "B", "C")
    cases = [(0.1, 0.2, 0.7), *(tuple(rng.randrange(1, 30) / 10 for _ in names) for _ in range(200))]
    for shares in cases:
        for n in (10, 20, 30, -1):
            ends = np.cumsum(np.array(shares, dtype=np.float32), dtype=np.float32)
            ends /= ends[-1]
            count = 31 if n < 0 else n
            points = np.arange(count, dtype=np.float32) / np.float32(count)
            expected = [names[i] for i in np.searchsorted(ends, points, side="right")]
            assert placement.layer_devices(smollm2, Placement(names, n, shares), {})[-count:] == tuple(
                expected
            )


def test_compact_overrides_of_an_encoder_and_decoder(smollm2: ModelInfo) -> None:
    source = next(t for t in smollm2.tensors if t.name == "blk.3.ffn_up.weight")
    tensors = [
        dataclasses.replace(source, name=f"{side}.blk.{i}.ffn_up.weight", layer=i)
        for side in ("enc", "dec")
        for i in (0, 1)
    ]
    model = dataclasses.replace(smollm2, tensors=(source, *tensors))
    place = Placement(("CUDA0",), -1, overrides=planner.to_cpu(tensors[:3]))
    where = placement.resolve(model, place, {})
    assert [name for name, device in where.items() if device == "CPU"] == [t.name for t in tensors[:3]]


def test_the_shares_of_two_devices_are_written_down(smollm2: ModelInfo, two_servers: tuple[str, str]) -> None:
    """llama.cpp shares the layers out by what is free when it loads; the plan must not depend on that."""
    devices = tuple(Device(f"RPC{i}", "gpu", "", s, s, "RPC") for i, s in enumerate((GIB, GIB // 4)))
    hardware = dataclasses.replace(machine(), devices=(*devices, *machine().devices))
    plan = planner.simple_plan(smollm2, hardware, Settings(n_ctx=256), rpc=two_servers)
    kv = {r.device: r.kv_bytes for r in plan.memory}
    assert kv["RPC0"] * 5 == kv["RPC1"] * 25  # 25 blocks here, 5 there and the output
    told = placement.layer_devices(smollm2, plan.placement, {})
    assert [told.count("RPC0"), told.count("RPC1")] == [25, 6]
