"""Traces and the simulator: Belady's optimum against a search through all possibilities, files that are none."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortier import gguf, routing, tier
from tensortier.cli import main
from tensortier.errors import UsageError
from tensortier.routing import Trace
from tensortier.simulate import BOUNDS, POLICIES, HitCurve, Simulator, evenly, same_room, token_cycle

Passes = list[tuple[int, list[int]]]  # layer, ids of the experts of one token or more


def records(passes: Passes, used: int = 1) -> np.ndarray:
    numbers = [n for group, ids in passes for n in (group, len(ids) // used, used, *ids)]
    return np.array(numbers, "<i4")


def trace_of(passes: Passes, layers: int, experts: int, used: int = 1) -> Trace:
    tokens = max(
        (sum(len(ids) // used for g, ids in passes if g == group) for group in range(layers)), default=0
    )
    return Trace(tuple(range(layers)), experts, used, tokens, (1, 2, 3, 4), records(passes, used))


def decoding(tokens: int, layers: int, experts: int, used: int, seed: int = 0) -> Trace:
    """One token after another through all layers; some experts are used more than others."""
    rng = np.random.default_rng(seed)
    weights = [1 / (1 + rng.permutation(experts)) for _ in range(layers)]
    passes = [
        (layer, rng.choice(experts, used, replace=False, p=w / w.sum()).tolist())
        for _ in range(tokens)
        for layer, w in enumerate(weights)
    ]
    return trace_of(passes, layers, experts, used)


# --- the optimum


def most_hits(passes: Passes, capacity: int) -> int:
    """By trying everything: after a pass any of what was there or was used may stay, as much as there is room."""
    best: dict[frozenset[tuple[int, int]], int] = {frozenset(): 0}
    for group, ids in passes:
        used = {(group, e) for e in ids}
        after: dict[frozenset[tuple[int, int]], int] = {}
        for there, hits in best.items():
            count = hits + len(used & there)
            everything = used | there
            for size in range(min(capacity, len(everything)) + 1):
                for kept in combinations(sorted(everything), size):
                    key = frozenset(kept)
                    after[key] = max(after.get(key, 0), count)
        best = after
    return max(best.values())


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 2), min_size=1, max_size=3)), max_size=10),
    st.integers(0, 3),
)
def test_the_optimum_is_what_trying_everything_finds(passes: Passes, room: int) -> None:
    simulator = Simulator(trace_of(passes, 2, 3))
    capacity = {"belady": (room,), "belady-per-layer": (room, 1)}
    shared, split = simulator.run(capacity, ("belady", "belady-per-layer"))
    assert sum(shared.hits) == most_hits(passes, room)
    alone = [[p for p in passes if p[0] == group] for group in (0, 1)]
    assert split.hits == (most_hits(alone[0], room), most_hits(alone[1], 1))
    distinct = [sum(len(set(ids)) for g, ids in passes if g == group) for group in (0, 1)]
    assert list(shared.uses) == list(split.uses) == distinct


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_no_policy_beats_the_optimum(seed: int, share: float) -> None:
    trace = decoding(120, 5, 10, 2, seed)
    capacity = same_room(evenly(trace, share))
    found = {o.policy: o for o in Simulator(trace).run(capacity, (*POLICIES, *BOUNDS))}
    for name in POLICIES:
        assert 0 < found[name].hit_rate <= found["belady"].hit_rate, name
        if name != "global-lru":
            below = zip(found[name].hits, found["belady-per-layer"].hits, strict=True)
            assert all(hits <= most for hits, most in below), name
        assert found[name].uses == found["belady"].uses == (240,) * 5
    assert found["belady-per-layer"].hit_rate <= found["belady"].hit_rate


def test_policies_are_replayed_and_not_mixed_up() -> None:
    trace = decoding(60, 3, 8, 2)
    counts = tier.frequencies(trace.records, 3, 8)
    for outcome in Simulator(trace).run(same_room((3, 3, 2)), POLICIES):
        assert outcome.capacity == ((8,) if outcome.policy == "global-lru" else (3, 3, 2))
        hits, uses = tier.replay(trace.records, outcome.policy, outcome.capacity, (3, 8), counts)
        assert (outcome.hits, outcome.uses) == (tuple(hits), tuple(uses))


def test_static_goes_by_another_trace() -> None:
    """Frequencies turned round keep what is used least."""
    trace = decoding(200, 3, 8, 2)
    counts = tier.frequencies(trace.records, 3, 8)
    (own,) = Simulator(trace).run(same_room((2, 2, 2)), ("static",))
    (turned,) = Simulator(trace, -counts).run(same_room((2, 2, 2)), ("static",))
    assert turned.hit_rate < own.hit_rate


def test_the_cliff_is_at_one_token() -> None:
    """A plain LRU over all layers, written here: nothing is found below the token's cycle."""
    trace = decoding(100, 6, 8, 2)
    assert token_cycle(trace) == 12

    def plain(room: int) -> int:
        cache: OrderedDict[int, None] = OrderedDict()
        hits = 0
        for group, ids in trace.passes():
            for expert in ids.tolist():
                key = group * 8 + expert
                hits += key in cache
                cache[key] = None
                cache.move_to_end(key)
                if len(cache) > room:
                    cache.popitem(last=False)
        return hits

    assert plain(10) == 0  # the other five layers' experts come between
    assert plain(12) > 100
    (guarded,) = Simulator(trace).run(same_room(evenly(trace, 10 / 48)), ("global-lru",))
    assert guarded.capacity == (10,)
    assert sum(guarded.hits) > 100


