"""Plans survive JSON, and what is not a plan is told so by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensortier import planfile
from tensortier.errors import PlanError
from tensortier.types import (
    Candidate,
    DeviceMemory,
    Estimate,
    Override,
    Placement,
    Plan,
    Settings,
    Workload,
)

text = st.text(max_size=8)
size = st.integers(0, 2**60)
speed = st.floats(0, 1e9)
placements = st.builds(
    Placement,
    devices=st.tuples(text),
    n_gpu_layers=st.integers(-1, 999),
    tensor_split=st.lists(st.floats(0, 1e6), max_size=3).map(tuple),
    overrides=st.lists(st.builds(Override, text, text), max_size=3).map(tuple),
    kv_on_device=st.booleans(),
)
settings = st.builds(Settings, n_ctx=st.integers(0, 10**7), type_k=text, repack=st.booleans())
memories = st.lists(st.builds(DeviceMemory, text, size, size, size), max_size=3).map(tuple)
spent = st.dictionaries(text, speed, max_size=3)
estimates = st.builds(
    Estimate,
    prefill_tokens_per_second=speed,
    prefill_interval=st.tuples(speed, speed),
    decode_tokens_per_second=speed,
    decode_interval=st.tuples(speed, speed),
    seconds=speed,
    prefill_seconds=spent,
    decode_seconds=spent,
    provenance=st.dictionaries(text, text, max_size=2),
    notes=st.lists(text, max_size=2).map(tuple),
)
candidates = st.builds(
    Candidate, text, st.booleans(), placements, settings, memories, st.none() | estimates, text
)
plans = st.builds(
    Plan,
    model=text,
    placement=placements,
    settings=settings,
    memory=memories,
    rpc=st.lists(text, max_size=2).map(tuple),
    reasons=st.lists(text, max_size=2).map(tuple),
    model_id=text,
    machine_id=text,
    workload=st.none() | st.builds(Workload, text, size, size, size),
    estimate=st.none() | estimates,
    candidates=st.lists(candidates, max_size=2).map(tuple),
)


@given(plans)
def test_round_trip(plan: Plan) -> None:
    assert planfile.from_dict(json.loads(json.dumps(planfile.to_dict(plan)))) == plan


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tensortier_plan": 999}, "version 999"),
        ({"model": 7}, "plan.model: expected str, got 7"),
        ({"model": None}, "plan.model"),
        ({"placement": {"n_gpu_layers": "all"}}, "plan.placement.n_gpu_layers: expected int"),
        ({"placement": {"n_gpu_layers": True}}, "plan.placement.n_gpu_layers"),
        ({"placement": {"devices": "CUDA0"}}, "plan.placement.devices: expected a list"),
        ({"placement": {"overrides": [{"pattern": "x"}]}}, r"overrides\[0\]: the field 'device' is missing"),
        ({"placement": []}, "plan.placement: expected an object"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"tensortier_plan": True}, "version True"),
        ({"placement": {"tensor_split": [float("nan")]}}, r"tensor_split\[0\]: nan is not a number"),
        ({"placement": {"tensor_split": [10**400]}}, r"tensor_split\[0\]: 1000"),
        ({"estimate": 3}, "plan.estimate: expected an object"),
        ({"estimate": {}}, "plan.estimate: the field 'prefill_tokens_per_second' is missing"),
        ({"workload": {"prompt": 1.5}}, "plan.workload.prompt: expected int"),
        ({"candidates": [{}]}, r"plan.candidates\[0\]: the field 'name' is missing"),
    ],
)
def test_bad_plans_name_the_field(change: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        planfile.from_dict({**planfile.to_dict(Plan(model="m.gguf")), **change})


def test_an_interval_has_two_ends() -> None:
    estimate = Estimate(1.0, (1.0, 2.0), 1.0, (1.0, 2.0), 1.0, {}, {}, {})
    data = json.loads(json.dumps(planfile.to_dict(Plan("m.gguf", estimate=estimate))))
    assert planfile.from_dict(data).estimate == estimate
    data["estimate"]["decode_interval"].append(3.0)
    with pytest.raises(PlanError, match="decode_interval: expected 2 values, got 3"):
        planfile.from_dict(data)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not JSON"),
        ('{"tensortier_plan": 1, "mod', "not JSON"),
        ("[" * 100_000, "nested"),
        ("1" * 5000, "not JSON"),
        ('{"tensortier_plan": 2, "model": "x"}', "version 2"),
    ],
)
def test_text_that_is_no_plan(text: str, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        planfile.parse(text)


@pytest.mark.parametrize("data", [None, [], "plan", 3, {}, {"model": "x"}])
def test_what_is_no_plan(data: object) -> None:
    with pytest.raises(PlanError, match="not a tensortier plan"):
        planfile.from_dict(data)
