"""Measuring ends in time on a slow or busy machine, and says what it did without: with a clock that the stand-ins for
the measurements move."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tensortier import calibrate, catalogue, measuring, rates
from tensortier import tier as tier_module
from tensortier.calibrate import drive, pace
from tensortier.cost import attention_speed
from tensortier.errors import LibraryError
from tensortier.types import Hardware, Settings

GIB = 1 << 30
LIMIT = calibrate.LIMIT_SECONDS


@dataclasses.dataclass
class Slow:
    """A machine on which each figure takes so many seconds, and its runs agree so well."""

    seconds: float = 0.0
    spread: float = 0.0
    now: float = 1000.0
    taken: int = 0

    def spend(self) -> None:
        self.now += self.seconds
        self.taken += 1

    def product(self, device: str, kind: str, **of: Any) -> calibrate.Product:
        self.spend()
        of.pop("operand_bytes")
        return calibrate.Product(
            device,
            kind,
            of["threads"],
            of["columns"],
            of["batch"],
            of["experts"],
            of["repack"],
            2e10,
            self.spread,
        )

    def attention(self, device: str, kind: str, **of: Any) -> calibrate.Attention:
        self.spend()
        return calibrate.Attention(
            device, kind, of["threads"], of["head_dim"], of["cells"], of["batch"], 1e10, self.spread
        )

    def layers(self, models: Any, device: str, *, threads: int, rpc: Any) -> calibrate.LayerCost:
        self.spend()
        return calibrate.LayerCost(device, threads, 1e-5, 1e-5, 1e-5, 0.1)

    def elementwise(self, device: str, *, threads: int) -> calibrate.Elementwise:
        self.spend()
        return calibrate.Elementwise(device, threads, 1e-10, 0.1)

    def copy(self, device: str, *, to_device: bool, pinned: bool) -> calibrate.Copy:
        self.spend()
        return calibrate.Copy(device, to_device, pinned, 1e10, 0.1)

    def split(self, models: Any, device: str, *, experts: bool, threads: int, rpc: Any) -> calibrate.Split:
        self.spend()
        return calibrate.Split(device, experts, 1e-5, 0.1)

    def drive(self, near: Any, *, over: Callable[[], bool]) -> list[calibrate.DriveRead]:
        return [calibrate.DriveRead("/", 1 << 20, 1, 1e9)]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    machine = Slow()

    @contextlib.contextmanager
    def models() -> Iterator[None]:
        yield None

    monkeypatch.setattr(pace, "clock", lambda: machine.now)
    monkeypatch.setattr(calibrate, "models", models)
    monkeypatch.setattr(calibrate, "_busy_cores", lambda: 0.0)
    for name in ("product", "attention", "layers", "elementwise", "copy", "split", "drive"):
        monkeypatch.setattr(calibrate, f"measure_{name}", getattr(machine, name))
    return machine


@pytest.fixture
def machine() -> Hardware:
    """With a GPU."""
    return catalogue.hypothetical(["RTX 4060"], 16 * GIB, memory="DDR5-5600 x2")


def test_a_machine_with_time_takes_all_figures(slow: Slow, machine: Hardware) -> None:
    slow.seconds, slow.spread = 0.01, 0.0
    told: list[float] = []
    found = calibrate.calibrate(machine, progress=lambda fraction, _: told.append(fraction))
    assert found.notes == () and told == sorted(told) and told[-1] == 1.0
    measured = {p.type for p in found.products if p.device == "CPU"}
    assert measured == set(calibrate.TYPES)
    all_of_them = slow.taken
    slow.taken, slow.spread = 0, 0.5  # runs that never agree are taken three times
    again = calibrate.calibrate(machine)
    assert again.notes == ()
    figures = len(again.products) + len(again.attention)
    assert slow.taken == all_of_them + 2 * figures


def test_a_busy_machine_takes_figures_once_and_says_so(slow: Slow, machine: Hardware) -> None:
    figures = figures_of_the_cpu(slow, machine)
    slow.seconds, slow.spread = LIMIT / figures * 0.7, 0.5  # three of each would be twice the limit
    started = slow.now
    found = calibrate.calibrate(cpu_only(machine))
    assert slow.now - started < LIMIT
    assert {p.type for p in found.products} == set(calibrate.TYPES), "nothing is left out for it"
    (note,) = found.notes
    assert "not taken again" in note and "CPU" in note
    assert figures < slow.taken < 3 * figures
    for product in found.products:
        assert product.spread == 0.5  # and is the width of what is predicted with it


def test_a_slow_machine_is_measured_for_the_limit_and_no_longer(slow: Slow, machine: Hardware) -> None:
    """Every device has its own time; what is left out is what a plan needs least."""
    figures = figures_of_the_cpu(slow, machine)
    slow.seconds = 3 * LIMIT / figures
    started = slow.now
    found = calibrate.calibrate(machine)
    assert slow.now - started <= 2 * (LIMIT + slow.seconds)
    assert [note.split(" was ended after 60 s with ")[0] for note in found.notes] == [
        f"measuring {name}" for name in ("CPU", machine.devices[1].name)
    ]
    assert all("the others are estimated" in note for note in found.notes)

    known = rates.from_calibration(found, machine, Settings())
    for device in machine.devices:
        of = known.of(device.name)
        assert set(calibrate.NEEDED_TYPES) <= set(of.narrow) & set(of.wide)
        assert of.layer_seconds > 0 and of.wide_layer_seconds > 0
        for many in (False, True):
            assert attention_speed(of, "q8_0", 128, 4096, many).value > 0
        missing = set(calibrate.TYPES) - set(of.narrow)
        assert missing and of.other_narrow.spread == 0.5, "these have wide intervals"
    card = known.of(machine.devices[1].name)
    assert card.link is not None and card.split_seconds > 0 and card.moe_split_seconds > 0
    assert known.notes == found.notes, "plans say it"


@pytest.mark.parametrize("times", [20, 1000])
def test_without_the_needed_figures_there_are_none(
    times: int, slow: Slow, machine: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = figures_of_the_cpu(slow, machine)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    slow.seconds = times * LIMIT / figures
    started = slow.now
    with pytest.raises(LibraryError, match=r"after 60 s only \d+ of the \d+ figures of CPU .* were measured"):
        calibrate.calibrate(machine)
    assert slow.now - started <= LIMIT + slow.seconds
    said: list[str] = []
    assert measuring.measured(machine, Settings(), (), said.append) is None
    (line,) = said
    assert "no speeds are predicted: after 60 s only" in line and "\n" not in line
    assert calibrate.load(machine) is None, "nothing of it is kept"


def cpu_only(machine: Hardware) -> Hardware:
    return dataclasses.replace(machine, devices=machine.devices[:1])


def figures_of_the_cpu(slow: Slow, machine: Hardware) -> int:
    calibrate.calibrate(cpu_only(machine))
    figures, slow.taken = slow.taken, 0
    return figures


# --- the drive


@pytest.mark.parametrize("reads", [1, 5, len(drive.BLOCKS) * len(drive.DEPTHS) + 3, 10_000])
def test_a_slow_drive(reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads until the time is up, and one at least."""
    made: list[tuple[int, int]] = []

    def read(file: Path, *, block: int, depth: int, seconds: float) -> float:
        made.append((block, depth))
        return 1e9

    monkeypatch.setattr(tier_module, "drive_bandwidth", read)
    monkeypatch.setattr(drive.os, "O_DIRECT", 0x4000, raising=False)
    monkeypatch.setattr(drive.os, "open", lambda *_: 99)
    monkeypatch.setattr(drive.os, "close", lambda _: None)
    path = tmp_path / "file"
    path.touch()
    found = drive._measured(path, 0.06, 3, lambda: len(made) >= reads)
    combinations = len(drive.BLOCKS) * len(drive.DEPTHS)
    assert len(made) == min(reads, 3 * combinations)
    assert len(found) == min(reads, combinations)
    assert {(r.block, r.depth) for r in found} == set(made)


def test_a_drive_that_takes_too_long_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="writing 16 MiB to read them again took too long"):
        calibrate.measure_drive(tmp_path, file_bytes=16 << 20, over=lambda: True)
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_with_the_drive_is_told(
    slow: Slow, machine: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_long(near: Any, *, over: Callable[[], bool]) -> list[calibrate.DriveRead]:
        slow.now += LIMIT
        assert over()
        raise TimeoutError("writing took too long")

    def few(near: Any, *, over: Callable[[], bool]) -> list[calibrate.DriveRead]:
        assert not over()
        slow.now += LIMIT
        return slow.drive(near, over=over)

    monkeypatch.setattr(calibrate, "measure_drive", too_long)
    assert calibrate.calibrate(machine).notes == ("the drive was not measured: writing took too long",)
    monkeypatch.setattr(calibrate, "measure_drive", few)
    found = calibrate.calibrate(machine)
    assert found.notes == ("measuring the drive was ended after 60 s: its figures are of few reads",)
    assert len(found.drives) == 1
