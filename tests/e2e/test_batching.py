"""Several requests at once, against what ``llama_cpp.Llama`` says of each alone: every token must be the best one, or
all but, given the tokens before it. A prompt or a kept prefix of somebody else would not pass.

Mostly on a small model of 16-bit weights: with quantized ones, llama.cpp's own logits differ by half a unit between
batches of different sizes.
"""

from __future__ import annotations

import errno
import multiprocessing
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from tensortier import memory
from tensortier._llama.memory import allocated
from tensortier._llama.sequences import Outcome
from tensortier.engine import Engine, Request
from tensortier.errors import Cancelled, ContextFull, GenerationError, TensortierError, UsageError
from tensortier.types import GenerationStats, Piece, Placement, Plan, Sampling, Settings
from tests import tier_runs as runs
from tests.engine_moments import ENDLESS, Batches, Heard, Operations, together, wait_until
from tests.models import bert

TOPICS = ["the sea", "a lighthouse", "bread", "the moon", "iron", "chess", "a river", "rain", "bees", "glass"]
CLOSE = 0.01  # of logits with a deviation of 2: sums in another order, in batches of another size


def ask(engine: Engine, prompt: str | list[int], tokens: int, **options: object) -> Request:
    return engine.complete(prompt, Sampling(temperature=0, max_tokens=tokens, logprobs=0, **options))  # type: ignore[arg-type]


def answer(request: Iterable[Piece]) -> list[int]:
    """Its tokens."""
    return [entry.token_id for piece in request for entry in piece.logprobs]


class Reference:
    """Judges tokens by stock llama.cpp, one sequence and a fresh context state each."""

    def __init__(self, path: Path, n_ctx: int = 1024) -> None:
        self.llama = llama_cpp.Llama(
            str(path),
            n_ctx=n_ctx,
            n_batch=n_ctx,
            n_threads=2,
            n_threads_batch=2,
            logits_all=True,
            verbose=False,
        )

    def check(self, prompt: list[int], tokens: list[int]) -> None:
        assert tokens
        self.llama.reset()
        self.llama.eval([*prompt, *tokens[:-1]])
        logits = self.llama.scores[len(prompt) - 1 : len(prompt) + len(tokens) - 1].astype(np.float64)
        behind = logits.max(axis=1) - logits[np.arange(len(tokens)), tokens]
        assert behind.max() < CLOSE, (
            f"token {behind.argmax()} of {len(tokens)} is {behind.max():.2f} behind the best"
        )


@pytest.fixture(scope="module")
def engine(tiny_path: Path) -> Iterator[Engine]:
    settings = Settings(n_ctx=1024, n_batch=256, n_ubatch=64, n_seq_max=4, threads=2, flash_attention="off")
    with Engine(Plan(str(tiny_path), settings=settings)) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(tiny_path: Path) -> Iterator[Reference]:
    found = Reference(tiny_path)
    yield found
    found.llama.close()


def test_each_gets_its_own_answer(engine: Engine, reference: Reference) -> None:
    """More requests than sequences, prompts of several micro-batches among them."""
    prompts = [
        f"{'Some notes. ' * (17 * i % 90)}A short text about {topic}:" for i, topic in enumerate(TOPICS)
    ]
    with together(engine):
        requests = [ask(engine, prompt, 12 + i) for i, prompt in enumerate(prompts)]
    found = [answer(request) for request in requests]
    for i, (prompt, tokens, request) in enumerate(zip(prompts, found, requests, strict=True)):
        assert len(tokens) == 12 + i == request.stats.completion_tokens
        reference.check(engine.tokenize(prompt), tokens)


def test_a_common_beginning_is_computed_once(engine: Engine, reference: Reference) -> None:
    beginning = "You are the keeper of a lighthouse and answer in one sentence. " * 6
    first = ask(engine, beginning + "What do you eat?", 8)
    answer(first)
    with together(engine):
        requests = [ask(engine, f"{beginning}What about {topic}?", 8) for topic in TOPICS[:4]]
    found = [answer(request) for request in requests]
    shared = len(engine.tokenize(beginning))
    for topic, tokens, request in zip(TOPICS, found, requests, strict=False):
        assert shared - 1 <= request.stats.cached_tokens <= shared + 2
        reference.check(engine.tokenize(f"{beginning}What about {topic}?"), tokens)
    # the four share its cells
    assert engine.activity().kv_used_cells < 2 * shared + 4 * 40


