"""The rule by which a budget is shared out among experts: the store's own against the planning half's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tensortier import gguf, slots, tier
from tensortier.errors import LoadError, UsageError
from tensortier.types import Tier


@pytest.mark.parametrize("policy", tier.POLICIES)
@pytest.mark.parametrize("sector", [512, 4096])
def test_planning_shares_out_as_the_store_does(
    policy: str, sector: int, skeleton: Callable[[str], Path], moe_path: Path
) -> None:
    for path in (skeleton("qwen3-30b-a3b-q4_k_m"), skeleton("deepseek-v3-q4_k_m"), moe_path):
        model = gguf.read(path)
        experts = [t for t in model.tensors if t.role.is_routed_expert]
        layers = slots.layers_of(model, experts, sector)
        everything = sum(layer.slot_bytes * layer.experts for layer in layers)
        least = max(layer.slot_bytes for layer in layers) * model.n_expert_used
        budgets = [least, least + 1, 2 * least, everything - 1, everything]
        for budget in [*budgets, *(least + (everything - least) * i // 97 for i in range(1, 97, 5))]:
            settings = Tier(expert_bytes=budget, policy=policy)
            own = tier.capacities(model, experts, settings, sector)
            assert own == list(slots.capacities(layers, model.n_expert_used, policy, budget)), budget
        with pytest.raises(LoadError, match="the experts of one token"):
            tier.capacities(model, experts, Tier(expert_bytes=least - 1, policy=policy), sector)
        with pytest.raises(UsageError, match="too few"):
            slots.capacities(layers, model.n_expert_used, policy, least - 1)