# --- hit rates for the planner


def lru_rate(tokens: list[list[list[int]]], capacity: list[int]) -> float:
    """Hits of the second half in caches of each layer's own, written down plainly. tokens[t][layer]: expert ids."""
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in capacity]
    hits = uses = 0
    for t, layers in enumerate(tokens):
        for cache, room, ids in zip(caches, capacity, layers, strict=True):
            if t >= len(tokens) - len(tokens) // 2:
                uses += len(ids)
                hits += sum(e in cache for e in ids)
            for e in ids:
                cache[e] = None
                cache.move_to_end(e)
            while len(cache) > room:
                cache.popitem(last=False)
    return hits / uses


def test_hit_rates_are_of_tokens_one_at_a_time() -> None:
    """The same routing recorded token by token, and with its first 40 tokens in micro-batches of 16: one rate, that of
    a cache written down here."""
    rng = np.random.default_rng(5)
    tokens = [[rng.choice(12, 2, replace=False).tolist() for _ in range(3)] for _ in range(100)]
    single = [(g, ids) for layers in tokens for g, ids in enumerate(layers)]
    wide: Passes = []
    for begin in range(0, 40, 16):
        batch = tokens[begin : min(begin + 16, 40)]
        wide += [(g, [e for layers in batch for e in layers[g]]) for g in range(3)]
    wide += [(g, ids) for layers in tokens[40:] for g, ids in enumerate(layers)]
    curves = [HitCurve(trace_of(passes, 3, 12, 2), "t") for passes in (single, wide)]
    for capacity in ([6, 6, 6], [3, 8, 5]):
        rates = [curve.rate("lru", capacity, (0, 1, 2)) for curve in curves]
        assert rates[0] == rates[1] == pytest.approx(lru_rate(tokens, capacity))
        others = [curve.rate(policy, capacity, (0, 1, 2)) for curve in curves for policy in ("lfu", "static")]
        assert others[:2] == others[2:]
    # of some layers, as where the others' experts are on a device
    some = [[layers[2]] for layers in tokens]
    assert curves[1].rate("lru", [5], (2,)) == pytest.approx(lru_rate(some, [5]))
    with pytest.raises(UsageError, match="no experts of layer 7"):
        curves[0].rate("lru", [5], (7,))


def test_static_does_not_know_the_half_it_is_judged_by() -> None:
    """Experts 0 and 1 in the first half, 2 and 3 in the second: what was frequent is of no use."""
    tokens = [[0, 1]] * 50 + [[2, 3]] * 50
    curve = HitCurve(trace_of([(0, ids) for ids in tokens], 1, 4, 2), "t")
    assert curve.rate("static", [2], (0,)) == 0
    assert curve.rate("lru", [2], (0,)) == pytest.approx(98 / 100)