def test_one_that_is_still_generating_gives_its_beginning(engine: Engine, reference: Reference) -> None:
    prompt = "A story that is told by an old man at the harbour, who has seen much: "
    others: list[Heard] = []
    unfinished: list[bool] = []

    def follow() -> None:
        request = ask(engine, prompt + "It begins with", 10)
        others.append(
            Heard(request, last=lambda: unfinished.append(long.request.stats.finish_reason is None))
        )

    with together(engine):
        long = Heard(ask(engine, prompt, 300), {1: follow})
    wait_until(lambda: bool(unfinished))
    long.request.cancel()
    (other,) = others
    tokens = answer(other.wait())
    assert other.request.stats.cached_tokens >= len(engine.tokenize(prompt)) - 1
    assert unfinished == [True]
    reference.check(engine.tokenize(prompt + "It begins with"), tokens)


def test_nobody_waits_for_a_long_prompt(engine: Engine) -> None:
    """Who generates has a token in every batch; a short prompt that comes later is ready earlier."""
    tokens: dict[str, int] = {}  # of who generates, when another one is ready
    later: list[Heard] = []

    def follow() -> None:
        for name, prompt in (("long", "several words in a long row " * 90), ("short", "one two three " * 25)):

            def note(name: str = name) -> None:
                tokens[name] = steady.request.stats.completion_tokens

            later.append(Heard(ask(engine, prompt, 1), last=note))
        tokens["before"] = steady.request.stats.completion_tokens

    with together(engine):
        steady = Heard(ask(engine, "A text about the moon:", 400), {1: follow})
    wait_until(lambda: "before" in tokens)
    long, short = later
    long.wait()
    short.wait()
    steady.request.cancel()
    batches = long.request.stats.prompt_tokens // 64  # of a micro-batch each
    assert tokens["short"] < tokens["long"]
    assert tokens["long"] - tokens["before"] >= batches


def test_when_cells_run_out_the_newest_is_computed_again(tiny_path: Path, reference: Reference) -> None:
    settings = Settings(n_ctx=256, n_batch=128, n_ubatch=32, n_seq_max=4, threads=2, flash_attention="off")
    with Engine(Plan(str(tiny_path), settings=settings)) as engine:
        prompts = [f"A long text about {topic}." for topic in TOPICS[:6]]
        sent_back = []
        give_way = engine._scheduler._give_way
        engine._scheduler._give_way = lambda tasks: (sent_back.append(1), give_way(tasks))  # type: ignore[assignment]
        with together(engine):
            requests = [ask(engine, prompt, 120) for prompt in prompts]

        def ended() -> bool:
            now = engine.activity()
            assert now.kv_used_cells <= now.n_ctx == 256
            return now.active + now.waiting == 0

        wait_until(ended)
        assert sent_back
        for prompt, request in zip(prompts, requests, strict=True):
            tokens = answer(request)
            assert len(tokens) == 120
            assert request.stats.prompt_tokens == len(engine.tokenize(prompt))
            reference.check(engine.tokenize(prompt), tokens)


def test_an_answer_that_fills_the_context_alone(tiny_path: Path) -> None:
    settings = Settings(n_ctx=256, n_batch=128, n_ubatch=32, n_seq_max=2, threads=2, flash_attention="off")
    with Engine(Plan(str(tiny_path), settings=settings)) as engine:
        long = ask(engine, "word " * 100, -1, grammar='root ::= " word"{400}')
        other = ask(engine, "Hello", 20)
        assert len(answer(other)) == 20
        assert len(answer(long)) == 256 - long.stats.prompt_tokens
        assert long.stats.finish_reason == "length"
        with pytest.raises(ContextFull):
            ask(engine, "word " * 300, 1)


