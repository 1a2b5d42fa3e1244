"""Exports read back by each engine's own rules, with ``std::regex`` itself."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tensortier import catalogue, export, gguf, memory, placement, planner, rates
from tensortier import overrides as patterns
from tensortier.errors import PlanError, UsageError
from tensortier.types import Export, ModelInfo, Override, Placement, Plan, Role, Settings

GOLDEN = Path(__file__).parent.parent / "golden" / "export"
SKELETONS = ("qwq-32b-q3_k_m", "gpt-oss-120b-mxfp4", "deepseek-v3-q4_k_m")
RPC = ("10.0.0.1:50052", "gpu-box:50053")

# -------------------------------------------------------------------------------- reading exports back

_MATCHER = """
#include <iostream>
#include <regex>
#include <string>
#include <vector>
int main() {  // blocks of: number of names, names, number of patterns, patterns; answers the first that is found
    std::string line;
    while (std::getline(std::cin, line)) {
        std::vector<std::string> names(std::stoi(line));
        for (auto & n : names) std::getline(std::cin, n);
        std::getline(std::cin, line);
        std::vector<std::regex> patterns;
        for (int i = std::stoi(line); i > 0; i--) {
            std::getline(std::cin, line);
            patterns.emplace_back(line);
        }
        for (auto & n : names) {
            size_t i = 0;
            while (i < patterns.size() && !std::regex_search(n, patterns[i])) i++;
            std::cout << i << '\\n';
        }
    }
}
"""


@pytest.fixture(scope="module")
def first_match(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Sequence[str], Sequence[str]], list[int]]:
    """Index of the first pattern that ``std::regex_search`` finds in each name; their number where none is."""
    folder = tmp_path_factory.mktemp("matcher")
    compiler = shutil.which("c++")
    assert compiler, "a C++ compiler builds the native part, so there is one"
    (folder / "match.cpp").write_text(_MATCHER)
    subprocess.run([compiler, "-std=c++17", "-O1", "-o", folder / "match", folder / "match.cpp"], check=True)

    def run(names: Sequence[str], found: Sequence[str]) -> list[int]:
        lines = [str(len(names)), *names, str(len(found)), *found]
        done = subprocess.run(
            [folder / "match"], input="\n".join(lines) + "\n", capture_output=True, text=True, check=True
        )
        return [int(line) for line in done.stdout.split()]

    return run


@pytest.fixture(scope="module")
def models(smollm2_path: Path, moe_path: Path, skeleton: Callable[[str], Path]) -> dict[str, ModelInfo]:
    paths = {"smollm2": smollm2_path, "moe": moe_path} | {name: skeleton(name) for name in SKELETONS}
    return {name: gguf.read(path) for name, path in paths.items()}


def random_plan(rng: random.Random, model: ModelInfo, remote: bool) -> Plan:
    cards = ("CUDA0", "CUDA1")
    choices = [(), cards[:1], cards, cards[::-1], *([("RPC1", "CUDA0"), ("RPC0", "RPC1")] if remote else [])]
    devices = rng.choice(choices)
    names = [t.name for t in rng.sample(model.tensors, rng.randrange(1, len(model.tensors) // 3))]
    awkward = [
        r"ffn_(up|down)",
        r"^blk\.(\d|1[0-9])\.",
        r"blk\.\d*[13579]\.ffn_up",
        r"exps",
        r"^output",
        r"attn_[kv]\.weight$",
        r"(?!blk).*norm",
        "^(" + "|".join(n.replace(".", r"\.") for n in names) + ")$",
    ]
    return Plan(
        model.path,
        Placement(
            devices=devices,
            n_gpu_layers=rng.choice([-1, -1, 0, 1, 7, model.n_layers, model.n_layers + 1]),
            tensor_split=tuple(rng.choice([0.0, 1.0, 2.5, 0.3333333]) + 0.1 for _ in devices)
            if len(devices) > 1
            else (),
            overrides=tuple(
                Override(p, rng.choice(["CPU", *devices])) for p in rng.sample(awkward, rng.randrange(4))
            ),
        ),
        Settings(n_ctx=4096, threads=4),
        rpc=RPC if any(d.startswith("RPC") for d in devices) else (),
    )


def options(argv: Sequence[str], flags: Sequence[str] = ()) -> dict[str, str]:
    """Options that each take one value, and ``flags`` that take none."""
    found, rest = {}, list(argv[1:])
    while rest:
        option = rest.pop(0)
        assert option not in found
        found[option] = "" if option in flags else rest.pop(0)
    return found


def split_overrides(value: str | None, separator: str, devices: Mapping[str, str]) -> list[tuple[str, str]]:
    """[(pattern, device of the plan)]. ``devices``: the engine's name of a buffer type -> the plan's."""
    rows = []
    for part in value.split(separator) if value else ():
        at = part.find("=")
        assert at > 0 and "=" not in part[at + 1 :]
        rows.append((part[:at], devices[part[at + 1 :]]))
    return rows


Read = tuple[Placement, list[tuple[str, str]]]


def read_llama(exported: Export, rpc_name: str = "RPC0[{}]") -> Read:
    flags = ("-nkvo", "--no-repack", "--no-op-offload", "--swa-full", "--no-mmap", "--mlock")
    got = options(exported.argv, flags)
    back = {"CPU": "CPU", "CUDA0": "CUDA0", "CUDA1": "CUDA1"} | {
        rpc_name.format(e): f"RPC{i}" for i, e in enumerate(RPC)
    }
    if exported.target != "ik_llama.cpp":
        assert got["-fit"] == "off"
        devices = got["-dev"].split(",")
    else:
        devices = [back.get(d, d) for d in got["-dev"].split(",")]
    if "--rpc" in got:
        assert tuple(got["--rpc"].split(",")) == RPC
        assert list(got).index("--rpc") < list(got).index("-dev")
    layers = -1 if got["-ngl"] == "all" else int(got["-ngl"])
    split = tuple(map(float, got["-ts"].split(","))) if "-ts" in got else ()
    place = Placement(() if devices == ["none"] else tuple(devices), layers, split)
    return place, split_overrides(got.get("-ot"), ",", back)


def read_bench(exported: Export) -> Read:
    got = options(exported.argv)
    assert not any("," in value for option, value in got.items() if option != "-rpc")
    back = {"CPU": "CPU", "CUDA0": "CUDA0", "CUDA1": "CUDA1"} | {
        f"RPC0[{e}]": f"RPC{i}" for i, e in enumerate(RPC)
    }
    devices = () if got["-dev"] == "none" else tuple(got["-dev"].split("/"))
    split = tuple(map(float, re.split("[;/]+", got["-ts"]))) if "-ts" in got else ()
    return Placement(devices, int(got["-ngl"]), split), split_overrides(got.get("-ot"), ";", back)


def read_koboldcpp(exported: Export) -> Read:
    """From the file; the command must say the same."""
    (text,) = exported.files.values()
    config = json.loads(text)
    argv = list(exported.argv)
    for option in ("--gpulayers", "--overridetensors", "--contextsize"):
        key = option.removeprefix("--")
        assert (argv[argv.index(option) + 1] if option in argv else None) == (
            str(config[key]) if key in config else None
        )
    shares = config.get("tensor_split", [])
    if shares:
        at = argv.index("--tensor_split") + 1
        assert [float(v) for v in argv[at : at + len(shares)]] == pytest.approx(shares, rel=1e-6)
    if config.get("usecpu"):
        devices: tuple[str, ...] = ()
        back = {"CPU": "CPU"}
    elif config["usecuda"] == ["normal"]:
        devices = ("CUDA0", "CUDA1")
        back = {"CPU": "CPU", "CUDA0": "CUDA0", "CUDA1": "CUDA1"}
    else:  # one card is made the only visible one
        devices = (f"CUDA{config['usecuda'][0]}",)
        back = {"CPU": "CPU", "CUDA0": devices[0]}
    place = Placement(devices, config["gpulayers"], tuple(shares))
    return place, split_overrides(config.get("overridetensors"), ",", back)


def read_python(exported: Export) -> Read:
    (text,) = exported.files.values()
    values = {
        node.targets[0].id: node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    arguments = ast.literal_eval(values["ARGUMENTS"])
    back = {"CPU": "CPU", "CUDA0": "CUDA0", "CUDA1": "CUDA1"} | {
        f"RPC0[{e}]": f"RPC{i}" for i, e in enumerate(RPC)
    }
    place = Placement(
        tuple(ast.literal_eval(values["DEVICES"])),
        arguments["n_gpu_layers"],
        tuple(arguments.get("tensor_split", ())),
    )
    return place, [(p, back[d]) for p, d in ast.literal_eval(values["OVERRIDES"])]


READERS: dict[str, Callable[[Export], Read]] = {
    "llama-server": read_llama,
    "llama-cli": read_llama,
    "llama-bench": read_bench,
    "ik_llama.cpp": lambda exported: read_llama(exported, "RPC[{}]"),
    "koboldcpp": read_koboldcpp,
    "llama-cpp-python": read_python,
}


@pytest.mark.parametrize("name", ["smollm2", "moe", *SKELETONS])
def test_round_trip(
    name: str,
    models: dict[str, ModelInfo],
    first_match: Callable[[Sequence[str], Sequence[str]], list[int]],
) -> None:
    """Every tensor lands where the plan puts it, by the reader's account of each engine."""
    model = models[name]
    names = [t.name for t in model.tensors]
    rng = random.Random(name)
    placed = 0
    for round_ in range(6):
        for target, read in READERS.items():
            plan = random_plan(rng, model, remote=target != "koboldcpp")
            if target == "koboldcpp" and plan.placement.devices == ("CUDA1", "CUDA0"):
                continue  # it cannot, and says so: see test_koboldcpp_devices
            place, overrides = read(export.export(plan, model, target))
            home = placement.resolve(model, place, {})
            found = first_match(names, [p for p, _ in overrides])
            got = {
                n: overrides[i][1] if i < len(overrides) else home[n]
                for n, i in zip(names, found, strict=True)
            }
            assert got == placement.resolve(model, plan.placement, {}), f"{target}, round {round_}: {plan}"
            assert len(overrides) < 4096
            placed += len(overrides) > 0
    assert placed > 10


