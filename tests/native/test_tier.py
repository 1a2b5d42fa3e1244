"""The store and the backend at work, small enough to run under the sanitizers (scripts/sanitize.py).

Computing is done by one thread: the sanitizers do not know the barriers of ggml's own thread pool.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from tensortier.tier import PagedWeights, replay
from tests import tier_runs as runs
from tests.models import llamacpp


@pytest.fixture(scope="module")
def expected(path: Path) -> runs.Floats:
    with runs.stock(path) as (model, ctx):
        return runs.generate(model, ctx, steps=4)


PATTERN = r"_exps\.weight|ffn_(up|gate|down)_shexp|attn_(q|k|v|output)\.weight"


@pytest.mark.parametrize("reader", ["auto", "threads"])
@pytest.mark.parametrize("policy", ["lru", "global-lru", "lfu", "second-touch"])
def test_it_computes_what_stock_llama_cpp_computes(
    reader: str, policy: str, path: Path, expected: runs.Floats, tmp_path: Path
) -> None:
    least, everything = runs.expert_bytes(path)
    for budget in (least, (least + everything) // 2, everything):
        plan = runs.tier_plan(
            path,
            PATTERN,
            expert_bytes=budget,
            dense_bytes=200 << 10,
            reader=reader,
            policy=policy,
            read_bytes=16 << 10,
            queue_depth=4,
        )
        with runs.tiered(plan) as (model, ctx, paged):
            paged.trace(tmp_path / "routing.trace")
            assert np.array_equal(runs.generate(model, ctx, steps=4), expected)
            paged.trace(None)
            stats = paged.stats()
            capacity = [layer.capacity for layer in stats.layers]
        # the same decisions when the routing is replayed
        trace = np.fromfile(tmp_path / "routing.trace", np.int32)
        hits, uses = replay(trace, policy, capacity[:1] if policy == "global-lru" else capacity, (2, 8))
        assert hits.tolist() == [layer.hits for layer in stats.layers]
        assert uses.tolist() == [layer.uses for layer in stats.layers]


@pytest.mark.parametrize("guesses", [1, 3, 8, -1])
@pytest.mark.parametrize("policy", ["lru", "lfu", "second-touch"])
def test_reading_ahead_changes_no_result(
    policy: str, guesses: int, path: Path, expected: runs.Floats
) -> None:
    least, everything = runs.expert_bytes(path)
    for budget in (least, (least + everything) // 2, everything * 3 // 4, everything):
        plan = runs.tier_plan(path, expert_bytes=budget, policy=policy, guesses=guesses, queue_depth=4)
        with runs.tiered(plan) as (model, ctx, paged):
            for _ in range(3):
                assert np.array_equal(runs.generate(model, ctx, steps=4), expected)
            first, second = paged.stats().layers
        assert first.guess_reads == first.guess_uses == 0  # nothing comes before it that could guess
        assert second.guess_uses == 2 * 4 * 3 or (
            guesses < 0 and second.guess_uses < 2 * 4 * 3
        )  # single tokens
        assert second.guess_named <= second.guess_uses
        assert second.guess_found <= second.guess_reads


def test_read_errors_ahead_are_no_errors(path: Path, expected: runs.Floats) -> None:
    """What cannot be read ahead is read again when it is needed, and fails only then."""
    _, everything = runs.expert_bytes(path)
    plan = runs.tier_plan(path, expert_bytes=everything // 2, guesses=4)
    with runs.tiered(plan) as (model, ctx, paged):
        assert np.array_equal(runs.generate(model, ctx, steps=4), expected)
        failed = 0
        for after in range(0, 60, 3):
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(ctx), 0, 84, -1)
            paged.inject_fault(-errno.EIO, after=after % 15, count=1)
            if runs.decode(ctx, [300 + after], 84) < 0:
                failed += 1
                assert "Input/output error" in paged.take_error()
            paged.inject_fault(0, count=0)
        assert np.array_equal(runs.generate(model, ctx, steps=4), expected)


@pytest.mark.parametrize("reader", ["auto", "threads"])
def test_it_goes_on_after_errors(reader: str, path: Path, expected: runs.Floats) -> None:
    least, _ = runs.expert_bytes(path)
    plan = runs.tier_plan(path, PATTERN, expert_bytes=2 * least, dense_bytes=200 << 10, reader=reader)
    with runs.tiered(plan) as (model, ctx, paged):
        for after in range(0, 60, 7):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
            paged.inject_fault(-errno.EIO, after=after, count=10_000)
            assert runs.decode(ctx, runs.PROMPT) < 0
            assert "Input/output error" in paged.take_error()
            assert paged.take_error() == ""
        paged.inject_fault(0, count=0)
        assert np.array_equal(runs.generate(model, ctx, steps=4), expected)


@pytest.mark.parametrize("why", [errno.EINTR, errno.EAGAIN, errno.ECANCELED])
@pytest.mark.parametrize("reader", ["auto", "threads"])
def test_what_only_has_to_be_asked_again(reader: str, why: int, path: Path, expected: runs.Floats) -> None:
    """Interrupted, no memory for the moment, or given up because the thread that asked has ended."""
    least, _ = runs.expert_bytes(path)
    plan = runs.tier_plan(path, PATTERN, expert_bytes=least, dense_bytes=200 << 10, reader=reader)
    with runs.tiered(plan) as (model, ctx, paged):
        paged.inject_fault(-why, after=3, count=40)
        assert np.array_equal(runs.generate(model, ctx, steps=4), expected)
        assert paged.take_error() == ""


@pytest.mark.parametrize("experts", [0, 1])
def test_given_up_in_the_middle(experts: int, path: Path, expected: runs.Floats) -> None:
    """At any operation, while reads are on their way that nobody needs then: the next request is not disturbed."""
    asked, limit = 0, 0

    @llama_cpp.ggml_abort_callback
    def stop(_: object) -> bool:
        nonlocal asked
        asked += 1
        return 0 < limit < asked

    least, everything = runs.expert_bytes(path)
    plan = runs.tier_plan(
        path,
        PATTERN if experts else r"ffn_(up|gate|down)_shexp|attn_(q|k|v|output)\.weight",
        expert_bytes=(least + everything) // 2 if experts else 0,
        dense_bytes=200 << 10,
        queue_depth=2,
        read_bytes=4096,
        guesses=experts,
    )
    with runs.tiered(plan, abort_callback=stop) as (model, ctx, paged):
        assert np.array_equal(runs.generate(model, ctx, steps=4), expected)
        asked = 0
        assert runs.decode(ctx, [300], 84) == 0
        of_a_token = asked
        for share in np.linspace(0, 1, 12, endpoint=False):
            while True:
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
                asked, limit = 0, 1 + int(share * of_a_token)
                status = runs.decode(ctx, [300])
                if status == 2:
                    break
                assert status == 0  # how often it is asked depends on what has to be waited for
                assert asked <= limit
                of_a_token = asked
            limit = 0
            assert np.array_equal(runs.generate(model, ctx, steps=1), expected[: len(runs.PROMPT) + 1])
        assert paged.take_error() == ""


def test_reads_of_a_thread_that_has_ended(path: Path, expected: runs.Floats) -> None:
    """What it asked for is still on its way when another goes on: the ring of dense weights, and guesses."""
    least, everything = runs.expert_bytes(path)
    plan = runs.tier_plan(
        path, PATTERN, expert_bytes=(least + everything) // 2, dense_bytes=200 << 10, guesses=4
    )
    with runs.tiered(plan) as (model, ctx, _paged):
        rows: list[runs.Floats] = []

        def step(tokens: list[int], position: int) -> None:
            rows.append(runs.logits(model, ctx, tokens, position))

        position, tokens = 0, list(runs.PROMPT)
        for _ in range(5):
            thread = threading.Thread(target=step, args=(tokens, position))
            thread.start()
            thread.join()
            position += len(tokens)
            tokens = [int(rows[-1][-1].argmax())]
        assert np.array_equal(np.concatenate(rows), expected)


def test_two_threads_with_a_context_each(path: Path, expected: runs.Floats) -> None:
    least, _ = runs.expert_bytes(path)
    results: list[object] = [None, None]
    plan = runs.tier_plan(path, PATTERN, expert_bytes=least, dense_bytes=200 << 10)
    with (
        runs.tiered_model(plan) as (model, paged),
        llamacpp.context(model, **runs.CONTEXT) as first,
        llamacpp.context(model, **runs.CONTEXT) as second,
    ):

        def run(i: int, ctx: object) -> None:
            results[i] = runs.generate(model, ctx, steps=4)

        threads = [threading.Thread(target=run, args=(i, ctx)) for i, ctx in enumerate((first, second))]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            paged.stats()  # may be asked for at any time
            threads[0].join(0.01)
        for thread in threads:
            thread.join()
    for result in results:
        assert np.array_equal(result, expected)


def test_closed_before_the_model_is(path: Path, expected: runs.Floats) -> None:
    """The buffers keep the store as long as they need it."""
    least, _ = runs.expert_bytes(path)
    with runs.tiered(runs.tier_plan(path, expert_bytes=least)) as (model, ctx, paged):
        paged.close()
        assert np.array_equal(runs.generate(model, ctx, steps=4), expected)


def test_statistics_while_it_is_closed(path: Path) -> None:
    """A server asks for them at any time; afterwards they are those of the end."""
    least, _ = runs.expert_bytes(path)
    for _ in range(20):
        paged = PagedWeights(runs.tier_plan(path, expert_bytes=least))
        begun, found = threading.Event(), []

        def ask(
            paged: PagedWeights = paged, begun: threading.Event = begun, found: list[int] = found
        ) -> None:
            for _ in range(300):
                found.append(paged.stats().memory_bytes)
                begun.set()

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        begun.wait(60)
        paged.close()
        for thread in threads:
            thread.join()
        assert len(found) == 900
        assert len(set(found)) == 1
        assert found[0] > 0


def test_opened_and_not_used(path: Path) -> None:
    least, _ = runs.expert_bytes(path)
    paged = PagedWeights(runs.tier_plan(path, expert_bytes=least))
    paged.close()
    paged.close()


def test_a_weight_can_be_looked_at(path: Path) -> None:
    """ggml_backend_tensor_get of a weight on the drive gives the bytes of the file."""
    import ctypes

    import gguf as oracle

    from tensortier._llama.libs import ggml_function

    least, _ = runs.expert_bytes(path)
    get = ggml_function(
        "ggml_backend_tensor_get",
        None,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    )

    class InitParams(ctypes.Structure):
        _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

    init = ggml_function("ggml_init", ctypes.c_void_p, InitParams)
    free = ggml_function("ggml_free", None, ctypes.c_void_p)
    view_1d = ggml_function(
        "ggml_view_1d", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    )
    tensors = {t.name: t.data for t in oracle.GGUFReader(path).tensors}
    seen: list[int] = []

    def observe(tensor: int, ask: bool, _: object) -> bool:
        if ask and not seen:
            # the first source of a node: ggml_tensor.src[0] behind type, buffer, shape, strides, op, op_params, flags
            name = ctypes.string_at(tensor + 256)
            if name.startswith(b"ffn_moe_up-0"):
                seen.append(ctypes.c_void_p.from_address(tensor + 152).value or 0)
        return not ask

    import llama_cpp

    callback = llama_cpp.ggml_backend_sched_eval_callback(observe)
    with runs.tiered(runs.tier_plan(path, expert_bytes=least), cb_eval=callback) as (_, ctx, _paged):
        assert runs.decode(ctx, runs.PROMPT[:2]) == 0
        assert seen
        expected = tensors["blk.0.ffn_up_exps.weight"].tobytes()
        buffer = ctypes.create_string_buffer(1000)
        get(seen[0], buffer, 777, 1000)
        assert buffer.raw == expected[777:1777]
        # and of a part of it: a view has no bytes of its own
        scratch = init(InitParams(1 << 16, None, True))
        view = view_1d(scratch, seen[0], 32 * 64, 1800)
        get(view, buffer, 36, 1000)
        assert buffer.raw == expected[1836:2836]
        free(scratch)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_process_leaves_nothing(path: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of reading: no file anywhere, no memory held (it was anonymous)."""
    code = f"""
import sys
from pathlib import Path
from tests import tier_runs as runs
path = Path({str(path)!r})
with runs.tiered(runs.tier_plan(path, expert_bytes=runs.expert_bytes(path)[0])) as (model, ctx, paged):
    print("ready", flush=True)
    while True:
        runs.generate(model, ctx, steps=4)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    folder = Path(f"/proc/{process.pid}")
    opened = {p.resolve() for p in (folder / "fd").iterdir()}
    written = [p for p in opened if p.is_file() and p not in (path.resolve(), Path(os.devnull))]
    mapped = {line.split(maxsplit=5)[-1].strip() for line in (folder / "maps").read_text().splitlines()}
    process.kill()
    assert process.wait(60) == -9
    process.stdout.close()
    assert not written
    assert not [name for name in mapped if name.startswith(("/dev/shm", "/memfd"))]
