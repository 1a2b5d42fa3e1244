"""Weights on the drive change nothing: logits are those of stock llama.cpp to the last bit, at every budget."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from tensortier import gguf, routing, tier
from tests import tier_runs as runs
from tests.models import llamacpp
from tests.models.ggufio import Spec
from tests.models.synthetic import Synthetic, build

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"experts": 8, "used": 2, "qtype": "Q4_0"},
    "qwen3moe": {"arch": "qwen3moe", "experts": 16, "used": 4, "qtype": "Q6_K"},
    "qwen2moe, shared experts": {"arch": "qwen2moe", "experts": 8, "used": 3, "shared": 512, "qtype": "Q4_K"},
    "experts begin anywhere in a sector": {
        "n_embd": 96,
        "heads": 3,
        "kv_heads": 1,
        "n_ff": 96,
        "experts": 16,
        "used": 2,
        "qtype": "Q4_0",
    },
    "gpt-oss, biases": {"arch": "gpt-oss", "experts": 8, "used": 2, "qtype": "Q8_0"},
    "qwen3next, gate and up merged": {
        "arch": "qwen3next",
        "layers": 4,
        "experts": 16,
        "used": 4,
        "merged": True,
        "shared": 512,
        "qtype": "Q8_0",
    },
}


@pytest.fixture(scope="module")
def expected_of_moe(moe_path: Path) -> runs.Floats:
    """Stock llama.cpp's logits of the real mixture."""
    with runs.stock(moe_path) as (model, ctx):
        return runs.generate(model, ctx)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_synthetic_mixtures(shape: str, synthetic: Callable[..., Path]) -> None:
    path = synthetic(**{"layers": 3, **SHAPES[shape]})
    with runs.stock(path) as (model, ctx):
        expected = runs.generate(model, ctx)
    least, everything = runs.expert_bytes(path)
    for budget in (least, (least + everything) // 3, everything):
        with runs.tiered(runs.tier_plan(path, expert_bytes=budget)) as (model, ctx, paged):
            assert np.array_equal(runs.generate(model, ctx), expected), f"{budget} bytes"
            stats = paged.stats()
        assert stats.memory_bytes - stats.resident_bytes <= budget  # biases of experts always stay
        assert stats.drive_bytes > 0
        assert all(layer.passes > 0 for layer in stats.layers)


def test_biases_of_experts_may_stay_elsewhere(synthetic: Callable[..., Path]) -> None:
    path = synthetic(**{"layers": 3, **SHAPES["gpt-oss, biases"]})
    with runs.stock(path) as (model, ctx):
        expected = runs.generate(model, ctx)
    plan = runs.tier_plan(path, r"_exps\.weight", expert_bytes=2 * runs.expert_bytes(path)[0])
    with runs.tiered(plan) as (model, ctx, paged):
        assert np.array_equal(runs.generate(model, ctx), expected)
        assert paged.stats().resident_bytes == 0


@pytest.mark.parametrize("pattern", [r"_exps\.weight", r"blk\.1\.ffn_(up|down)_exps\.weight"])
def test_scales_of_experts(pattern: str, synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """One factor per expert, as quantizers to NVFP4 write them: a product with the rows of the chosen ones follows each
    product of experts."""
    options = {"layers": 3, **SHAPES["llama"]}
    scales = [
        Spec(f"blk.{layer}.ffn_{part}_exps.scale", (8,), "F32")
        for layer in range(3)
        for part in ("gate", "up", "down")
    ]
    path = build(Synthetic(**options), tmp_path / "scaled.gguf", scales)
    with runs.stock(path) as (model, ctx):
        expected = runs.generate(model, ctx)
    with runs.stock(synthetic(**options)) as (model, ctx):
        assert not np.array_equal(runs.generate(model, ctx), expected)  # llama.cpp does use them
    least, everything = runs.expert_bytes(path)
    for budget in (least, everything // 2):
        with runs.tiered(runs.tier_plan(path, pattern, expert_bytes=budget)) as (model, ctx, _paged):
            assert np.array_equal(runs.generate(model, ctx), expected), f"{budget} bytes"


def test_real_mixture(moe_path: Path, expected_of_moe: runs.Floats) -> None:
    """Real weights and routing; the down projections do not begin at a sector, nor do their experts."""
    expected = expected_of_moe
    least, everything = runs.expert_bytes(moe_path)
    for budget in (least, everything // 4, everything // 2, everything):
        with runs.tiered(runs.tier_plan(moe_path, expert_bytes=budget)) as (model, ctx, paged):
            assert np.array_equal(runs.generate(model, ctx), expected), f"{budget} bytes"
            assert paged.stats().memory_bytes <= budget


@pytest.mark.parametrize("guesses", [1, 4])
def test_real_mixture_with_guesses(guesses: int, moe_path: Path, expected_of_moe: runs.Floats) -> None:
    """Reading ahead changes nothing; the routers were fitted so that most of a guess is right (bench.moe_quality)."""
    _, everything = runs.expert_bytes(moe_path)
    plan = runs.tier_plan(moe_path, expert_bytes=everything // 2, guesses=guesses)
    with runs.tiered(plan) as (model, ctx, paged):
        assert np.array_equal(runs.generate(model, ctx), expected_of_moe)
        stats = paged.stats()
    assert stats.guessing
    assert stats.guess_recall > 0.75  # 0.25 at random
    assert stats.guess_precision > (0.5 if guesses <= 2 else 0.25)  # of four named, two are used
    assert sum(layer.guess_reads for layer in stats.layers) > 12  # one per step at least


def test_dense_model(smollm2_path: Path) -> None:
    with runs.stock(smollm2_path) as (model, ctx):
        expected = runs.generate(model, ctx)
    for budget in (600 << 10, 3 << 20, 30 << 20, 100 << 20):
        plan = runs.tier_plan(smollm2_path, runs.DENSE, dense_bytes=budget)
        with runs.tiered(plan) as (model, ctx, paged):
            assert np.array_equal(runs.generate(model, ctx), expected), f"{budget} bytes"
            stats = paged.stats()
        assert stats.memory_bytes <= budget
        assert stats.dense_uses == 30 * 7 * (3 + 12)  # three micro-batches and the steps


def test_everything_that_can_stay_on_the_drive(synthetic: Callable[..., Path]) -> None:
    """Experts, shared experts, attention and the output at once, each with room of its own."""
    path = synthetic(arch="qwen2moe", layers=3, experts=8, used=3, shared=512, qtype="Q4_K")
    pattern = r"_exps\.weight|ffn_(up|gate|down)_shexp|attn_(q|k|v|output)\.weight|^output\.weight"
    with runs.stock(path) as (model, ctx):
        expected = runs.generate(model, ctx)
    least, _ = runs.expert_bytes(path)
    output = next(t.nbytes for t in gguf.read(path).tensors if t.name == "output.weight")
    plan = runs.tier_plan(path, pattern, expert_bytes=2 * least, dense_bytes=output + 8192)
    with runs.tiered(plan) as (model, ctx, _paged):
        assert np.array_equal(runs.generate(model, ctx), expected)


def test_an_expert_is_read_once_per_micro_batch(moe_path: Path) -> None:
    """However few slots there are, and although its parts are asked for one after the other."""
    least, everything = runs.expert_bytes(moe_path)
    tensors = [t for t in gguf.read(moe_path).tensors if t.role.is_routed_expert and t.layer == 0]
    one = sum(t.nbytes // t.shape[2] for t in tensors)
    for budget in (least, everything // 3):
        with runs.tiered(runs.tier_plan(moe_path, expert_bytes=budget)) as (model, ctx, paged):
            runs.logits(model, ctx, runs.PROMPT)
            stats = paged.stats()
        for layer in stats.layers:
            assert layer.passes == 3
            assert layer.uses > 8  # more than there are slots
            assert layer.bytes_read == (layer.uses - layer.hits) * one


@pytest.mark.parametrize("threads", [2, 3])
def test_more_threads(threads: int, synthetic: Callable[..., Path]) -> None:
    path = synthetic(**{"layers": 3, **SHAPES["qwen3moe"]})
    least, _ = runs.expert_bytes(path)
    context = {"n_threads": threads, "n_threads_batch": threads}
    with runs.stock(path, **context) as (model, ctx):
        expected = runs.generate(model, ctx)
    with runs.tiered(runs.tier_plan(path, expert_bytes=2 * least), **context) as (model, ctx, _paged):
        assert np.array_equal(runs.generate(model, ctx), expected)


@pytest.fixture(scope="module")
def profile(moe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routing trace of the real mixture."""
    folder = tmp_path_factory.mktemp("profile")
    least, _ = runs.expert_bytes(moe_path)
    info = gguf.read(moe_path)
    with runs.tiered(runs.tier_plan(moe_path, expert_bytes=least)) as (model, ctx, paged):
        paged.trace(folder / "records")
        runs.generate(model, ctx, steps=2)
        paged.trace(None)
    layers = tuple(range(info.n_layers))
    routing.publish(folder / "records", folder / "t", info, layers, info.n_expert, info.n_expert_used)
    return folder / "t"


@pytest.mark.parametrize("policy", ["global-lru", "lfu", "static", "second-touch"])
def test_every_policy(policy: str, moe_path: Path, expected_of_moe: runs.Floats, profile: Path) -> None:
    _, everything = runs.expert_bytes(moe_path)
    plan = runs.tier_plan(moe_path, expert_bytes=everything // 2, policy=policy, profile=str(profile))
    with runs.tiered(plan) as (model, ctx, _paged):
        assert np.array_equal(runs.generate(model, ctx), expected_of_moe)


@pytest.mark.parametrize("pattern", [r"blk\.1[0-9]\.ffn_.*_exps", r"blk\.[5-9]\.ffn_(up|down)_exps"])
def test_some_layers_and_parts_of_them(
    pattern: str, moe_path: Path, expected_of_moe: runs.Floats, profile: Path, tmp_path: Path
) -> None:
    """The rest is elsewhere, as on a GPU: a static choice goes by the frequencies of the layers that are on the drive,
    counted here."""
    model_info = gguf.read(moe_path)
    pages = re.compile(pattern)
    layers = sorted({t.layer for t in model_info.tensors if pages.search(t.name) and t.layer is not None})
    _, everything = runs.expert_bytes(moe_path)
    size = everything * len(layers) // model_info.n_layers // 2
    plan = runs.tier_plan(moe_path, pattern, expert_bytes=size, policy="static", profile=str(profile))
    with runs.tiered(plan) as (model, ctx, paged):
        paged.trace(tmp_path / "service")
        assert np.array_equal(runs.generate(model, ctx), expected_of_moe)
        paged.trace(None)
        stats = paged.stats()
    assert [row.layer for row in stats.layers] == layers
    counts = np.zeros((model_info.n_layers, model_info.n_expert))
    for group, ids in routing.read(profile).passes():
        np.add.at(counts[group], ids, 1)
    hits, uses = tier.replay(
        tier.read_trace(tmp_path / "service"), "static", [row.capacity for row in stats.layers],
        (len(layers), model_info.n_expert), counts[layers],
    )  # fmt: skip
    assert [row.hits for row in stats.layers] == hits.tolist()
    assert [row.uses for row in stats.layers] == uses.tolist()


@pytest.mark.parametrize("reader", ["threads", "auto"])
def test_readers_and_small_pieces(reader: str, moe_path: Path, expected_of_moe: runs.Floats) -> None:
    """One read at a time, in pieces of a few sectors."""
    least, _ = runs.expert_bytes(moe_path)
    expected = expected_of_moe[: len(runs.PROMPT) + 2]
    plan = runs.tier_plan(moe_path, expert_bytes=4 * least, reader=reader, queue_depth=1, read_bytes=100_000)
    with runs.tiered(plan) as (model, ctx, paged):
        assert np.array_equal(runs.generate(model, ctx, steps=2), expected)
        assert paged.stats().reader == "threads" or reader == "auto"


@pytest.mark.slow
def test_five_hundred_greedy_tokens(moe_path: Path) -> None:
    _, everything = runs.expert_bytes(moe_path)
    prompt = runs.PROMPT[:8]
    context = {"n_ctx": 512, "n_threads": 2, "n_threads_batch": 2}
    with runs.stock(moe_path, **context) as (model, ctx):
        expected = runs.generate(model, ctx, prompt, 500)
    with runs.tiered(runs.tier_plan(moe_path, expert_bytes=everything // 2), **context) as (
        model,
        ctx,
        _paged,
    ):
        assert np.array_equal(runs.generate(model, ctx, prompt, 500), expected)


def test_embeddings(moe_path: Path) -> None:
    least, _ = runs.expert_bytes(moe_path)
    width = gguf.read(moe_path).n_embd

    def embeddings(ctx: Any) -> Any:
        assert runs.decode(ctx, runs.PROMPT) == 0
        return np.ctypeslib.as_array(llama_cpp.llama_get_embeddings(ctx), (len(runs.PROMPT), width)).copy()

    with runs.stock(moe_path, embeddings=True) as (_, ctx):
        expected = embeddings(ctx)
    with runs.tiered(runs.tier_plan(moe_path, expert_bytes=least), embeddings=True) as (_, ctx, _paged):
        assert np.array_equal(embeddings(ctx), expected)


def test_two_contexts_and_two_models(
    moe_path: Path, smollm2_path: Path, expected_of_moe: runs.Floats
) -> None:
    """Contexts of one model take turns in its store, also in the middle of a conversation."""
    least, _ = runs.expert_bytes(moe_path)
    expected = expected_of_moe
    with runs.stock(smollm2_path) as (model, ctx):
        dense_expected = runs.generate(model, ctx, steps=2)
    plan = runs.tier_plan(moe_path, expert_bytes=3 * least)
    dense_plan = runs.tier_plan(smollm2_path, runs.DENSE, dense_bytes=3 << 20)
    with (
        runs.tiered_model(plan) as (model, _paged),
        llamacpp.context(model, **runs.CONTEXT) as first,
        llamacpp.context(model, **runs.CONTEXT) as second,
        runs.tiered(dense_plan) as (dense_model, dense_ctx, _dense),
    ):
        rows = [[runs.logits(model, first, runs.PROMPT)], [runs.logits(model, second, runs.PROMPT)]]
        assert np.array_equal(runs.generate(dense_model, dense_ctx, steps=2), dense_expected)
        for step in range(12):
            for ctx, seen in zip((first, second), rows, strict=True):
                token = int(seen[-1][-1].argmax())
                seen.append(runs.logits(model, ctx, [token], len(runs.PROMPT) + step))
        for seen in rows:
            assert np.array_equal(np.concatenate(seen), expected)


def test_two_threads_share_a_store(moe_path: Path, expected_of_moe: runs.Floats) -> None:
    least, _ = runs.expert_bytes(moe_path)
    expected = expected_of_moe[: len(runs.PROMPT) + 3]
    results: list[Any] = [None, None]
    with (
        runs.tiered_model(runs.tier_plan(moe_path, expert_bytes=2 * least)) as (model, _paged),
        llamacpp.context(model, **runs.CONTEXT) as first,
        llamacpp.context(model, **runs.CONTEXT) as second,
    ):

        def run(i: int, ctx: Any) -> None:
            results[i] = runs.generate(model, ctx, steps=3)

        threads = [threading.Thread(target=run, args=(i, ctx)) for i, ctx in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for result in results:
        assert np.array_equal(result, expected)