def test_who_cancels_in_a_long_prompt_goes_alone(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a micro-batch of 2048, which takes seconds: it is not computed to its end."""
    settings = Settings(
        n_ctx=8192, n_batch=2048, n_ubatch=2048, n_seq_max=3, threads=1, flash_attention="off"
    )
    with Engine(Plan(str(smollm2_path), settings=settings)) as engine:
        alone = answer(ask(engine, "A text about a lighthouse:", 60))
        operations = Operations(engine)
        long: list[Request] = []

        def go() -> None:
            operations.asked, operations.limit = 0, 100
            operations.then = lambda: long[0].cancel()

        asked: list[int] = []  # of the batch before

        def before(tokens: int) -> None:
            asked.append(operations.asked)
            if tokens > 1000:
                go()

        batches = Batches(monkeypatch, before)
        with together(engine):
            beside = Heard(
                ask(engine, "A text about a lighthouse:", 60),
                {1: lambda: long.append(ask(engine, "one two three four five " * 900, 10))},
            )
        # its tokens but one were computed in batches of one: the same numbers
        assert answer(beside.wait()) == alone
        assert beside.request.stats.finish_reason == "length"
        with pytest.raises(Cancelled):
            list(long[0])
        (given_up,) = (i for i, outcome in enumerate(batches.outcomes) if outcome is not Outcome.DONE)
        assert batches.outcomes[given_up] is Outcome.ABORTED and batches.sizes[given_up] == 2048
        assert max(size for i, size in enumerate(batches.sizes) if i != given_up) < 100
        assert operations.limit <= asked[given_up + 1] < operations.limit + 10


@pytest.mark.parametrize("kind", ["hybrid", "window"])
def test_models_whose_state_cannot_be_cut(kind: str, synthetic: Callable[..., Path]) -> None:
    """Linear attention, and a sliding window of 128 tokens: texts with common beginnings, gone on with, and left."""
    small = {"layers": 4, "n_embd": 256, "n_ff": 256, "heads": 4, "kv_heads": 2, "experts": 4, "used": 2}
    path = (
        synthetic(**small, arch="qwen3next", shared=256, merged=True, qtype="Q8_0")
        if kind == "hybrid"
        else synthetic(**small, arch="gpt-oss", qtype="F16", embedding="F16")
    )
    reference = Reference(path)
    settings = Settings(n_ctx=2048, n_batch=256, n_ubatch=64, n_seq_max=3, threads=2, flash_attention="off")
    with Engine(Plan(str(path), settings=settings)) as engine:
        beginning = engine.tokenize("The keeper of the lighthouse wrote a letter to his sister. " * 20)
        prompts = [
            [*beginning[: 250 - 20 * i], *engine.tokenize(f" {topic}")] for i, topic in enumerate(TOPICS[:5])
        ]
        requests = [ask(engine, prompt, 10) for prompt in prompts]
        answers = [answer(request) for request in requests]
        for prompt, tokens in zip(prompts, answers, strict=True):
            reference.check(prompt, tokens)
        longer = [*prompts[4], *answers[4], *engine.tokenize(" And then")]
        second = ask(engine, longer, 10)
        reference.check(longer, answer(second))
        assert second.stats.cached_tokens >= len(prompts[4])  # to go on is always possible
        third = ask(engine, longer[:150], 10)
        reference.check(longer[:150], answer(third))
    reference.llama.close()


def test_copies_of_a_window_leave_room(synthetic: Callable[..., Path]) -> None:
    """Cells of a sliding window that sequences share are not freed when it moves on: somebody must give way."""
    small = {"layers": 4, "n_embd": 256, "n_ff": 256, "heads": 4, "kv_heads": 2, "experts": 4, "used": 2}
    path = synthetic(**small, arch="gpt-oss", qtype="F16", embedding="F16")
    reference = Reference(path)
    settings = Settings(n_ctx=4096, n_batch=64, n_ubatch=64, n_seq_max=4, threads=2, flash_attention="off")
    with Engine(Plan(str(path), settings=settings)) as engine:
        beginning = engine.tokenize("The keeper of the lighthouse wrote a letter to his sister. " * 50)[:500]
        first = ask(engine, beginning, 200)
        next(first)
        prompts = [[*beginning, *engine.tokenize(f" {topic}")] for topic in TOPICS[:6]]
        requests = [ask(engine, prompt, 150) for prompt in prompts]
        for prompt, request in zip(prompts, requests, strict=True):
            tokens = answer(request)
            assert len(tokens) == 150
            reference.check(prompt, tokens)
        assert len(answer(first)) == 199
    reference.llama.close()


def test_an_interrupted_state_is_made_anew(synthetic: Callable[..., Path]) -> None:
    """Linear attention: what the layers hold after a part of a micro-batch belongs to no token. Interrupted by who
    asked for it, and on its way to an answer that somebody waits for."""
    small = {"layers": 4, "n_embd": 256, "n_ff": 256, "heads": 4, "kv_heads": 2, "experts": 4, "used": 2}
    path = synthetic(**small, arch="qwen3next", shared=256, merged=True, qtype="Q8_0")
    reference = Reference(path)
    settings = Settings(n_ctx=2048, n_batch=1024, n_ubatch=1024, threads=2, flash_attention="off")
    with Engine(Plan(str(path), settings=settings)) as engine:
        prompt = engine.tokenize("The keeper of the lighthouse wrote a letter to his sister. " * 70)[:800]
        operations = Operations(engine)
        answer(ask(engine, prompt, 1))
        of_the_prompt = operations.asked
        assert of_the_prompt > 100
        for share in (0.0, 0.3, 0.6, 0.9):
            answer(ask(engine, prompt[:100], 1))  # something to go on from
            with together(engine):
                request = ask(engine, prompt, 4)
                operations.asked, operations.limit = 0, 1 + int(share * of_the_prompt)
                operations.then = request.cancel
            with pytest.raises(Cancelled):
                list(request)
            reference.check(prompt, answer(ask(engine, prompt, 4)))
            answer(ask(engine, prompt[:100], 1))
            with together(engine):
                request = ask(engine, prompt, 4)
                operations.asked = 0
                operations.then = lambda: engine._parameters.abort(True)
            reference.check(prompt, answer(request))
            assert operations.asked > operations.limit
    reference.llama.close()


def test_listening(engine: Engine) -> None:
    heard: list[tuple[str, Piece | TensortierError | None]] = []
    done = threading.Event()

    def listen(item: Piece | TensortierError | None) -> None:
        heard.append((threading.current_thread().name, item))
        if not isinstance(item, Piece):
            done.set()

    request = ask(engine, "Hello, my name is", 8)
    wait_until(lambda: request.stats.completion_tokens > 2)  # some pieces are there already
    request.listen(listen)
    assert done.wait(60)
    assert {name for name, _ in heard} == {"tensortier-engine"}
    pieces = [item for _, item in heard]
    assert pieces[-1] is None
    again = ask(engine, "Hello, my name is", 8)
    assert [p.text for p in pieces[:-1] if isinstance(p, Piece)] == [p.text for p in again]

    with together(engine):
        given_up = Heard(ask(engine, "Hello, my name is", 500), {3: lambda: given_up.request.cancel()})
    with pytest.raises(Cancelled):
        given_up.wait()
    assert len(given_up.pieces) == 3


def test_a_listener_that_fails_ends_its_request_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_value))
    other = ask(engine, "The sun", 30)
    bad = ask(engine, "The moon", 500)

    def fail(item: object) -> None:
        raise OSError("gone")

    bad.listen(fail)
    assert len(answer(other)) == 30
    wait_until(lambda: engine.activity().active == 0)
    assert isinstance(told[0], OSError)


def test_sixty_four_at_once(engine: Engine) -> None:
    """Nothing lost, nothing mixed: each answer is bound to its own number."""
    results: dict[int, str] = {}
    stats: dict[int, GenerationStats] = {}

    def one(number: int) -> None:
        grammar = f'root ::= "Number {number}: " [a-z ]{{4}} "."'
        request = engine.complete(
            f"This is number {number}.", Sampling(max_tokens=40, seed=number, grammar=grammar)
        )
        results[number] = "".join(piece.text for piece in request)
        stats[number] = request.stats

    threads = [threading.Thread(target=one, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(64))
    for number, text in results.items():
        head = f"Number {number}: "
        assert text.startswith(head) and text.endswith(".") and len(text) == len(head) + 5
        assert stats[number].finish_reason == "stop"


def test_storms_of_cancels(engine: Engine, reference: Reference) -> None:
    """Whoever goes at whatever moment takes nobody along."""
    steady = ask(engine, "A text about a lighthouse:", 80)
    for i in range(60):
        request = ask(engine, f"{'Some words. ' * (i * 7 % 60)}{i}", 5)
        if i % 3 == 0:
            request.cancel()
        elif i % 3 == 1:
            wait_until(lambda request=request: request.stats.prompt_seconds > 0)  # type: ignore[misc]
            request.cancel()
        del request
    tokens = answer(steady)
    assert len(tokens) == 80
    reference.check(engine.tokenize("A text about a lighthouse:"), tokens)
    wait_until(lambda: engine.activity().active + engine.activity().waiting == 0)


def test_closing_ends_all(smollm2_path: Path) -> None:
    settings = Settings(n_ctx=1024, n_seq_max=2, threads=2, flash_attention="off")
    engine = Engine(Plan(str(smollm2_path), settings=settings))
    requests = [ask(engine, "Once upon a time", -1, grammar=ENDLESS) for _ in range(5)]
    next(requests[0])
    engine.close()
    for request in requests:
        with pytest.raises(Cancelled):
            list(request)
    with pytest.raises(GenerationError, match="closed"):
        ask(engine, "x", 1)
    assert engine.activity().active == 0


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        (Sampling(top_p=float("nan")), "top_p"),
        (Sampling(repeat_penalty=0.0), "repeat_penalty"),
        (Sampling(logprobs=21), "logprobs"),
        (Sampling(logit_bias=((49152, 1.0),)), "logit_bias"),
        (Sampling(logit_bias=((1, float("inf")),)), "logit_bias"),
    ],
)
def test_sampling_that_cannot_be_meant(engine: Engine, sampling: Sampling, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        engine.complete("x", sampling)


def test_prompts_that_cannot_be(engine: Engine) -> None:
    with pytest.raises(UsageError, match="surrogate"):
        engine.complete("\ud800")
    with pytest.raises(UsageError, match="from 0 to 49151"):
        engine.complete([1, 49152])


def test_a_bias_chooses(engine: Engine) -> None:
    (token,) = engine.tokenize(" banana")
    text = "".join(p.text for p in ask(engine, "My favourite", 3, logit_bias=((token, 100.0),)))
    assert text == " banana" * 3


def test_a_seed_repeats(engine: Engine) -> None:
    def text(seed: int | None) -> str:
        return "".join(
            p.text for p in engine.complete("Once", Sampling(seed=seed, max_tokens=12, temperature=1.5))
        )

    assert text(7) == text(7)
    assert len({text(None) for _ in range(4)}) > 1


def test_embeddings_are_those_of_the_bindings(engine: Engine, tiny_path: Path) -> None:
    texts = ["Hello world", "The sea is blue. " * 40, "ein Satz"]
    stock = llama_cpp.Llama(
        str(tiny_path), n_ctx=1024, n_batch=1024, n_threads=2, embedding=True, verbose=False
    )
    expected = [np.mean(stock.embed(text), axis=0) for text in texts]
    stock.close()
    beside = ask(engine, "A text about a lighthouse:", 30)
    found = engine.embed(texts)
    for embedding, vector, text in zip(found, expected, texts, strict=True):
        assert embedding.n_tokens == len(engine.tokenize(text))
        mine = np.array(embedding.vector)
        assert mine == pytest.approx(vector, abs=1e-3 * np.abs(vector).max())
    assert len(answer(beside)) == 30
    with pytest.raises(UsageError, match="from 0 to"):
        engine.embed([[-1]])
    with pytest.raises(ContextFull):
        engine.embed(["word " * 2000])


@pytest.mark.parametrize("kind", ["tiny", "hybrid", "window"])
def test_memory_stays_as_predicted(kind: str, tiny_path: Path, synthetic: Callable[..., Path]) -> None:
    """After batches of all kinds, llama.cpp has allocated what the probe said."""
    small = {"layers": 4, "n_embd": 256, "n_ff": 256, "heads": 4, "kv_heads": 2, "experts": 4, "used": 2}
    path = {
        "tiny": lambda: tiny_path,
        "hybrid": lambda: synthetic(**small, arch="qwen3next", shared=256, merged=True, qtype="Q8_0"),
        "window": lambda: synthetic(**small, arch="gpt-oss", qtype="Q8_0"),
    }[kind]()
    settings = Settings(n_ctx=1024, n_batch=256, n_ubatch=128, n_seq_max=6, threads=2, load_mode="none")
    plan = Plan(str(path), settings=settings)
    predicted = memory.predict(plan)
    with Engine(plan) as engine:
        requests = [ask(engine, "word " * (90 * i), 6 + i) for i in range(1, 7)]
        for request in requests:
            assert len(answer(request)) == request.stats.completion_tokens > 0
        engine.embed(["word " * 300, "Hello"])
        assert allocated(engine._loaded.context) == predicted


@pytest.mark.parametrize("pooling", [1, 2])  # mean, the first token
def test_an_encoder(pooling: int, tmp_path: Path) -> None:
    """It pools by itself, and has no cache."""
    path = bert.build(tmp_path / "encoder.gguf", pooling)
    texts = ["hello world", "the sea is blue .", "a light house . " * 8, "."] * 3
    stock = llama_cpp.Llama(str(path), n_ctx=64, n_batch=64, n_ubatch=64, embedding=True, verbose=False)
    expected = [stock.embed(text) for text in texts]
    stock.close()
    settings = Settings(n_ctx=256, n_seq_max=4, n_ubatch=128, threads=1, flash_attention="off")
    with Engine(Plan(str(path), settings=settings)) as engine:
        for embedding, vector, text in zip(engine.embed(texts), expected, texts, strict=True):
            assert embedding.n_tokens == len(text.split()) + 2
            assert embedding.vector == pytest.approx(vector, abs=1e-4)
        with pytest.raises(ContextFull, match="64"):  # it has no positions beyond
            engine.embed(["hello " * 70])
        with pytest.raises(UsageError, match="does not generate text"):
            engine.complete("hello")


def test_weights_on_the_drive(synthetic: Callable[..., Path]) -> None:
    """Experts read for several requests at a time; a read that fails ends those whose batch it was, with its reason."""
    path = synthetic(layers=3, experts=8, used=2, qtype="F16", embedding="F16")
    reference = Reference(path)
    plan = runs.tier_plan(path, expert_bytes=runs.expert_bytes(path)[0])
    settings = Settings(
        n_ctx=1024, n_batch=256, n_ubatch=32, n_seq_max=3, threads=2, flash_attention="off", repack=False
    )
    with Engine(replace(plan, settings=settings)) as engine:
        prompts = [engine.tokenize(f"A text about {topic}:" * 5) for topic in TOPICS[:5]]
        for prompt, request in [(prompt, ask(engine, prompt, 12)) for prompt in prompts]:
            reference.check(prompt, answer(request))
        assert engine.paged is not None
        with together(engine):
            requests = [ask(engine, prompt, 40) for prompt in prompts]
            engine.paged.inject_fault(-errno.EIO, after=500)  # all of the first three generate then
        outcomes: list[int | str] = []
        for request in requests:
            try:
                outcomes.append(len(answer(request)))
            except GenerationError as exc:
                outcomes.append(str(exc))
        failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
        assert len(failed) == 3  # all that had a sequence
        assert all("Input/output error" in text for text in failed)
        assert outcomes[3:] == [40, 40]  # who waited goes on
        assert all(request.stats.completion_tokens > 0 for request in requests)
        reference.check(prompts[0], answer(ask(engine, prompts[0], 12)))
    reference.llama.close()


def answers_elsewhere(path: str, place: Placement, server: str) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of several requests at once."""
    settings = Settings(n_ctx=1024, n_ubatch=64, n_seq_max=3, threads=1, flash_attention="off")
    with Engine(Plan(path, place, settings, rpc=(server,))) as engine:
        prompts = [engine.tokenize(f"A text about {topic}:" * 20) for topic in TOPICS[:5]]
        requests = [ask(engine, prompt, 12) for prompt in prompts]
        return [(prompt, answer(request)) for prompt, request in zip(prompts, requests, strict=True)]


def test_on_another_device(tiny_path: Path, rpc_device: str, reference: Reference) -> None:
    """Weights and cache there, or the cache here. In a process of its own: ggml never forgets a server, and the server
    talks to one process at a time."""
    places = (
        Placement(("RPC0",), -1),
        Placement(("RPC0",), 1),
        Placement(("RPC0",), -1, kv_on_device=False),
    )
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        for place in places:
            found = process.submit(answers_elsewhere, str(tiny_path), place, rpc_device).result(300)
            assert len(found) == 5
            for prompt, tokens in found:
                reference.check(prompt, tokens)
