"""What ``plan`` refuses, in one line each, and what its options make of a machine. In this process: no model is
loaded."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tensortier import gguf
from tensortier.catalogue import hypothetical
from tensortier.cli import main
from tensortier.cli.deciding import make_plan
from tensortier.deciding import Planned, Undecided, Wish, plan_with_less, settle, within_budget
from tensortier.errors import OutOfMemory, UsageError
from tensortier.types import Settings, Workload

GIB = 1 << 30
CARD = ["--gpu", "RTX 4060 8GB", "--ram", "32GiB", "--cpu-bandwidth", "60"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tensortier: error: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--for", "llamaserver"], "did you mean llama-server?"),
        (["--for", "ollama", "--json"], "--json and --for"),
        (["--for", "ollama", "--explain"], "--explain is for a reader"),
        (["--json", "--explain"], "--json holds all of that"),
        (["--workload", "poem"], "chat, code, long-document, agent"),
        (["--workload", "1:2"], "PROMPT:OUTPUT:DEPTH"),
        (["--workload", "0:1:0"], "at least one token"),
        (["-c", "-1"], "greater than or equal to 0"),
        (["--ram", "lots"], "lots"),
        (["--ram", "-3GiB"], "must not be negative"),
        (["--vram", ","], "--vram needs a size"),
        (["--gpu", "RTX 4060 8GB"], "--ram 32GiB"),
        (["--gpu", "RTX 4060 8GB", "--ram", "0"], "needs main memory"),
        (["--gpu", "RTX 4060 8GB", "--ram", "32GiB"], "how fast is main memory"),
        (["--gpu", "RTX 4061", *CARD[2:]], "RTX 4060"),
        (["--gpu", "RTX 4060 12GB", *CARD[2:]], "not sold with 12 GB"),
        (["--gpu", "none", "--gpu", "RTX 4090", *CARD[2:]], "give it alone"),
        (["--gpu", "none", *CARD[2:], "--link", "PCIe 4.0 x8"], "needs a card"),
        ([*CARD, "--memory", "DDR5-6000 x2"], "given twice"),
        ([*CARD, "--rpc", "127.0.0.1:1"], "--rpc cannot be asked"),
        ([*CARD, "--no-calibrate"], "leave --no-calibrate out"),
        ([*CARD, "--drive", "tape"], "tape"),
        ([*CARD, "--link", "PCIe 9.0 x8"], "PCIe"),
        ([*CARD, "--cores", "0"], "--cores"),
        (["--cpu-bandwidth", "60"], "give its --gpu too"),
        (["--memory", "DDR5-6000 x2"], "give its --gpu too"),
        (["--drive", "HDD", "--cores", "4"], "--drive and --cores describe another machine"),
        (["--link", "PCIe 4.0 x8"], "--link describes another machine"),
        ([*CARD, "--vram", "9GiB"], "more than CUDA0 has (8.0 GiB)"),
        ([*CARD, "--vram", "4GiB,4GiB"], "2 sizes for one GPU"),
        (["--gpu", "none", *CARD[2:], "--vram", "4GiB"], "no GPU"),
        ([*CARD, "-c", "2048", "--workload", "agent"], "needs 17658 tokens of context, and --context gives it 2048"),
        ([*CARD, "--workload", "agent"], "this model was trained for 8192"),
        (["--levels", "--explain"], "goes without --explain"),
        (["--levels", "--for", "ollama"], "goes without --for"),
        (["--levels", "-ngl", "3"], "leave the options of manual placement out"),
        (["--trace", "there-is-none", "-ngl", "3"], "leave the options of manual placement out"),
        (["--trace", "there-is-none"], "cannot read the trace there-is-none"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert told in refusal(capsys, "smollm2", *arguments)


def test_a_remote_model_is_not_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(["run", "hf://owner/repo/model.gguf", "-p", "x"]) == 2
    assert "download it first" in capsys.readouterr().err


# --- what is printed


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["plan", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_a_model_that_fits_nowhere(
    capsys: pytest.CaptureFixture[str], skeleton: Callable[[str], Path]
) -> None:
    """Weights can be paged from the drive, but not 40 GiB of KV cache: llama.cpp allocates it whole."""
    path = skeleton("llama-3.3-70b-q4_k_m")
    machine = ["--gpu", "RTX 3060 12GB", "--ram", "16GiB", "--memory", "DDR4-3200 x2"]
    assert main(["plan", str(path), *machine, "-c", "131072", "-ctk", "f16"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "does not fit in memory" in captured.err and "--context" in captured.err


def test_the_ladder_and_what_would_help(
    capsys: pytest.CaptureFixture[str], skeleton: Callable[[str], Path]
) -> None:
    out = printed(capsys, skeleton("qwen3-30b-a3b-q4_k_m"), *CARD, "--cores", "8", "--explain")
    for heading in ("Where the time goes", "What was compared", "What would help", "Assumed:"):
        assert heading in out
    ladder = out[out.index("What was compared") : out.index("What would help")]
    for name in ("llama.cpp --fit", "whole layers", "experts on the CPU", "CPU only", "everything on CUDA0"):
        assert name in ladder
    assert ladder.count("chosen") == 1
    assert "1 GiB more on CUDA0" in out and "10 % faster RAM" in out
    short = printed(capsys, skeleton("qwen3-30b-a3b-q4_k_m"), *CARD, "--cores", "8")
    assert "What was compared" not in short and "decode is bound by" in short


def test_a_machine_without_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(
        capsys, "smollm2", "--gpu", "none", *CARD[2:], "--cores", "4", "--drive", "NVMe PCIe 4.0 x4"
    )
    assert "no GPU here" in out and "from the catalogue's published figures" in out and "threads 4" in out


def test_a_slower_link_makes_prompts_slower(
    capsys: pytest.CaptureFixture[str], skeleton: Callable[[str], Path]
) -> None:
    """Weights that are in RAM go over the link while a prompt is computed: four lanes take longer than eight."""
    path = skeleton("gemma-2-27b-q4_k_m")
    speeds = []
    for link in ("PCIe 4.0 x8", "PCIe 3.0 x4"):
        assert main(["plan", str(path), *CARD, "--cores", "8", "--link", link, "--json"]) == 0
        estimate = json.loads(capsys.readouterr().out)["estimate"]
        speeds.append(estimate["prefill_tokens_per_second"])
    assert speeds[0] > 1.2 * speeds[1]


def test_levels(capsys: pytest.CaptureFixture[str], skeleton: Callable[[str], Path]) -> None:
    """Both sides against what the placement rules and the formulas say of them by themselves."""
    path = skeleton("qwen3-30b-a3b-q4_k_m")
    model = gguf.read(path)
    assert main(["plan", str(path), *CARD, "--cores", "8", "--levels", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == str(path) and found["workload"]["name"] == "chat"
    levels = found["levels"]
    assert [level["share"] for level in levels] == [n / 10 for n in range(11)]
    assert (levels[0]["layers"], levels[-1]["layers"]) == (0, model.n_layers + 1)
    sizes = [
        {row["device"]: row["weights_bytes"] for row in level["by_layers"]["memory"]}.get("CUDA0", 0)
        for level in levels
    ]
    assert sizes == sorted(sizes)
    embedding = next(t.nbytes for t in model.tensors if t.name == "token_embd.weight")
    assert sizes[-1] == model.nbytes - embedding  # llama.cpp keeps the input layer in RAM
    for level, size in zip(levels, sizes, strict=True):
        assert size <= level["share"] * (model.nbytes - embedding)
        layers, tensors = (level[side]["estimate"] for side in ("by_layers", "by_tensors"))
        assert tensors["seconds"] <= layers["seconds"]
    # the cliff: the last tenth brings more than any before it
    decode = [level["by_layers"]["estimate"]["decode_tokens_per_second"] for level in levels]
    steps = [b - a for a, b in itertools.pairwise(decode)]
    assert max(steps) == steps[-1]
    table = printed(capsys, path, *CARD, "--cores", "8", "--levels")
    rows = [line for line in table.splitlines() if re.match(r"│ \d+%", line)]
    assert len(rows) == 11
    assert f" {decode[-1]:.1f} " in rows[-1]


def test_levels_without_a_gpu_are_of_ram(
    capsys: pytest.CaptureFixture[str], skeleton: Callable[[str], Path]
) -> None:
    path = skeleton("qwen3-30b-a3b-q4_k_m")
    here = ("--gpu", "none", *CARD[2:], "--cores", "8", "--drive", "NVMe PCIe 4.0 x4", "--levels")
    assert main(["plan", str(path), *here, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["levels"]
    assert len(found) == 11 and found[-1]["tier"] is None and found[5]["tier"]["expert_bytes"] > 6 * GIB
    table = printed(capsys, path, *here)
    rows = [line for line in table.splitlines() if re.match(r"│ \d+%", line)]
    assert len(rows) == 11
    for row, level in zip(rows, found, strict=True):
        assert f" {level['ram'] / GIB:.1f} GiB " in row and (" yes " in row) == level["fits"]


# --- budgets


def test_budgets_only_lower_what_is_there() -> None:
    machine = hypothetical(["RTX 3090", "RTX 4060 8GB"], 64 * GIB, cpu_bandwidth=60)
    free = {d.name: d.memory_free for d in machine.devices}
    both = within_budget(machine, [10 * GIB], 16 * GIB)
    found = {d.name: d.memory_free for d in both.devices}
    assert (found["CUDA0"], found["CUDA1"]) == (10 * GIB, free["CUDA1"])
    assert both.ram_available == 16 * GIB
    each = within_budget(machine, [20 * GIB, 4 * GIB], None)
    assert [d.memory_free for d in each.devices[1:]] == [20 * GIB, 4 * GIB]
    assert each.ram_available == machine.ram_available
    assert within_budget(machine, [], None) == machine


def test_the_whole_card_is_a_budget_as_its_box_says() -> None:
    """8 GiB of an 8 GB card, of which the driver keeps some."""
    machine = hypothetical(["RTX 4060 8GB"], 64 * GIB, cpu_bandwidth=60)
    assert within_budget(machine, [8 * GIB], None) == machine


@pytest.mark.parametrize(
    ("vram", "ram"), [([25 * GIB], None), ([20 * GIB, 9 * GIB], None), ([], 65 * GIB), ([], 0)]
)
def test_budgets_that_contradict_the_machine(vram: list[int], ram: int | None) -> None:
    machine = hypothetical(["RTX 3090", "RTX 4060 8GB"], 64 * GIB, cpu_bandwidth=60)
    with pytest.raises(UsageError):
        within_budget(machine, vram, ram)


def test_a_device_that_does_not_tell_its_memory_takes_any_budget() -> None:
    machine = hypothetical(["RTX 3090"], 64 * GIB, cpu_bandwidth=60)
    silent = dataclasses.replace(machine.devices[1], memory_total=0, memory_free=0, details={})
    machine = dataclasses.replace(machine, devices=(machine.devices[0], silent))
    assert within_budget(machine, [8 * GIB], None).devices[1].memory_free == 0


# --- workload and context


def test_an_assumed_workload_is_shortened_a_given_one_is_not(
    skeleton: Callable[[str], Path], tiny_path: Path
) -> None:
    model = gguf.read(skeleton("gemma-2-27b-q4_k_m"))  # trained for 8192
    given = Undecided(context=False)
    assert settle(Wish("x"), model) == Workload()
    short = settle(Wish("x", Settings(n_ctx=1024), given), model)
    assert short == Workload("chat", 256, 300, 1024 - 556)
    # llama.cpp rounds a context up to 256 tokens, and all of them can be used
    assert settle(Wish("x", Settings(n_ctx=1025), given), model).context == 1280
    agent = Workload("agent", 1024, 250, 16384)
    with pytest.raises(UsageError, match=r"trained for 8192.*--context 17664"):
        settle(Wish("x", workload=agent), model)
    with pytest.raises(UsageError, match="--context gives it 8192"):
        settle(Wish("x", Settings(n_ctx=0), given, workload=agent), model)
    assert settle(Wish("x", Settings(n_ctx=17664), given, workload=agent), model) == agent
    tiny = dataclasses.replace(gguf.read(tiny_path), context_length=0)  # the file does not say
    assert settle(Wish("x", workload=agent), tiny) == agent


# --- planning again with less


def test_what_the_message_names_gets_less(skeleton: Callable[[str], Path]) -> None:
    machine = hypothetical(["RTX 3090", "RTX 4060 8GB"], 64 * GIB, cpu_bandwidth=60)
    planned = make_plan(Wish(str(skeleton("qwq-32b-q3_k_m")), elsewhere=machine))

    def taken(found: Planned) -> dict[str, int]:
        return {row.device: row.total_bytes for row in found.plan.memory}

    before = taken(planned)
    assert before["CUDA0"] > 0
    after = taken(plan_with_less(planned, OutOfMemory("failed to allocate CUDA0 buffer of size 1")))
    assert after["CUDA0"] <= before["CUDA0"] * 0.95
    either = taken(plan_with_less(planned, OutOfMemory("it says nothing")))
    assert either["CUDA0"] <= before["CUDA0"] * 0.95
    for message in ("failed to allocate CPU_REPACK buffer of size 1", "failed to allocate CUDA_Host buffer"):
        with pytest.raises(OutOfMemory, match="failed to allocate"):
            plan_with_less(planned, OutOfMemory(message))


def test_what_no_gpu_holds_cannot_be_taken_from_one(skeleton: Callable[[str], Path]) -> None:
    machine = hypothetical([], 64 * GIB, cpu_bandwidth=60)
    planned = make_plan(Wish(str(skeleton("qwq-32b-q3_k_m")), elsewhere=machine))
    with pytest.raises(OutOfMemory):
        plan_with_less(planned, OutOfMemory("it says nothing"))


def test_a_narrow_terminal_still_names_the_devices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, skeleton: Callable[[str], Path]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    told = printed(capsys, skeleton("qwen3-30b-a3b-q4_k_m"), *CARD)
    assert "│CPU " in told and "│CUDA0 " in told
    assert "6.2 GiB" in told
