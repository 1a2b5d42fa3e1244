"""The engine against ``llama_cpp.Llama`` itself: same tokens, same logits; and its own manners."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from tensortier import memory
from tensortier.engine import Engine
from tensortier.errors import (
    BackendError,
    Cancelled,
    ContextFull,
    GenerationError,
    LoadError,
    ModelNotFound,
    PatternError,
    PlanError,
    UsageError,
)
from tensortier.types import Override, Placement, Plan, Sampling, Settings

GREEDY = Sampling(temperature=0.0, max_tokens=24)
PROMPTS = [
    "The three laws of thermodynamics say that",
    "def fibonacci(n):\n",
    "Dear Sir or Madam,\n\nI am writing to you because",
]
SETTINGS = Settings(n_ctx=512, n_batch=512, threads=2, flash_attention="off")


def stock(path: Path) -> llama_cpp.Llama:
    """The reference, with the parameters that SETTINGS mean."""
    return llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, n_threads=2, n_threads_batch=2, verbose=False)


def logits(llama: Any, tokens: list[int]) -> np.ndarray:
    """Of the last token."""
    llama.reset()
    llama.eval(tokens)
    pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),)).copy()


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Iterator[Engine]:
    with Engine(Plan(model=str(smollm2_path), settings=SETTINGS)) as engine:
        yield engine


@pytest.mark.parametrize("fixture", ["smollm2_path", "moe_path"])
def test_same_tokens_and_logits_as_the_bindings(fixture: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(fixture)
    reference = stock(path)
    with Engine(Plan(model=str(path), settings=SETTINGS)) as engine:
        for prompt in PROMPTS:
            tokens = engine.tokenize(prompt)
            assert tokens == reference.tokenize(prompt.encode(), add_bos=False)
            expected = logits(reference, tokens)
            assert np.ptp(expected) > 1.0
            assert np.array_equal(logits(engine._llama, tokens), expected)
            reference.reset()
            answer = reference.create_completion(prompt, max_tokens=24, temperature=0.0)
            engine._llama.reset()
            text = "".join(piece.text for piece in engine.complete(prompt, GREEDY))
            assert text == answer["choices"][0]["text"]
            assert engine.stats.prompt_tokens == answer["usage"]["prompt_tokens"]
            assert engine.stats.completion_tokens == answer["usage"]["completion_tokens"]
    reference.close()


def test_chat_is_that_of_the_bindings(engine: Engine, smollm2_path: Path) -> None:
    messages = [{"role": "user", "content": "Name three colours."}]
    reference = stock(smollm2_path)
    expected = reference.create_chat_completion(messages, temperature=0.0, max_tokens=24)
    reference.close()
    pieces = list(engine.chat(messages, GREEDY))
    assert "".join(p.text for p in pieces) == expected["choices"][0]["message"]["content"]
    assert pieces[-1].finish_reason == expected["choices"][0]["finish_reason"]
    assert engine.stats.completion_tokens == expected["usage"]["completion_tokens"]


def test_memory_is_what_was_predicted(smollm2_path: Path) -> None:
    plan = Plan(model=str(smollm2_path), settings=Settings(n_ctx=1024, load_mode="none", threads=2))
    rows = memory.predict(plan)
    with Engine(Plan(plan.model, plan.placement, plan.settings, rows)) as engine:
        assert [r.device for r in engine.memory] == ["CPU"]
        (report,) = engine.memory
        assert report.planned == report.allocated
        # 30 layers x 1024 cells x 3 KV heads x (64 + 64) values x 2 bytes
        assert report.allocated.kv_bytes == 30 * 1024 * 3 * 128 * 2


def test_a_second_turn_reuses_the_first(engine: Engine) -> None:
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    answer = "".join(p.text for p in engine.chat(messages, GREEDY))
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And the land?"}]
    list(engine.chat(messages, GREEDY))
    assert engine.stats.cached_tokens > 30
    assert engine.stats.cached_tokens < engine.stats.prompt_tokens


def test_stop_and_grammar(engine: Engine) -> None:
    text = "".join(
        p.text for p in engine.complete("1 2 3 4 5 6", Sampling(temperature=0, max_tokens=20, stop=("9",)))
    )
    assert "9" not in text
    yes_no = Sampling(temperature=0, max_tokens=4, grammar='root ::= "yes" | "no"')
    assert "".join(p.text for p in engine.complete("Is water wet?", yes_no)) in ("yes", "no")
    with pytest.raises(UsageError, match="grammar"):
        list(engine.complete("x", Sampling(grammar="root ::= (((")))


def test_a_bad_grammar_from_anywhere_does_not_end_the_process(engine: Engine) -> None:
    """The bindings make grammars of tools and schemas by themselves and hand on what llama.cpp refused."""
    grammar = llama_cpp.LlamaGrammar.from_string("root ::= (((", verbose=False)
    with pytest.raises(ValueError, match="expecting"):
        list(engine._llama.create_completion("x", grammar=grammar, stream=True))
    assert list(engine.complete("Hello", Sampling(max_tokens=1)))


def test_cancel_in_a_long_prompt_and_go_on(smollm2_path: Path) -> None:
    settings = Settings(n_ctx=8192, n_batch=4096, n_ubatch=4096, threads=2)
    with Engine(Plan(model=str(smollm2_path), settings=settings)) as engine:
        before = "".join(p.text for p in engine.complete("The sun is", GREEDY))
        long_prompt = "one two three four five " * 1300
        timer = threading.Timer(0.5, engine.cancel)
        timer.start()
        started = time.monotonic()
        with pytest.raises(Cancelled):
            list(engine.complete(long_prompt, GREEDY))
        assert time.monotonic() - started < 5.0
        assert engine.stats.completion_tokens == 0
        engine._llama.reset()
        assert "".join(p.text for p in engine.complete("The sun is", GREEDY)) == before


def test_cancel_between_tokens_keeps_what_there_was(engine: Engine) -> None:
    got = []
    with pytest.raises(Cancelled):
        for piece in engine.complete("Once upon a time", Sampling(temperature=0, max_tokens=200)):
            got.append(piece.text)
            if len(got) == 5:
                engine.cancel()
    assert 5 <= engine.stats.completion_tokens <= 6
    assert "".join(p.text for p in engine.complete("Once upon a time", Sampling(temperature=0, max_tokens=5)))


def test_cancel_without_a_request_does_nothing(engine: Engine) -> None:
    engine.cancel()
    assert list(engine.complete("Hello", Sampling(temperature=0, max_tokens=2)))


def test_cancelled_load(smollm2_path: Path) -> None:
    cancel = threading.Event()
    seen: list[float] = []

    def progress(fraction: float) -> None:
        seen.append(fraction)
        cancel.set()

    with pytest.raises(Cancelled):
        Engine(
            Plan(model=str(smollm2_path), settings=Settings(load_mode="none")),
            progress=progress,
            cancel=cancel,
        )
    assert seen and seen[-1] < 1.0


def test_one_request_at_a_time(engine: Engine) -> None:
    first = engine.complete("Hello", GREEDY)
    next(first)
    with pytest.raises(GenerationError, match="busy"):
        next(engine.complete("Hello", GREEDY))
    first.close()  # type: ignore[attr-defined]
    assert list(engine.complete("Hello", Sampling(max_tokens=1)))


def test_a_prompt_longer_than_the_context(engine: Engine) -> None:
    with pytest.raises(ContextFull, match="context"):
        list(engine.complete("word " * 600))


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"settings": Settings(type_k="q9_9")}, PlanError, "q9_9"),
        ({"settings": Settings(load_mode="teleport")}, PlanError, "teleport"),
        ({"settings": Settings(n_ubatch=0)}, PlanError, "n_ubatch"),
        ({"settings": Settings(n_ctx=1 << 40)}, PlanError, "n_ctx"),
        ({"settings": Settings(n_seq_max=2)}, PlanError, "n_seq_max"),
        ({"settings": Settings(type_v="q8_0", flash_attention="off")}, LoadError, "flash"),
        ({"placement": Placement(devices=("CUDA7",), n_gpu_layers=-1)}, BackendError, "CUDA7"),
        ({"placement": Placement(overrides=(Override("x", "Moon"),))}, PatternError, "Moon"),
        ({"rpc": ("127.0.0.1:1",)}, BackendError, "127.0.0.1:1"),
        ({"rpc": ("nonsense",)}, BackendError, "host:port"),
    ],
)
def test_what_a_plan_cannot_say(
    smollm2_path: Path, change: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told) as caught:
        Engine(Plan(**{"model": str(smollm2_path), **change}))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        Engine(Plan(model=str(tmp_path / "absent.gguf")))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(LoadError, match=r"bad\.gguf") as caught:
        Engine(Plan(model=str(bad)))
    assert "\n" not in str(caught.value)


def test_closing_frees_and_may_be_repeated(tiny_path: Path) -> None:
    engine = Engine(Plan(model=str(tiny_path), settings=Settings(n_ctx=256, threads=1)))
    engine.close()
    engine.close()
    with pytest.raises(GenerationError, match="closed"):
        list(engine.complete("x"))


SCHEMA = {"type": "object", "properties": {"count": {"enum": [7, 42]}}, "required": ["count"]}
ASK = [{"role": "user", "content": "Give me a number."}]


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_object", "schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "number", "schema": SCHEMA}},
    ],
)
def test_response_format_is_that_of_the_bindings(
    engine: Engine, smollm2_path: Path, response_format: dict[str, Any]
) -> None:
    """OpenAI's "json_schema" too, which the bindings do not know and pass over."""
    reference = stock(smollm2_path)
    expected = reference.create_chat_completion(
        ASK, temperature=0.0, max_tokens=24, response_format={"type": "json_object", "schema": SCHEMA}
    )
    reference.close()
    text = "".join(p.text for p in engine.chat(ASK, GREEDY, response_format=response_format))
    assert text == expected["choices"][0]["message"]["content"]
    assert json.loads(text)["count"] in (7, 42)


