"""What one client does may not stop the others: coming and going, thousands of texts, texts that fit in no context."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tensortier._llama.sequences import Batch, Outcome, Sequences
from tensortier.engine import Engine
from tensortier.errors import ContextFull, TensortierError
from tensortier.types import Plan, Sampling, Settings

PARALLEL = 3


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Iterator[Engine]:
    settings = Settings(n_ctx=2048, n_ubatch=64, n_seq_max=PARALLEL, threads=1, flash_attention="off")
    with Engine(Plan(str(smollm2_path), settings=settings)) as engine:
        yield engine


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_clients_that_come_and_go_do_not_stop_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is given up for a long prompt that nobody wants any more; the next one of the others is computed."""
    outcomes: list[Outcome] = []
    compute = Sequences.compute

    def recorded(self: Sequences, batch: Batch) -> Outcome:
        outcomes.append(compute(self, batch))
        return outcomes[-1]

    monkeypatch.setattr(Sequences, "compute", recorded)
    stays = engine.complete("x", Sampling(temperature=0, max_tokens=2000, logit_bias=((1000, 100.0),)))
    next(stays)
    deadline = time.monotonic() + 30
    while outcomes.count(Outcome.ABORTED) < 6:
        assert time.monotonic() < deadline
        long = engine.complete(f"{len(outcomes)} " + "one two three four " * 250, Sampling(max_tokens=1))
        time.sleep(0.02)
        long.cancel()
    stays.cancel()
    twice = [a for a, b in itertools.pairwise(outcomes) if a is b is Outcome.ABORTED]
    assert not twice[:-1]  # at the end nobody is left who would lose anything


def test_a_prompt_is_computed_while_clients_come_and_go(engine: Engine) -> None:
    waits = engine.complete("five six seven eight " * 50, Sampling(max_tokens=1))
    waiting = threading.Thread(target=list, args=(waits,))
    waiting.start()
    deadline = time.monotonic() + 60
    while waiting.is_alive():
        assert time.monotonic() < deadline
        long = engine.complete(f"{time.monotonic()} " + "one two three four " * 250, Sampling(max_tokens=1))
        time.sleep(0.01)
        long.cancel()


def test_many_texts_leave_room_for_others(engine: Engine) -> None:
    texts = [f"Text {number}" for number in range(60)]
    found: list[Any] = []
    embedding = threading.Thread(target=lambda: found.extend(engine.embed(texts)))
    before = engine.activity().prompt_tokens_total
    embedding.start()
    wait_until(lambda: engine.activity().prompt_tokens_total > before)
    assert engine.activity().waiting <= 2 * PARALLEL
    list(engine.complete("x", Sampling(max_tokens=1)))
    computed = engine.activity().prompt_tokens_total - before
    embedding.join()
    assert len(found) == len(texts) and found[7].vector == pytest.approx(engine.embed(texts[7:8])[0].vector)
    assert computed < sum(embedded.n_tokens for embedded in found) / 2


@pytest.mark.parametrize("unit", ["<|im_start|>", "a", "word ", "\n", "日", "1"])
def test_of_a_text_that_cannot_fit_only_the_beginning_is_read(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    read: list[int] = []
    tokenize = type(engine._loaded).tokenize

    def recorded(self: Any, text: str, **options: bool) -> list[int]:
        read.append(len(text))
        return tokenize(self, text, **options)

    monkeypatch.setattr(type(engine._loaded), "tokenize", recorded)
    text = unit * (4_000_000 // len(unit))
    with pytest.raises(ContextFull, match="context of 2048"):
        engine.complete(text)
    with pytest.raises(ContextFull, match="context of 2048"):
        engine.chat([{"role": "user", "content": text}])
    with pytest.raises(ContextFull, match="context of 2048"):
        engine.embed([text])
    assert max(read) < 2_000_000


def test_a_long_text_that_fits_is_read_to_its_end(engine: Engine) -> None:
    """Blanks have tokens of their own for many at a time."""
    text = " " * 60_000 + "What is 1 + 1?"
    request = engine.complete(text)
    request.cancel()
    assert request.stats.prompt_tokens == len(engine.tokenize(text)) < 1100


def test_nobody_waits_while_a_text_is_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the model freed meanwhile."""
    begun, go_on = threading.Event(), threading.Event()
    tokenize = type(engine._loaded).tokenize

    def slow(self: Any, text: str, **options: bool) -> list[int]:
        if text == "slow":
            begun.set()
            assert go_on.wait(20)
        return tokenize(self, text, **options)

    monkeypatch.setattr(type(engine._loaded), "tokenize", slow)
    found: list[Any] = []

    def ask_slowly() -> None:
        try:
            found.extend(engine.complete("slow", Sampling(max_tokens=2)))
        except TensortierError as exc:
            found.append(exc)

    asking = threading.Thread(target=ask_slowly)
    asking.start()
    assert begun.wait(10)
    other: list[Any] = []
    asking_too = threading.Thread(target=lambda: other.extend(engine.complete("x", Sampling(max_tokens=1))))
    asking_too.start()
    asking_too.join(10)
    assert other
    closing = threading.Thread(target=engine.close)
    closing.start()
    time.sleep(0.2)
    assert engine._loaded.model is not None
    go_on.set()
    asking.join(20)
    closing.join(20)
    assert engine._loaded.model is None and isinstance(found[0], TensortierError)