ODD_NAMES = [
    f"{head}{number}.{tail}"
    for head in ("blk.", "v.blk.", ".")
    for number in ("0", "7", "07", "19", "123", "1000")
    for tail in (
        "a",
        "b",
        "ab",
        "ffn_up.weight",
        "ffn_up.bias",
        "ffn_gate.weight",
        "ffn_gate.bias",
        "\u00e9",
        "\u00e8a",
    )
] + ["output.weight", "output_norm.weight", "w,=;\"'", "(a|b)*[c]{2}\\d^$+?", "blk"]


def test_odd_names_by_std_regex(first_match: Callable[[Sequence[str], Sequence[str]], list[int]]) -> None:
    rng = random.Random(7)
    for _ in range(12):
        where = {n: rng.choice(["CPU", "CUDA0", None, None]) for n in ODD_NAMES}
        names: dict[str, list[str]] = {}
        for name, device in where.items():
            if device:
                names.setdefault(device, []).append(name)
        overrides = patterns.compact(names, ODD_NAMES)
        found = first_match(ODD_NAMES, [o.pattern for o in overrides])
        devices = [o.device for o in overrides] + [None]
        assert {n: devices[i] for n, i in zip(ODD_NAMES, found, strict=True)} == where


# ----------------------------------------------------------------------------------- single engines


