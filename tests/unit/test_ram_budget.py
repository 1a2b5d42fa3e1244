"""A budget of main memory is kept or refused: plans for machines with a made-up amount of it, with llama.cpp's
bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from tensortier import deciding, hardware, measuring
from tensortier.cli import deciding as terminal
from tensortier.deciding import Manual, Measure, Undecided, Wish
from tensortier.errors import PlanError, UsageError
from tensortier.types import Hardware, Settings

MIB = 1 << 20

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Sets how much main memory this machine seems to have, that no speed of it is known, and that it has no GPU."""
    here = hardware.probe()
    cpu = tuple(d for d in here.devices if d.kind == "cpu")

    def has(limit: int, available: int | None = None) -> None:
        def probe(*_arguments: object, **_more: object) -> Hardware:
            found = dataclasses.replace(here, devices=cpu, warnings=())
            return dataclasses.replace(found, ram_limit=limit, ram_available=available or limit)

        monkeypatch.setattr(hardware, "probe", probe)

    monkeypatch.setattr(measuring, "kept", lambda *_: None)
    return has


def wish(path: Path, **fields: object) -> Wish:
    return dataclasses.replace(Wish(str(path), measure=Measure.IF_IT_DECIDES), **fields)  # type: ignore[arg-type]


def taken(planned: deciding.Planned) -> int:
    return sum(row.total_bytes for row in planned.plan.memory)


@pytest.mark.parametrize("mib", [230, 270, 310, 400, 700])
def test_a_first_run_fits_or_says_what_is_missing(mib: int, moe_path: Path, machine: Machine) -> None:
    """480 MB of weights on a machine that nobody measured: nothing is ever planned that memory cannot hold."""
    machine(mib * MIB)
    try:
        planned = terminal.make_plan(wish(moe_path))
    except UsageError as exc:
        assert mib < 300 and "main memory are missing" in str(exc)
        return
    plan = planned.plan
    assert plan.estimate is None, "nobody measured"
    assert not any("as long" in reason for reason in plan.reasons), plan.reasons
    if plan.tier is None:  # then what cannot be dropped by the kernel has to fit
        assert plan.settings.load_mode == "mmap" and mib < 300
        assert taken(planned) - moe_path.stat().st_size <= mib * MIB
    else:
        assert taken(planned) <= mib * MIB


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"manual": Manual(n_gpu_layers=0)}, "options of manual placement"),
        ({"manual": Manual(kv_on_device=False)}, "options of manual placement"),
        ({"settings": Settings(load_mode="mmap")}, "leave --load-mode out"),
        ({"settings": Settings(load_mode="none")}, "--load-mode auto"),
        ({"undecided": Undecided(ubatch=False), "ram": 350 * MIB}, "smaller micro-batch than 512"),
    ],
)
def test_a_budget_that_would_not_be_kept_is_refused(
    fields: dict[str, object], told: str, moe_path: Path, machine: Machine
) -> None:
    machine(8 << 30)
    with pytest.raises(UsageError, match=told) as caught:
        terminal.make_plan(wish(moe_path, **{"ram": 400 * MIB, **fields}))
    assert "\n" not in str(caught.value)


def test_the_least_that_is_told_is_true(moe_path: Path, machine: Machine) -> None:
    machine(8 << 30)
    fixed = wish(
        moe_path, settings=Settings(type_k="q8_0", type_v="q8_0"), undecided=Undecided(False, False, False)
    )
    with pytest.raises(UsageError, match=r"on the drive [\d.]+ MiB") as caught:
        terminal.make_plan(dataclasses.replace(fixed, ram=350 * MIB))
    least = float(str(caught.value).split("on the drive ")[1].split(" MiB")[0])
    planned = terminal.make_plan(dataclasses.replace(fixed, ram=int((least + 0.1) * MIB)))
    assert planned.plan.tier is not None and taken(planned) <= (least + 0.1) * MIB
    with pytest.raises(UsageError):
        terminal.make_plan(dataclasses.replace(fixed, ram=int((least - 0.2) * MIB)))


def test_the_same_without_a_budget_is_the_users_own_choice(moe_path: Path, machine: Machine) -> None:
    """As llama.cpp would: a mapped file may be larger than RAM."""
    machine(400 * MIB)
    planned = terminal.make_plan(wish(moe_path, manual=Manual(n_gpu_layers=0)))
    assert planned.plan.settings.load_mode == "mmap" and planned.plan.warnings


def test_a_plan_file_for_more_ram_than_there_is(moe_path: Path, machine: Machine) -> None:
    machine(8 << 30)
    made = terminal.make_plan(wish(moe_path, ram=400 * MIB))
    plan = dataclasses.replace(made.plan, machine_id="")
    assert deciding.given_plan(plan, str(moe_path)).warnings == plan.warnings
    machine(8 << 30, 300 * MIB)
    warned = deciding.given_plan(plan, str(moe_path)).warnings
    assert len(warned) == len(plan.warnings) + 1 and "300.0 MiB are free now" in warned[-1]
    machine(300 * MIB)
    with pytest.raises(PlanError, match=r"may use 300\.0 MiB"):
        deciding.given_plan(plan, str(moe_path))


def test_more_than_a_control_group_allows(moe_path: Path, machine: Machine) -> None:
    machine(400 * MIB)
    with pytest.raises(UsageError, match="the control group of this process has"):
        terminal.make_plan(wish(moe_path, ram=500 * MIB))
