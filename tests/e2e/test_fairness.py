"""What one client does may not stop the others: coming and going, thousands of texts, texts that fit in no context."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tensortier._llama.sequences import Outcome
from tensortier.engine import Engine, Request
from tensortier.errors import ContextFull, TensortierError
from tensortier.types import Plan, Sampling, Settings
from tests.engine_moments import ENDLESS, Batches, Heard, together, wait_until

PARALLEL = 3


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Iterator[Engine]:
    settings = Settings(n_ctx=2048, n_ubatch=64, n_seq_max=PARALLEL, threads=1, flash_attention="off")
    with Engine(Plan(str(smollm2_path), settings=settings)) as engine:
        yield engine


def test_clients_that_come_and_go_do_not_stop_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is given up for a long prompt that nobody wants any more; the next one of the others is computed. Each
    long prompt is given up in its first batch, and the next one is there before anything else is computed."""
    here: list[Request] = []
    over = threading.Event()

    def before(tokens: int) -> None:
        if here and tokens > 1 and not over.is_set():  # some of the long prompt are among them
            gone = here.pop()
            come()
            gone.cancel()

    def come() -> None:
        here.append(
            engine.complete(f"{len(batches.sizes)} " + "one two three four " * 250, Sampling(max_tokens=1))
        )

    batches = Batches(monkeypatch, before)
    with together(engine):
        stays = Heard(engine.complete("x", Sampling(max_tokens=20, grammar=ENDLESS)), {1: come}, over.set)
    assert len(stays.wait()) >= 10

    def left_alone() -> bool:
        for request in list(here):
            request.cancel()
        return (now := engine.activity()).active + now.waiting == 0

    wait_until(left_alone)
    aborted = [outcome is Outcome.ABORTED for outcome in batches.outcomes[: 2 * 20]]
    assert aborted.count(True) >= 10
    assert not any(a and b for a, b in itertools.pairwise(aborted))


def test_a_prompt_is_computed_while_clients_come_and_go(engine: Engine) -> None:
    waits = engine.complete("five six seven eight " * 50, Sampling(max_tokens=1))
    waiting = threading.Thread(target=list, args=(waits,))
    waiting.start()
    deadline = time.monotonic() + 300
    while waiting.is_alive():
        assert time.monotonic() < deadline
        long = engine.complete(f"{time.monotonic()} " + "one two three four " * 250, Sampling(max_tokens=1))
        time.sleep(0.01)
        long.cancel()


def test_many_texts_leave_room_for_others(engine: Engine) -> None:
    """A request that comes while they are computed has its turn before most of them."""
    texts = [f"Text {number}" for number in range(60)]
    waiting: list[int] = []
    computed: list[int] = []
    before = engine.activity().prompt_tokens_total

    def look(_: object) -> None:
        waiting.append(engine.activity().waiting)
        if len(waiting) == 8:
            request = engine.complete("x", Sampling(max_tokens=1))
            others.append(Heard(request, {1: lambda: computed.append(engine.activity().prompt_tokens_total)}))

    others: list[Heard] = []
    found = engine.embed(texts, started=look)
    (other,) = others
    other.wait()
    assert max(waiting) <= 2 * PARALLEL + 1
    assert len(found) == len(texts) and found[7].vector == pytest.approx(engine.embed(texts[7:8])[0].vector)
    assert computed[0] - before < sum(embedded.n_tokens for embedded in found) / 2


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
            assert go_on.wait(300)
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
    assert begun.wait(60)
    other: list[Any] = []
    asking_too = threading.Thread(target=lambda: other.extend(engine.complete("x", Sampling(max_tokens=1))))
    asking_too.start()
    asking_too.join(60)
    assert other
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_until(lambda: engine._scheduler._closing)
    time.sleep(0.2)  # if it were freed now, that would be seen; if later, it is not
    assert engine._loaded.model is not None
    go_on.set()
    asking.join(60)
    closing.join(60)
    assert engine._loaded.model is None and isinstance(found[0], TensortierError)