def test_tool_calls(engine: Engine) -> None:
    tools = [{"type": "function", "function": {"name": "count", "description": "", "parameters": SCHEMA}}]
    choice = {"type": "function", "function": {"name": "count"}}
    pieces = list(engine.chat(ASK, GREEDY, tools=tools, tool_choice=choice))
    calls = [p.delta["tool_calls"][0]["function"] for p in pieces if p.delta and p.delta.get("tool_calls")]
    assert {call["name"] for call in calls} == {"count"}
    assert json.loads("".join(call["arguments"] for call in calls))["count"] in (7, 42)


@pytest.mark.parametrize(
    ("messages", "options", "told"),
    [
        (ASK, {"response_format": {"type": "xml"}}, "'xml'"),
        (ASK, {"response_format": {"type": "json_schema"}}, "needs json_schema.schema"),
        (ASK, {"response_format": {"type": "json_object", "schema": {"type": "bogus"}}}, "JSON schema"),
        (ASK, {"tools": [], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "'g' not found"),
        ([{"role": "user"}], {}, "content"),
    ],
)
def test_requests_that_make_no_sense(
    engine: Engine, messages: list[dict[str, Any]], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        list(engine.chat(messages, GREEDY, **options))


def test_a_context_that_llama_cpp_rounds_up(smollm2_path: Path) -> None:
    """300 cells become 512; a prompt between the two fits."""
    with Engine(Plan(model=str(smollm2_path), settings=Settings(n_ctx=300, threads=2))) as engine:
        assert engine.n_ctx == 512
        assert list(engine.complete("word " * 400, Sampling(temperature=0, max_tokens=2)))
        assert engine.stats.prompt_tokens > 300


def test_closing_while_it_computes(smollm2_path: Path) -> None:
    """From another thread, in the middle of a prompt that takes many seconds: it waits, and nothing crashes."""
    settings = Settings(n_ctx=8192, n_batch=4096, n_ubatch=4096, threads=2)
    engine = Engine(Plan(model=str(smollm2_path), settings=settings))
    timer = threading.Timer(0.5, engine.close)
    timer.start()
    with pytest.raises(Cancelled):
        list(engine.complete("one two three four five " * 1300, GREEDY))
    timer.join()
    assert engine._llama.ctx is None


def test_closing_under_a_request_that_waits(tiny_path: Path) -> None:
    engine = Engine(Plan(model=str(tiny_path), settings=Settings(n_ctx=256, threads=1)))
    pieces = engine.complete("x", Sampling(max_tokens=-1))
    next(pieces)
    engine.close()
    with pytest.raises(Cancelled):
        next(pieces)


def test_an_error_of_the_progress_callback_comes_through(smollm2_path: Path) -> None:
    def progress(fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine(Plan(model=str(smollm2_path), settings=Settings(load_mode="none")), progress=progress)


def test_an_interrupted_step_leaves_no_stale_logits(engine: Engine) -> None:
    """Ctrl-C arrives after llama.cpp has computed the token after the prompt; the same prompt again must not be
    continued from those logits."""
    short = Sampling(temperature=0, max_tokens=3)
    prompt = "The capital of France is the city of"
    expected = "".join(p.text for p in engine.complete(prompt, short))
    engine._llama.reset()
    list(engine.complete(prompt, Sampling(temperature=0, max_tokens=1)))
    decode = engine._llama._ctx.decode

    def interrupted(batch: Any) -> None:
        decode(batch)
        if batch.n_tokens() == 1:
            raise KeyboardInterrupt

    engine._llama.reset()
    engine._llama._ctx.decode = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            list(engine.complete(prompt, short))
    finally:
        del engine._llama._ctx.decode
    assert "".join(p.text for p in engine.complete(prompt, short)) == expected