def test_the_last_layer_may_have_fewer_tokens() -> None:
    """Of a prompt nobody asks for the results of but the last token."""
    tokens = [[[1, 2], [3, 0]], [[2, 3], [0, 1]], [[0, 1], [1, 2]]]
    passes = [(0, [e for t in tokens for e in t[0]]), (1, tokens[-1][1])]
    passes += [(g, ids) for t in tokens for g, ids in enumerate(t)]
    curve = HitCurve(trace_of(passes, 2, 4, 2), "t")
    expected = lru_rate([*[[t[0], []] for t in tokens[:-1]], tokens[-1], *tokens], [3, 3])
    assert curve.rate("lru", [3, 3], (0, 1)) == pytest.approx(expected)


def test_shares_are_of_all_experts() -> None:
    trace = decoding(1, 7, 10, 2)
    for share in (0.0, 0.1, 0.25, 0.33, 0.5, 0.75, 1.0):
        places = evenly(trace, share)
        assert sum(places) == round(share * 70)
        assert max(places) - min(places) <= 1
        assert list(places) == sorted(places, reverse=True)


# --- files


@pytest.fixture
def model(synthetic: Callable[..., Path]) -> Path:
    return synthetic(layers=3, experts=8, used=2, qtype="Q4_0")


@pytest.fixture
def recorded(model: Path, tmp_path: Path) -> Path:
    """A trace of three layers of eight experts."""
    written = tmp_path / "records"
    decoding(20, 3, 8, 2).records.tofile(written)
    path = tmp_path / "some.trace"
    routing.publish(written, path, gguf.read(model), (0, 1, 2), 8, 2)
    return path


def test_what_is_written_is_read(recorded: Path, model: Path, tmp_path: Path) -> None:
    expected = decoding(20, 3, 8, 2)
    trace = routing.read(recorded)
    assert np.array_equal(trace.records, expected.records)
    assert (trace.layers, trace.experts, trace.used, trace.tokens) == ((0, 1, 2), 8, 2, 20)
    assert [(g, i.tolist()) for g, i in trace.passes()] == [(g, i.tolist()) for g, i in expected.passes()]
    routing.check_model(trace, gguf.read(model))
    # who knows only records, as the static policy does, finds the same choices
    plain = tier.frequencies(tier.read_trace(recorded), 3, 8)
    assert np.array_equal(plain, tier.frequencies(expected.records, 3, 8))
    assert not list(tmp_path.glob("*.whole"))


def test_every_cut_is_noticed(recorded: Path, tmp_path: Path) -> None:
    data = recorded.read_bytes()
    cut = tmp_path / "cut.trace"
    for size in range(len(data)):
        cut.write_bytes(data[:size])
        with pytest.raises(UsageError, match=r"was cut off|is not a routing trace|is damaged") as raised:
            routing.read(cut)
        assert "\n" not in str(raised.value)
    cut.write_bytes(data + b"\0\0\0\0")
    with pytest.raises(UsageError, match="has something behind its end"):
        routing.read(cut)


@pytest.mark.parametrize(
    ("at", "value", "told"),
    [
        (4, 2, "a trace of version 2"),
        (7, 0, "has something behind its end"),
        (10, 7, "names an expert that the model does not have"),
        (10, 2**31 - 1, "header makes no sense"),  # else memory is made for so many
        (13, 0, "header makes no sense"),
        (13, 9, "header makes no sense"),
        (16, 21, "speaks of 21 tokens"),
        (-5, 3, "a record does not fit"),
        (-4, -1, "a record does not fit"),
        (-3, 3, "a record does not fit"),
        (-1, 8, "names an expert that the model does not have"),
        (-1, -1, "names an expert that the model does not have"),
    ],
)
def test_damage_is_noticed(at: int, value: int, told: str, recorded: Path) -> None:
    numbers = np.fromfile(recorded, "<i4")
    numbers[at] = value
    numbers.tofile(recorded)
    with pytest.raises(UsageError, match=told):
        routing.read(recorded)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=600), st.booleans())