def quick(model: ModelInfo, place: Placement, **changed: object) -> Plan:
    rpc = changed.pop("rpc", ())
    return Plan(model.path, place, dataclasses.replace(Settings(), **changed), rpc=rpc)  # type: ignore[arg-type]


def test_unknown_target(models: dict[str, ModelInfo]) -> None:
    with pytest.raises(UsageError, match=r"did you mean llama-server\? there are: llama-server, .*lm-studio"):
        export.export(quick(models["smollm2"], Placement()), models["smollm2"], "llama-serve")


def test_settings_reach_llama_server(models: dict[str, ModelInfo]) -> None:
    model = models["smollm2"]
    plan = Plan(
        model.path,
        Placement(("CUDA0",), -1, kv_on_device=False),
        Settings(
            n_ctx=8192,
            n_batch=1024,
            n_ubatch=256,
            n_seq_max=2,
            type_k="q8_0",
            type_v="q4_0",
            flash_attention="on",
            threads=6,
            threads_batch=8,
            load_mode="direct",
            repack=False,
            op_offload=False,
            swa_full=True,
        ),
    )
    exported = export.export(plan, model, "llama-server")
    assert [s for s in exported.lost if "--cache-ram" not in s] == []
    assert list(exported.argv[1:]) == (
        f"-m {model.path} -fit off -dev CUDA0 -ngl all -c 8192 -np 2 -b 1024 -ub 256 -ctk q8_0 -ctv q4_0 -fa on "
        "-t 6 -tb 8 -lm dio -nkvo --no-repack --no-op-offload --swa-full"
    ).split(" ")


