"""The time model against sums worked out by hand on a small model and round speeds."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tensortier import cost
from tensortier.rates import AttentionSpeed, DeviceRates, Rates, ReadSpeed, Speed
from tensortier.types import ModelInfo, Override, Placement, Plan, Role, Settings, Tensor, Workload

GB = 1e9
FREE: Mapping[str, int] = {"CUDA0": 1 << 30}
# 1000 tokens behind 0 in one micro-batch of 1024; decode at 1000 + 8 live tokens
WORK = Workload("", prompt=1000, output=16, depth=0)
SETTINGS = Settings(n_ctx=2048, n_ubatch=1024, threads=4)


def device(name: str, kind: str, speed: float, **more: object) -> DeviceRates:
    attention = tuple(AttentionSpeed("F16", 64, 1024, many, Speed(1e11)) for many in (False, True))
    return DeviceRates(
        name, kind, "measured", narrow={"F16": ReadSpeed(speed)}, wide={"F16": Speed(1e12)},
        wide_experts={"F16": Speed(5e11)}, other_narrow=ReadSpeed(speed), other_wide=Speed(1e12),
        attention=attention, memory=Speed(speed), layer_seconds=1e-4, moe_layer_seconds=2e-4,
        token_seconds=1e-3, **more,  # type: ignore[arg-type]
    )  # fmt: skip


RATES = Rates(
    {
        "CPU": device("CPU", "cpu", 50 * GB, threads=4),
        "CUDA0": device(
            "CUDA0",
            "gpu",
            500 * GB,
            link=Speed(20 * GB),
            split_seconds=1e-4,
            moe_split_seconds=3e-4,
            offloads=True,
        ),
    }
)


def model(layers: int = 2, experts: int = 0, used: int = 0) -> ModelInfo:
    """Width 1024, 16 heads of 64 over 4, feed-forward 4096, F16, vocabulary 1000."""
    tensors = [tensor("token_embd.weight", Role.EMBEDDING, None, 1024, 1000)]
    for i in range(layers):
        tensors.append(tensor(f"blk.{i}.attn_q.weight", Role.ATTENTION, i, 1024, 1024))
        for part, k, n in (("up", 1024, 4096), ("gate", 1024, 4096), ("down", 4096, 1024)):
            role = Role(f"{'expert' if experts else 'ffn'}_{part}")
            shape = (k, n, experts) if experts else (k, n)
            name = f"blk.{i}.ffn_{part}{'_exps' if experts else ''}.weight"
            tensors.append(tensor(name, role, i, *shape))
    tensors.append(tensor("output.weight", Role.OUTPUT, None, 1024, 1000))
    return ModelInfo(
        files=("m",), file_sizes=(0,), architecture="llama", name="m", quantization="F16", tensors=tuple(tensors),
        n_layers=layers, n_embd=1024, n_vocab=1000, context_length=4096, n_head=(16,) * layers,
        n_head_kv=(4,) * layers, head_dim_k=64, head_dim_v=64, n_ff=(4096,) * layers, n_expert=experts,
        n_expert_used=used,
    )  # fmt: skip


def tensor(name: str, role: Role, layer: int | None, *shape: int) -> Tensor:
    size = 2
    for n in shape:
        size *= n
    return Tensor(name, role, layer, shape, "F16", size, 0, 0)


def decode(plan: Plan, of: ModelInfo) -> Mapping[str, float]:
    return cost.estimate(of, plan, RATES, WORK, FREE).decode_seconds


ATTN, FFN, OUT = 2 * 1024 * 1024, 3 * 2 * 1024 * 4096, 2 * 1024 * 1000  # bytes


def test_decode_on_the_cpu() -> None:
    found = decode(Plan("m", settings=SETTINGS), model())
    assert found["weights on CPU"] == pytest.approx((2 * (ATTN + FFN) + OUT) / (50 * GB))
    # 1008 live tokens, 1024 cells for four threads: 256 each, of which the last has 240
    assert found["attention on CPU"] == pytest.approx(2 * 16 * 128 * 1024 / 1e11)
    assert found["operations on CPU"] == pytest.approx(2 * 1e-4)
    assert found["fixed"] == pytest.approx(1e-3)
    assert "splits" not in found


def test_a_feed_forward_tensor_on_the_cpu_costs_two_crossings() -> None:
    place = Placement(("CUDA0",), -1, overrides=(Override(r"blk\.0\.ffn_up", "CPU"),))
    found = decode(Plan("m", place, SETTINGS), model())
    assert found["weights on CPU"] == pytest.approx(FFN / 3 / (50 * GB))
    assert found["weights on CUDA0"] == pytest.approx((2 * ATTN + FFN * 5 / 3 + OUT) / (500 * GB))
    # into the first layer, and out and back for the tensor: half a split each, and a hidden state over the link
    assert found["splits"] == pytest.approx(3 * (0.5e-4 + 4096 / (20 * GB)))


def test_all_three_cost_no_more_crossings_than_one() -> None:
    one = decode(
        Plan("m", Placement(("CUDA0",), -1, overrides=(Override("0.ffn_up", "CPU"),)), SETTINGS), model()
    )
    all_three = decode(
        Plan("m", Placement(("CUDA0",), -1, overrides=(Override("0.ffn_", "CPU"),)), SETTINGS), model()
    )
    apart = decode(
        Plan("m", Placement(("CUDA0",), -1, overrides=(Override("0.ffn_(up|down)", "CPU"),)), SETTINGS),
        model(),
    )
    assert all_three["splits"] == pytest.approx(one["splits"])
    assert apart["splits"] == pytest.approx(one["splits"] * 5 / 3)


def test_a_token_reads_only_the_experts_it_uses() -> None:
    found = decode(Plan("m", settings=SETTINGS), model(experts=8, used=2))
    assert found["weights on CPU"] == pytest.approx((2 * (ATTN + FFN * 2) + OUT) / (50 * GB))
    assert found["operations on CPU"] == pytest.approx(2 * 3e-4)


def test_prefill_is_arithmetic_on_the_cpu() -> None:
    found = cost.estimate(model(), Plan("m", settings=SETTINGS), RATES, WORK, FREE).prefill_seconds
    macs = 2 * (ATTN + FFN) / 2 * 1000
    assert found["weights on CPU"] == pytest.approx(macs / 1e12 + OUT / (50 * GB))


def test_prefill_of_weights_in_ram_goes_over_the_link_once_per_micro_batch() -> None:
    place = Placement(("CUDA0",), -1, overrides=(Override("ffn_", "CPU"),))
    plan = Plan("m", place, Settings(n_ctx=2048, n_ubatch=512, threads=4))
    found = cost.estimate(model(), plan, RATES, WORK, FREE).prefill_seconds
    assert found["link"] == pytest.approx(2 * 2 * FFN / (20 * GB))
    assert "weights on CPU" not in found
    off = Plan("m", place, Settings(n_ctx=2048, n_ubatch=512, threads=4, op_offload=False))
    found = cost.estimate(model(), off, RATES, WORK, FREE).prefill_seconds
    assert "link" not in found
    assert found["weights on CPU"] > 0


def test_kv_in_ram_is_attention_on_the_cpu() -> None:
    place = Placement(("CUDA0",), -1, kv_on_device=False)
    found = decode(Plan("m", place, SETTINGS), model())
    assert "attention on CUDA0" not in found
    assert found["attention on CPU"] > 0


def test_time_grows_with_depth_but_not_beyond_a_window() -> None:
    import dataclasses

    plain = model()
    windowed = dataclasses.replace(plain, sliding_window=512, swa_layers=(True, True))

    def at(depth: int, of: ModelInfo) -> float:
        work = Workload("", 8, 8, depth)
        plan = Plan("m", settings=Settings(n_ctx=16384, threads=1))
        return cost.estimate(of, plan, RATES, work, FREE).decode_seconds["attention on CPU"]

    assert at(8000, plain) == pytest.approx(2 * at(3994, plain), rel=0.01)
    assert at(8000, windowed) == at(3994, windowed)


def test_intervals_hold_the_speed_and_an_estimate_says_where_its_figures_are_from() -> None:
    found = cost.estimate(model(), Plan("m", settings=SETTINGS), RATES, WORK, FREE)
    low, high = found.decode_interval
    assert low < found.decode_tokens_per_second < high
    assert found.provenance == {"CPU": "measured"}
    each = sum(found.decode_seconds.values())
    assert found.decode_tokens_per_second == pytest.approx(1 / each)
    assert found.seconds == pytest.approx(sum(found.prefill_seconds.values()) + 16 * each)