def test_other_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, begins: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "other.trace"
    head = np.array([0, 0x31525454, 0, 0, 1, 0], "<i4").tobytes() if begins else b""
    path.write_bytes(head + data)
    with pytest.raises(UsageError):
        routing.read(path)


def test_a_run_that_routed_nothing_is_no_trace(model: Path, tmp_path: Path) -> None:
    (tmp_path / "records").touch()
    with pytest.raises(UsageError, match="no token was routed"):
        routing.publish(tmp_path / "records", tmp_path / "x.trace", gguf.read(model), (0, 1, 2), 8, 2)
    assert not (tmp_path / "x.trace").exists()


# --- the command


def test_the_table_and_the_json_tell_the_same(
    recorded: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(recorded), "--model", str(model)]) == 0
    shown = capsys.readouterr().out
    assert main(["simulate", str(recorded), "--model", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["token_cycle"] == 6
    assert "One token uses 6 experts over all layers (25%" in shown
    experts = sum(t.nbytes for t in gguf.read(model).tensors if t.role.is_routed_expert)
    assert [size["share"] for size in found["sizes"]] == [0.25, 0.5, 0.75]
    assert [size["places"] for size in found["sizes"]] == [6, 12, 18]
    assert [size["expert_bytes"] for size in found["sizes"]] == [experts // 4, experts // 2, experts * 3 // 4]
    rows = {line.split("│")[1].split()[0]: line for line in shown.splitlines() if line.startswith("│")}
    for name in (*POLICIES, *BOUNDS):
        rates = [size["policies"][name]["hit_rate"] for size in found["sizes"]]
        assert [cell.strip() for cell in rows[name].split("│")[2:5]] == [f"{rate:.1%}" for rate in rates]
        assert rates == sorted(rates)


def test_a_choice_of_policies(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(recorded), "--policy", "lfu,lru", "--profile", str(recorded), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["sizes"][0]["policies"]) == ["lfu", "lru", *BOUNDS]
    assert found["static_by_this_trace"] is False


def test_a_figure(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(recorded), "--plot", str(tmp_path / "hits.png")]) == 0
    assert (tmp_path / "hits.png").read_bytes().startswith(b"\x89PNG")
    assert main(["simulate", str(recorded), "--plot", str(tmp_path / "hits.svg"), "--policy", "lru"]) == 0
    assert "</svg>" in (tmp_path / "hits.svg").read_text()
    assert capsys.readouterr().err == ""


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command says instead of working."""
    assert main(["simulate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("tensortier: error: ")
    return captured.err


def test_what_is_refused(
    recorded: Path,
    model: Path,
    synthetic: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace = str(recorded)
    other = synthetic(layers=3, experts=16, used=4, arch="qwen3moe", qtype="Q6_K")
    assert "cannot read the trace" in refusal(capsys, str(tmp_path / "none"))
    assert "is not a routing trace" in refusal(capsys, str(model))
    assert "with another model than" in refusal(capsys, trace, "--model", str(other))
    assert "--ram needs --model" in refusal(capsys, trace, "--ram", "1GiB")
    assert "is not a size" in refusal(capsys, trace, "--model", str(model), "--ram", "much")
    assert "too little for this model" in refusal(capsys, trace, "--model", str(model), "--ram", "1MiB")
    assert "unknown policy 'fifo'" in refusal(capsys, trace, "--policy", "fifo")
    assert "is not a routing trace" in refusal(capsys, trace, "--profile", str(model))
    assert "ends with .png" in refusal(capsys, trace, "--plot", str(tmp_path / "model.gguf"))
    assert "there is no folder" in refusal(capsys, trace, "--plot", str(tmp_path / "none" / "x.png"))
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "matplotlib", None)
        assert "needs matplotlib" in refusal(capsys, trace, "--plot", str(tmp_path / "x.png"))
    assert not (tmp_path / "x.png").exists()
    fewer = routing.read(recorded)
    written = tmp_path / "records"
    fewer.records.tofile(written)
    routing.publish(written, tmp_path / "other.trace", gguf.read(other), (0, 1, 2), 16, 4)
    assert "was recorded with another model" in refusal(
        capsys, trace, "--profile", str(tmp_path / "other.trace")
    )
