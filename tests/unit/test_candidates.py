"""Candidates keep every budget, and each is the most of its kind: one more layer, expert or tensor does not fit."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tensortier import candidates, gguf, memory, placement
from tensortier.candidates import Question
from tensortier.types import ModelInfo, Placement, Plan, Settings

GIB = 1 << 30


def question(model: ModelInfo, *gib: float, settings: Settings | None = None) -> Question:
    free = {f"CUDA{i}": int(g * GIB) for i, g in enumerate(gib)}
    room = {d: size - GIB // 2 for d, size in free.items()}
    plan = Plan(model.path, settings=settings or Settings(n_ctx=8192, flash_attention="on"))
    return Question(plan, model, free, room, memory.Formulas(model, free))


@pytest.fixture(scope="module")
def model(skeleton: Callable[[str], Path]) -> Callable[[str], ModelInfo]:
    return lambda name: gguf.read(skeleton(name))


@pytest.mark.parametrize("name", ["gemma-2-27b-q4_k_m", "mixtral-8x7b-q4_k_m", "deepseek-v3-q4_k_m"])
def test_no_candidate_takes_more_than_there_is(name: str, model: Callable[[str], ModelInfo]) -> None:
    rng = random.Random(name)
    found = set()
    for devices in (1, 1, 2, 2, 3):
        asked = question(model(name), *(rng.uniform(2, 30) for _ in range(devices)))
        for kind, place in candidates.proposals(asked):
            found.add(kind.split(" on ")[0])
            taken = {r.device: r.total_bytes for r in asked.rows(place)}
            for device, room in asked.room.items():
                assert taken.get(device, 0) <= room, (kind, place)
    assert found >= {"CPU only", "whole layers", "llama.cpp --fit", "attention first"}


def test_one_more_layer_does_not_fit(model: Callable[[str], ModelInfo]) -> None:
    for gib in (3, 8, 14):
        asked = question(model("gemma-2-27b-q4_k_m"), gib)
        place = candidates.whole_layers(asked)
        assert place is not None and 0 < place.n_gpu_layers < 47
        assert place.overrides == ()
        assert not asked.fits(dataclasses.replace(place, n_gpu_layers=place.n_gpu_layers + 1))


def test_experts_of_as_few_layers_as_possible_are_on_the_cpu(model: Callable[[str], ModelInfo]) -> None:
    """What ``--n-cpu-moe N`` does, with the smallest N that fits."""
    mixture = model("qwen3-30b-a3b-q4_k_m")
    asked = question(mixture, 8)
    place = candidates.experts_on_cpu(asked)
    assert place is not None and place.n_gpu_layers == -1
    where = placement.resolve(mixture, place, asked.free)
    spilled = {t.layer for t in mixture.tensors if t.role.is_routed_expert and where[t.name] == "CPU"}
    n = len(spilled)
    assert spilled == set(range(n)) and 0 < n < 48
    from tests.unit.test_placement import machine

    def like_llama_cpp(n: int) -> Placement:
        return placement.from_flags(mixture, machine(8), n_cpu_moe=n)[0]

    assert placement.resolve(mixture, like_llama_cpp(n), asked.free) == where
    assert asked.fits(like_llama_cpp(n)) and not asked.fits(like_llama_cpp(n - 1))
    assert candidates.experts_on_cpu(question(mixture, 1)) is None
    assert candidates.experts_on_cpu(question(model("gemma-2-27b-q4_k_m"), 8)) is None


def test_attention_comes_first(model: Callable[[str], ModelInfo]) -> None:
    for name, gib in (("gemma-2-27b-q4_k_m", 10), ("mixtral-8x7b-q4_k_m", 8)):
        asked = question(model(name), gib)
        place = candidates.attention_first(asked)
        assert place is not None and place.n_gpu_layers == -1
        where = placement.resolve(asked.model, place, asked.free)
        spilled = [t for t in asked.model.tensors if t.layer is not None and where[t.name] == "CPU"]
        assert spilled and all(t.role.is_dense_ffn or t.role.is_routed_expert for t in spilled)
        kv = {r.device: r.kv_bytes for r in asked.rows(place)}
        assert kv.get("CPU", 0) == 0
        # and no more of them than needed: the smallest of them would not fit beside the rest
        smallest = min(t.nbytes for t in spilled)
        taken = {r.device: r.total_bytes for r in asked.rows(place)}
        assert taken["CUDA0"] + max(t.nbytes for t in spilled) > asked.room["CUDA0"]
        assert smallest > 0


def test_not_even_all_attention_fits(model: Callable[[str], ModelInfo]) -> None:
    asked = question(model("llama-3.3-70b-q4_k_m"), 6)
    place = candidates.attention_first(asked)
    assert place is not None and 0 < place.n_gpu_layers < 81
    assert not asked.fits(dataclasses.replace(place, n_gpu_layers=place.n_gpu_layers + 1))


def test_everything_on_one_device_of_two(model: Callable[[str], ModelInfo]) -> None:
    asked = question(model("gemma-3-12b-q4_k_m"), 24, 4)
    names = [name for name, _ in candidates.proposals(asked)]
    assert "everything on CUDA0" in names and "everything on CUDA1" not in names


def test_shares_are_written_down(model: Callable[[str], ModelInfo]) -> None:
    asked = question(model("gemma-3-12b-q4_k_m"), 24, 8)
    place = candidates.everything(asked, asked.devices)
    assert place is not None and place.tensor_split == tuple(map(float, asked.room.values()))