@pytest.mark.parametrize("devices", [(), ("CUDA0",)])
@pytest.mark.parametrize("layers", [-1, 0, 3])
@pytest.mark.parametrize("mode", ["auto", "mmap", "none", "mlock", "mmap+mlock", "direct"])
def test_load_modes(devices: tuple[str, ...], layers: int, mode: str) -> None:
    """What a plan says is kept; "auto" reads the file where layers are offloaded and maps it elsewhere."""
    plan = Plan("m.gguf", Placement(devices, layers), Settings(load_mode=mode))
    expected = {((), -1): "mmap", ((), 0): "mmap", ((), 3): "mmap", (("CUDA0",), 0): "mmap"}
    assert placement.load_mode(plan) == (expected.get((devices, layers), "none") if mode == "auto" else mode)


def test_remote_devices_without_their_server(models: dict[str, ModelInfo]) -> None:
    place = Placement(("RPC2",), -1, overrides=(Override("ffn_up", "RPC2"),))
    with pytest.raises(PlanError, match="RPC2 but names 2 RPC servers"):
        export.export(quick(models["smollm2"], place, rpc=RPC), models["smollm2"], "llama-server")


def test_koboldcpp_devices(models: dict[str, ModelInfo]) -> None:
    model = models["smollm2"]

    def made(*devices: str, split: tuple[float, ...] = ()) -> tuple[dict[str, object], str]:
        place = Placement(devices, -1, split, (Override("ffn_up", devices[-1]),))
        exported = export.export(quick(model, place), model, "koboldcpp")
        return json.loads(exported.files["tensortier.kcpps"]), " ".join(exported.lost)

    config, lost = made("CUDA1")
    assert config["usecuda"] == ["1"] and str(config["overridetensors"]).endswith("=CUDA0")
    config, lost = made("CUDA0", "CUDA2", split=(1.0, 3.0))
    assert config["tensor_split"] == [1.0, 0.0, 3.0] and str(config["overridetensors"]).endswith("=CUDA2")
    config, lost = made("CUDA5")
    assert config["tensor_split"] == [0.0] * 5 + [1.0]
    config, lost = made("Vulkan2", "Vulkan0", split=(1.0, 3.0))
    assert config["usevulkan"] == [0, 2] and config["tensor_split"] == [3.0, 1.0]
    assert "not in the plan's order" in lost and str(config["overridetensors"]).endswith("=Vulkan0")
    config, lost = made("CUDA0", "RPC0")
    assert "overridetensors" not in config and "no option for RPC0" in lost and "RPC0 stay" in lost
    with pytest.raises(PlanError, match="CUDA and Vulkan"):
        made("CUDA0", "Vulkan0")


def test_ollama_takes_whole_layers_that_fit(models: dict[str, ModelInfo]) -> None:
    """The layers it is given take no more of the GPU than the plan, and one more would."""
    model = models["qwq-32b-q3_k_m"]
    place = Placement(("CUDA0",), -1, overrides=(Override("ffn_(up|gate)", "CPU"),))
    plan = quick(model, place, n_ctx=8192, n_seq_max=2)
    exported = export.export(plan, model, "ollama")
    lines = dict(line.split()[-2:] for line in exported.files["Modelfile"].splitlines())
    room = sum(t.nbytes for t in model.tensors if t.layer is not None or t.role in (Role.OUTPUT, Role.NORM))
    room -= sum(t.nbytes for t in model.tensors if re.search("ffn_(up|gate)", t.name))

    def taken(n: int) -> int:
        where = placement.resolve(model, Placement(("CUDA0",), n), {})
        return placement.bytes_per_device(model, where)["CUDA0"]

    layers = int(lines["num_gpu"])
    assert taken(layers) <= room < taken(layers + 1)
    assert lines["num_ctx"] == "4096" and "OLLAMA_NUM_PARALLEL=2\n" in exported.files["ollama.env"]
    assert "128 tensors" in exported.lost[0] and f"{layers} layers" in exported.lost[0]


