"""Plans survive JSON, and what is not a plan is told so by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensortier import planfile
from tensortier.errors import PlanError
from tensortier.types import DeviceMemory, Override, Placement, Plan, Settings

text = st.text(max_size=8)
size = st.integers(0, 2**60)
plans = st.builds(
    Plan,
    model=text,
    placement=st.builds(
        Placement,
        devices=st.tuples(text),
        n_gpu_layers=st.integers(-1, 999),
        tensor_split=st.lists(st.floats(0, 1e6), max_size=3).map(tuple),
        overrides=st.lists(st.builds(Override, text, text), max_size=3).map(tuple),
        kv_on_device=st.booleans(),
    ),
    settings=st.builds(Settings, n_ctx=st.integers(0, 10**7), type_k=text, repack=st.booleans()),
    memory=st.lists(st.builds(DeviceMemory, text, size, size, size), max_size=3).map(tuple),
    rpc=st.lists(text, max_size=2).map(tuple),
    reasons=st.lists(text, max_size=2).map(tuple),
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
    ],
)
def test_bad_plans_name_the_field(change: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        planfile.from_dict({**planfile.to_dict(Plan(model="m.gguf")), **change})


@pytest.mark.parametrize("data", [None, [], "plan", 3, {}, {"model": "x"}])
def test_what_is_no_plan(data: object) -> None:
    with pytest.raises(PlanError, match="not a tensortier plan"):
        planfile.from_dict(data)
