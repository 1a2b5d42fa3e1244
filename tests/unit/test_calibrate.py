"""Calibration: the arithmetic, the cache, and real measurements with bounds that physics sets."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tensortier import calibrate, gguf, hardware, measuring
from tensortier._llama import decode
from tensortier.calibrate import drive, layers
from tensortier.cli.deciding import warn
from tensortier.types import Hardware


@pytest.fixture(scope="module")
def machine() -> Hardware:
    return hardware.probe()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def example(machine: Hardware) -> calibrate.Calibration:
    return calibrate.Calibration(
        calibrate.fingerprint(machine),
        12.5,
        (calibrate.Product("CPU", "Q4_K", 2, 4096, 1, False, True, 3e10, 0.02),),
        (calibrate.Attention("CPU", "F16", 2, 128, 2048, 1, 2e10, 0.01),),
        (calibrate.LayerCost("CPU", 2, 3e-5, 1e-5, 5e-6, 0.1),),
        (calibrate.Elementwise("CPU", 2, 1e-10, 0.1),),
        (calibrate.Copy("CUDA0", True, True, 2.4e10, 0.01),),
        (calibrate.Split("CUDA0", False, 6e-5, 0.1),),
        (calibrate.DriveRead("/", 1 << 20, 4, 1.5e9),),
        ("a note",),
    )


def test_disturbed_runs_do_not_count() -> None:
    seconds, spread = calibrate.robust([1.00, 1.01, 1.02, 9.0, 50.0])
    assert seconds == 1.01
    assert spread == pytest.approx(0.01, rel=0.02)
    assert calibrate.robust([2.0]) == (2.0, 0.0)


def test_kept_and_found_again(machine: Hardware, cache: Path) -> None:
    assert calibrate.load(machine) is None
    calibrate.save(machine, example(machine))
    assert calibrate.load(machine) == example(machine)
    assert list(calibrate.path(machine).parent.iterdir()) == [calibrate.path(machine)]


@pytest.mark.parametrize("change", [{"cpu_model": "another"}, {"ram_total": 1}, {"devices": ()}])
def test_another_machine_does_not_use_it(machine: Hardware, cache: Path, change: dict[str, object]) -> None:
    calibrate.save(machine, example(machine))
    assert calibrate.load(dataclasses.replace(machine, **change)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"fingerprint": 1}', '{"products": [{"x": 1}]}'])
def test_a_damaged_file_is_measured_anew(machine: Hardware, cache: Path, text: str) -> None:
    calibrate.path(machine).parent.mkdir(parents=True, exist_ok=True)
    calibrate.path(machine).write_text(text)
    assert calibrate.load(machine) is None


def test_products_are_bounded_by_physics() -> None:
    """No CPU reads 2 TB/s from memory, and a busy one still does more than a MB/s. A larger batch reads the same
    weights more slowly, for it does more arithmetic per byte."""
    one = calibrate.measure_product("CPU", "Q8_0", threads=1, operand_bytes=32 << 20)
    many = calibrate.measure_product("CPU", "Q8_0", threads=1, columns=2048, batch=128)
    experts = calibrate.measure_product("CPU", "Q8_0", threads=1, columns=2048, batch=128, experts=True)
    assert one is not None and many is not None and experts is not None
    assert 1e6 < one.bytes_per_second < 2e12
    assert many.bytes_per_second < one.bytes_per_second
    assert 1e5 < experts.bytes_per_second < one.bytes_per_second


def test_a_kernel_that_does_not_exist() -> None:
    assert calibrate.measure_product("CPU", "F16", threads=1, repack=True, operand_bytes=32 << 20) is None


def test_attention() -> None:
    row = calibrate.measure_attention("CPU", "F16", threads=1, head_dim=64, cells=512)
    assert row is not None
    assert 1e6 < row.elements_per_second < 2e12


def test_layers_through_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of a tiny model takes between a microsecond and some milliseconds: by the clock of the thread that
    computes, which stands still while others have the processor."""
    monkeypatch.setattr(decode, "time", SimpleNamespace(perf_counter=time.thread_time))
    with layers.models() as small:
        row = layers.measure_layers(small, "CPU", threads=1)
    assert 1e-6 < row.layer_seconds < 0.01
    assert row.token_seconds < 0.01


def test_the_models_of_the_calibration_are_valid(tmp_path: Path) -> None:
    """By the reader, which agrees with gguf-py: depth, experts, and matrices that any cache holds."""
    layers.write_model(tmp_path / "m.gguf", 3, experts=True)
    model = gguf.read(tmp_path / "m.gguf")
    assert (model.n_layers, model.n_expert, model.n_expert_used) == (3, 8, 2)
    assert max(t.nbytes for t in model.tensors) < 2 << 20


def test_elementwise() -> None:
    assert 1e-12 < calibrate.measure_elementwise("CPU", threads=1).seconds < 1e-6


def test_copies() -> None:
    row = calibrate.measure_copy("CPU", to_device=True, pinned=False, nbytes=1 << 20)
    assert row is not None
    assert 1e6 < row.bytes_per_second < 1e13
    assert calibrate.measure_copy("CPU", to_device=True, pinned=True, nbytes=1 << 20) is None


def test_drive(tmp_path: Path) -> None:
    try:
        rows = calibrate.measure_drive(tmp_path, file_bytes=16 << 20, seconds=0.02)
    except OSError as exc:
        pytest.skip(f"this file system cannot read past its cache: {exc}")
    assert {(r.block, r.depth) for r in rows} == {(b, d) for b in drive.BLOCKS for d in drive.DEPTHS}
    assert all(1e5 < r.bytes_per_second < 1e12 for r in rows)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_read_itself_if_it_has_no_holes(tmp_path: Path, machine: Hardware) -> None:
    """The file a machine was asked about: written, sparse, and too small."""
    sizes = {"model": drive.FILE_BYTES, "holes": drive.FILE_BYTES, "small": 1 << 20}
    for name, size in sizes.items():
        with (tmp_path / name).open("wb") as file:
            if name == "holes":
                file.truncate(size)
            else:
                os.posix_fallocate(file.fileno(), 0, size)
        asked = dataclasses.replace(machine.drives[0], path=str(tmp_path / name))
        found = drive.large_file(dataclasses.replace(machine, drives=(asked,)))
        assert found == (tmp_path / name if name == "model" else None), name


def test_fingerprint_names_the_library(machine: Hardware) -> None:
    from importlib.metadata import version

    assert version("llama-cpp-python") in json.loads(calibrate.fingerprint(machine))


def test_a_measurement_that_cannot_be_kept_is_used_and_that_is_said(
    machine: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    measuring.keep(machine, example(machine), warn)
    told = capsys.readouterr().err
    assert "could not be kept" in told and "Not a directory" in told and told.count("\n") == 1


def test_nothing_half_written_is_left(
    machine: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        calibrate.save(machine, example(machine))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