def test_lm_studio_experts(models: dict[str, ModelInfo]) -> None:
    model = models["gpt-oss-120b-mxfp4"]
    first = "|".join(map(str, range(12)))

    def made(pattern: str) -> tuple[dict[str, object], str]:
        place = Placement(("CUDA0",), -1, overrides=(Override(pattern, "CPU"),))
        exported = export.export(quick(model, place), model, "lm-studio")
        return json.loads(exported.files["lm-studio.json"]), " ".join(exported.lost)

    config, lost = made(rf"^blk\.({first})\.ffn_.*_exps")
    assert config["gpu"] == {"ratio": "max", "numCpuExpertLayersRatio": pytest.approx(12 / 36, abs=1e-6)}
    assert "first layers" not in lost
    config, lost = made(r"^blk\.(3\d|2[4-9])\.ffn_.*_exps")
    assert config["gpu"] == {"ratio": "max", "numCpuExpertLayersRatio": pytest.approx(12 / 36, abs=1e-6)}
    assert "12 layers in place of" in lost
    config, lost = made(r"attn_q|exps")
    assert set(config["gpu"]) == {"ratio"} and "whole layers only" in lost  # type: ignore[call-overload]


# ---------------------------------------------------------------------------------------- golden files


def golden_plans(models: Mapping[str, ModelInfo]) -> dict[str, tuple[Plan, ModelInfo]]:
    """One dense model with odd layers' tensors in RAM; one mixture on two cards, its last experts in RAM."""
    qwq = dataclasses.replace(models["qwq-32b-q3_k_m"], files=("QwQ-32B-Q3_K_M.gguf",))
    odd = "|".join(str(i) for i in range(1, 40, 2))
    dense = Plan(
        qwq.path,
        Placement(("CUDA0",), -1, overrides=(Override(rf"blk\.({odd})\.ffn_up\.weight", "CPU"),)),
        Settings(
            n_ctx=40960,
            n_ubatch=1024,
            type_k="q8_0",
            type_v="q8_0",
            flash_attention="on",
            threads=8,
            threads_batch=16,
        ),
    )
    oss = dataclasses.replace(models["gpt-oss-120b-mxfp4"], files=("models/gpt oss 120b.gguf",))
    last = "|".join(str(i) for i in range(10, 36))
    mixture = Plan(
        oss.path,
        Placement(
            ("CUDA0", "CUDA1"),
            -1,
            (3.0, 2.0),
            (Override(rf"^blk\.({last})\.ffn_(up|down|gate)_exps", "CPU"), Override("^output", "CUDA0")),
        ),
        Settings(
            n_ctx=0,
            n_batch=4096,
            n_ubatch=2048,
            n_seq_max=2,
            load_mode="mmap",
            repack=False,
            op_offload=False,
        ),
    )
    return {"qwq-32b": (dense, qwq), "gpt-oss-120b": (mixture, oss)}


@pytest.mark.parametrize("name", ["qwq-32b", "gpt-oss-120b"])
@pytest.mark.parametrize("target", list(export.TARGETS))
def test_golden(name: str, target: str, models: dict[str, ModelInfo]) -> None:
    """UPDATE_GOLDEN=1 writes them anew; then review the difference."""
    plan, model = golden_plans(models)[name]
    text = export.render(export.export(plan, model, target))
    path = GOLDEN / f"{name}.{target}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_no_golden_file_is_left_over() -> None:
    expected = {f"{n}.{t}.txt" for n in ("qwq-32b", "gpt-oss-120b") for t in export.TARGETS}
    assert {p.name for p in GOLDEN.iterdir()} == expected


@pytest.mark.parametrize("target", sorted(export.TARGETS))
@pytest.mark.parametrize("cards", [(), ("RTX 4060 8GB",)])
def test_weights_on_the_drive_go_to_ram_and_that_is_said(
    target: str, cards: tuple[str, ...], models: Mapping[str, ModelInfo]
) -> None:
    """No other engine has the device TIER. gpt-oss-120b with 16 GiB of RAM has most of its experts there."""
    model = models["gpt-oss-120b-mxfp4"]
    here = catalogue.hypothetical(cards, 16 << 30, cpu_bandwidth=60)
    made = planner.plan(
        model, here, Settings(), rates=rates.from_catalogue(here), answers=memory.Formulas(model, {})
    )
    drive = sum(
        t.nbytes for t in model.tensors if placement.resolve(model, made.placement, {})[t.name] == "TIER"
    )
    assert drive > 30 << 30
    text = export.render(export.export(made, model, target))
    assert "TIER" not in text
    assert f"reads {drive / 2**30:.2f} GiB of weights from the drive" in text
    if target == "llama-server":
        argv = export.export(made, model, target).argv
        assert options(argv, ("--no-repack", "--no-op-offload"))["-lm"] == "mmap"
        assert "--no-repack" in argv, "reordered weights are copies that cannot be paged"
        assert ("-ot" in argv) == bool(cards), "without a card everything is in RAM anyway"
