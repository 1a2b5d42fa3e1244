"""The policies against plain Python ones written here, and what each of them is for."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensortier.errors import UsageError
from tensortier.tier import frequencies, read_trace, replay

Passes = list[tuple[int, list[int]]]  # group, ids of one token or more


def as_trace(passes: Passes, used: int = 0) -> NDArray[np.int32]:
    numbers: list[int] = []
    for group, ids in passes:
        per_token = used or len(ids)
        numbers += [group, len(ids) // per_token, per_token, *ids]
    return np.array(numbers, np.int32)


def lru_hits(passes: Passes, capacity: dict[int, int]) -> dict[int, int]:
    """Each group an LRU of its own. What a pass uses is not pushed out within it."""
    cached: dict[int, OrderedDict[int, None]] = {group: OrderedDict() for group in capacity}
    hits = dict.fromkeys(capacity, 0)
    for group, ids in passes:
        cache, distinct = cached[group], list(dict.fromkeys(ids))
        missing = [e for e in distinct if e not in cache]
        hits[group] += len(distinct) - len(missing)
        for e in missing:
            if len(cache) < capacity[group]:
                cache[e] = None
                continue
            leaving = next((old for old in cache if old not in distinct), None)
            if leaving is not None:
                del cache[leaving]
                cache[e] = None
        for e in distinct:  # in the order of use, whenever they came
            if e in cache:
                cache.move_to_end(e)
    return hits


passes_strategy = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 9), min_size=1, max_size=6)), max_size=60
)


@settings(max_examples=200, deadline=None)
@given(passes_strategy, st.lists(st.integers(0, 10), min_size=3, max_size=3))
def test_lru_is_an_lru(passes: Passes, capacity: list[int]) -> None:
    hits, uses = replay(as_trace(passes), "lru", capacity, (3, 10))
    assert hits.tolist() == list(lru_hits(passes, dict(enumerate(capacity))).values())
    assert uses.tolist() == [sum(len(set(ids)) for g, ids in passes if g == group) for group in range(3)]


@settings(max_examples=100, deadline=None)
@given(
    passes_strategy,
    st.integers(0, 10),
    st.sampled_from(["lru", "lfu", "second-touch", "global-lru", "static"]),
)
def test_no_policy_finds_more_than_there_is(passes: Passes, room: int, policy: str) -> None:
    """Hits are never more than uses less first uses; with room for all they are exactly that."""
    weights = np.ones((3, 10))
    capacity = [room] if policy == "global-lru" else [room] * 3
    hits, uses = replay(as_trace(passes), policy, capacity, (3, 10), weights)
    first = [len({e for g, ids in passes if g == group for e in ids}) for group in range(3)]
    assert (hits + np.array(first, np.uint64) <= uses).all()
    if room == 0:
        assert not hits.any()
    everything = [30] if policy == "global-lru" else [10] * 3
    hits, uses = replay(as_trace(passes), policy, everything, (3, 10), weights)
    assert (hits + np.array(first, np.uint64) == uses).all()


def test_belady_is_never_beaten() -> None:
    """The optimum for one group and single experts: who is used again last leaves, or does not come in."""
    rng = np.random.default_rng(3)
    sequence = rng.zipf(1.3, 600) % 12
    for capacity in (2, 4, 8):
        cached: set[int] = set()
        best = 0
        for at, expert in enumerate(sequence):
            best += int(expert) in cached
            cached.add(int(expert))
            if len(cached) > capacity:
                later = sequence[at + 1 :].tolist()
                cached.remove(max(cached, key=lambda e: later.index(e) if e in later else len(later) + 1))
        trace = as_trace([(0, [int(e)]) for e in sequence])
        counts = frequencies(trace, 1, 12)
        for policy in ("lru", "lfu", "static", "second-touch", "global-lru"):
            hits, _ = replay(trace, policy, [capacity], (1, 12), counts)
            assert 0 < hits[0] <= best, policy


def test_the_global_lru_does_not_fall_off_the_cliff() -> None:
    """Eight layers, the same two experts in each, room for twelve of the sixteen: a plain LRU never hits."""
    passes: Passes = [(layer, [0, 1]) for _ in range(50) for layer in range(8)]
    plain: OrderedDict[tuple[int, int], None] = OrderedDict()
    plain_hits = 0
    for layer, ids in passes:
        for e in ids:
            plain_hits += (layer, e) in plain
            plain[layer, e] = None
            plain.move_to_end((layer, e))
            if len(plain) > 12:
                plain.popitem(last=False)
    assert plain_hits == 0
    hits, uses = replay(as_trace(passes), "global-lru", [12], (8, 4))
    assert hits.sum() == 12 * 49
    assert uses.sum() == 16 * 50


def test_the_global_lru_gives_room_to_layers_that_need_it() -> None:
    """One layer goes round among six experts, the other always uses the same: only shared room serves both."""
    passes: Passes = [p for step in range(200) for p in ((0, [step % 6]), (1, [0]))]
    shared, _ = replay(as_trace(passes), "global-lru", [8], (2, 8))
    split, _ = replay(as_trace(passes), "lru", [4, 4], (2, 8))
    assert shared.tolist() == [194, 199]
    assert split.tolist() == [0, 199]


def test_the_global_lru_forgets_what_is_out_of_use() -> None:
    passes: Passes = [(0, [e]) for e in (0, 1, 2, 3)] * 5 + [(0, [e]) for e in (4, 5)] * 20
    hits, _ = replay(as_trace(passes), "global-lru", [4], (1, 8))
    assert hits[0] >= 4 * 4 + 2 * 17


def test_frequent_ones_stay_and_age() -> None:
    """An expert of every other pass is not pushed out by a row of strangers; one of long ago is, in the end."""
    mixed: Passes = [(0, [0 if step % 2 else 1 + (step // 2) % 7]) for step in range(100)]
    lfu, _ = replay(as_trace(mixed), "lfu", [1], (1, 8))
    lru, _ = replay(as_trace(mixed), "lru", [1], (1, 8))
    assert lfu[0] >= 47
    assert lru[0] == 0
    # 100 uses of expert 0, then 1 and 2 in turn for 3000 passes: halving lets them in
    old: Passes = [(0, [0])] * 100 + [(0, [1 + step % 2]) for step in range(3000)]
    hits, _ = replay(as_trace(old), "lfu", [2], (1, 8))
    assert hits[0] > 99 + 2000


def test_a_second_touch_is_asked_of_newcomers() -> None:
    """Experts used once, in a row longer than the cache, leave what is used now and then alone."""
    passes: Passes = []
    for step in range(40):
        passes += [(0, [0]), (0, [1]), (0, [2 + (2 * step) % 60]), (0, [3 + (2 * step) % 60])]
    trace = as_trace(passes)
    second, _ = replay(trace, "second-touch", [2], (1, 64))
    lru, _ = replay(trace, "lru", [2], (1, 64))
    assert second[0] == 78
    assert lru[0] == 0


def test_static_keeps_the_most_frequent() -> None:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 10, (300, 2))
    trace = as_trace([(0, [int(a), int(b)]) for a, b in ids])
    weights = np.arange(10.0)[None]
    hits, _ = replay(trace, "static", [3], (1, 10), weights)
    expected = sum(
        len({int(e) for e in row} & {7, 8, 9} & {int(e) for r in ids[:step] for e in r})
        for step, row in enumerate(ids)
    )
    assert hits[0] == expected


def test_frequencies_count_choices(tmp_path: Path) -> None:
    trace = as_trace([(0, [1, 2, 1, 3]), (1, [0, 0])], used=2)
    path = tmp_path / "t.trace"
    trace.tofile(path)
    assert np.array_equal(read_trace(path), trace)
    assert frequencies(trace, 2, 4).tolist() == [[0, 2, 1, 1], [2, 0, 0, 0]]


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ([0, 1], "middle of a record"),
        ([0, 1, 3, 1, 2], "does not fit the model"),
        ([5, 1, 1, 0], "does not fit the model"),
        ([0, 1, 1, 8], "names an expert that the model does not have"),
        ([0, -1, 1, 0], "does not fit the model"),
    ],
)
def test_traces_that_are_none(numbers: list[int], told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        replay(np.array(numbers, np.int32), "lru", [4, 4], (2, 8))


@pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="sanitizers end the process here")
def test_more_experts_than_there_is_memory_for() -> None:
    """Nor addresses, or a system that promises more memory than it has would begin."""
    with pytest.raises(UsageError, match="not enough memory to replay"):
        replay(as_trace([(0, [1])]), "lru", [0] * (1 << 20), (1 << 20, 2**31 - 1))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (-1, 8)])
def test_shapes_that_are_none(shape: tuple[int, int]) -> None:
    """The native side sees them as the caller gave them."""
    import ctypes

    from tensortier._llama.tierlib import PolicySetup, tier_library

    numbers, counts = (ctypes.c_int32 * 8)(), (ctypes.c_uint64 * 8)()
    error = ctypes.create_string_buffer(200)
    setup = PolicySetup(0, *shape, numbers, None)
    assert tier_library().tt_policy_replay(ctypes.byref(setup), numbers, 0, counts, counts, error, 200) == -1
    assert b"needs groups and experts" in error.value


def test_trace_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.trace"
    path.write_bytes(b"\x01\x00\x00\x00\x02")
    with pytest.raises(UsageError, match="is not a routing trace"):
        read_trace(path)
    with pytest.raises(UsageError, match="cannot read the trace"):
        read_trace(tmp_path / "none")
    with pytest.raises(UsageError, match="of another model"):
        frequencies(as_trace([(0, [9])]), 1, 8)


def test_policies_that_lack_something() -> None:
    trace = as_trace([(0, [1])])
    with pytest.raises(UsageError, match="unknown policy"):
        replay(trace, "fifo", [1], (1, 8))
    with pytest.raises(UsageError, match="takes 2 capacities"):
        replay(trace, "lru", [1], (2, 8))
    with pytest.raises(UsageError, match="needs a frequency"):
        replay(trace, "static", [1], (1, 8))
    with pytest.raises(UsageError, match="frequencies of shape"):
        replay(trace, "static", [1], (1, 8), np.ones((1, 7)))
