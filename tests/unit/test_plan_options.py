"""What ``plan`` refuses, in one line each, and what its options make of a machine. In this process: no model is
loaded."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tensortier import gguf
from tensortier.catalogue import hypothetical
from tensortier.cli import main
from tensortier.cli.deciding import Wish, settle, within_budget
from tensortier.cli.placing import Undecided
from tensortier.errors import UsageError
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
        ([*CARD, "--drive", "tape"], "tape"),
        ([*CARD, "--link", "PCIe 9.0 x8"], "PCIe"),
        ([*CARD, "--cores", "0"], "--cores"),
        (["--cpu-bandwidth", "60"], "give its --gpu too"),
        (["--memory", "DDR5-6000 x2"], "give its --gpu too"),
        (["--drive", "HDD", "--cores", "4"], "--drive and --cores describe another machine"),
        (["--link", "PCIe 4.0 x8"], "--link describes another machine"),
        ([*CARD, "--vram", "9GiB"], "more than CUDA0 has (8.0 GiB)"),
        ([*CARD, "--vram", "4GiB,4GiB"], "2 sizes for 1 GPUs"),
        (["--gpu", "none", *CARD[2:], "--vram", "4GiB"], "no GPU"),
        ([*CARD, "-c", "2048", "--workload", "agent"], "needs 17658 tokens of context, and --context gives it 2048"),
        ([*CARD, "--workload", "agent"], "this model was trained for 8192"),
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
