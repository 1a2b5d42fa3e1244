"""The engine against ``llama_cpp.Llama`` itself: same tokens, same probabilities; and its own manners."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from tensortier import memory
from tensortier.engine import Engine, Request
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
from tensortier.types import Override, Piece, Placement, Plan, Sampling, Settings
from tests.engine_moments import ENDLESS, Batches, Heard, Operations, together, wait_until

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


def text_of(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def logprobs(llama: Any, tokens: list[int]) -> np.ndarray:
    """After the last token, of the whole vocabulary."""
    llama.reset()
    llama.eval(tokens)
    values = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),))
    values = values.astype(np.float64)
    return values - values.max() - np.log(np.exp(values - values.max()).sum())


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Iterator[Engine]:
    with Engine(Plan(model=str(smollm2_path), settings=SETTINGS)) as engine:
        yield engine


@pytest.mark.parametrize("fixture", ["smollm2_path", "moe_path"])
def test_same_tokens_and_logprobs_as_the_bindings(fixture: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(fixture)
    reference = stock(path)
    with Engine(Plan(model=str(path), settings=SETTINGS)) as engine:
        for prompt in PROMPTS:
            tokens = engine.tokenize(prompt)
            assert tokens == reference.tokenize(prompt.encode(), add_bos=False)
            expected = logprobs(reference, tokens)
            reference.reset()
            answer = reference.create_completion(prompt, max_tokens=24, temperature=0.0)
            ours = engine.complete(prompt, replace(GREEDY, logprobs=5))
            pieces = list(ours)
            assert text_of(pieces) == answer["choices"][0]["text"]
            assert ours.stats.prompt_tokens == answer["usage"]["prompt_tokens"]
            assert ours.stats.completion_tokens == answer["usage"]["completion_tokens"]
            found = [entry for piece in pieces for entry in piece.logprobs]
            assert len(found) == ours.stats.completion_tokens
            assert b"".join(entry.token_bytes for entry in found).decode() == text_of(pieces)
            first = found[0]
            assert first.logprob == pytest.approx(expected[first.token_id], abs=1e-6)
            best = np.argsort(-expected, kind="stable")[:5]
            assert [token for token, _, _ in first.top] == best.tolist()
            assert [value for _, _, value in first.top] == pytest.approx(expected[best], abs=1e-6)
    reference.close()


def test_chat_is_that_of_the_bindings(engine: Engine, smollm2_path: Path) -> None:
    messages = [{"role": "user", "content": "Name three colours."}]
    reference = stock(smollm2_path)
    expected = reference.create_chat_completion(messages, temperature=0.0, max_tokens=24)
    reference.close()
    ours = engine.chat(messages, GREEDY)
    pieces = list(ours)
    assert text_of(pieces) == expected["choices"][0]["message"]["content"]
    assert pieces[-1].finish_reason == expected["choices"][0]["finish_reason"]
    assert ours.stats.finish_reason == expected["choices"][0]["finish_reason"]
    assert ours.stats.completion_tokens == expected["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.9, "seed": 7},
        {"temperature": 1.3, "seed": 1 << 31, "top_k": 0, "top_p": 0.7, "min_p": 0.0, "typical_p": 0.9},
        {"temperature": 0.0, "repeat_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
        {"temperature": 0.0, "stop": (" and", "xyz")},
    ],
)
def test_same_choices_as_the_bindings(engine: Engine, smollm2_path: Path, options: dict[str, Any]) -> None:
    """The same samplers in the same order, from the same seed."""
    reference = stock(smollm2_path)
    theirs = {**options, "stop": list(options.get("stop", ()))}
    expected = reference.create_completion(PROMPTS[0], max_tokens=40, **theirs)
    reference.close()
    request = engine.complete(PROMPTS[0], Sampling(max_tokens=40, **options))
    assert text_of(request) == expected["choices"][0]["text"]
    assert request.stats.finish_reason == expected["choices"][0]["finish_reason"]


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
    second = engine.chat(messages, GREEDY)
    list(second)
    # all of the first turn but what the template writes differently behind the answer
    assert 30 < second.stats.cached_tokens < second.stats.prompt_tokens


def test_stop_and_grammar(engine: Engine) -> None:
    text = "".join(
        p.text for p in engine.complete("1 2 3 4 5 6", Sampling(temperature=0, max_tokens=20, stop=("9",)))
    )
    assert "9" not in text
    yes_no = Sampling(temperature=0, max_tokens=4, grammar='root ::= "yes" | "no"')
    assert "".join(p.text for p in engine.complete("Is water wet?", yes_no)) in ("yes", "no")


@pytest.mark.parametrize("grammar", ["root ::= (((", "", "x ::= [a-z]", 'root ::= "\0"', "root ::= root"])
def test_a_bad_grammar_does_not_end_the_process(engine: Engine, grammar: str) -> None:
    with pytest.raises(UsageError, match="grammar is not valid GBNF"):
        engine.complete("x", Sampling(grammar=grammar))
    assert list(engine.complete("Hello", Sampling(max_tokens=1)))


def test_cancel_in_a_long_prompt_and_go_on(smollm2_path: Path) -> None:
    """In the middle of a micro-batch that takes many seconds, most of which is not computed."""
    settings = Settings(n_ctx=8192, n_batch=4096, n_ubatch=4096, threads=2)
    with Engine(Plan(model=str(smollm2_path), settings=settings)) as engine:
        before = text_of(engine.complete("The sun is", GREEDY))
        operations = Operations(engine)
        with together(engine):
            request = engine.complete("one two three four five " * 1300, GREEDY)
            operations.limit, operations.then = 60, request.cancel
        with pytest.raises(Cancelled):
            list(request)
        assert 60 <= operations.asked < 70
        assert request.stats.completion_tokens == 0
        assert request.stats.prompt_tokens > 6000
        again = engine.complete("The sun is", GREEDY)
        assert text_of(again) == before


def test_cancel_between_tokens_keeps_what_there_was(engine: Engine) -> None:
    with together(engine):
        request = engine.complete("Once upon a time", Sampling(temperature=0, max_tokens=400))

        def cancel() -> None:
            request.cancel()
            request.cancel()

        heard = Heard(request, {5: cancel})
    with pytest.raises(Cancelled):
        heard.wait()
    # each token of this text is a piece
    assert len(heard.pieces) == request.stats.completion_tokens == 5
    assert text_of(engine.complete("Once upon a time", Sampling(temperature=0, max_tokens=5)))


def test_cancel_while_somebody_iterates(engine: Engine) -> None:
    """The engine may be ahead of its reader: what it has computed is still read."""
    got: list[str] = []
    request = engine.complete("Once upon a time", Sampling(temperature=0, max_tokens=-1, grammar=ENDLESS))
    with pytest.raises(Cancelled):
        for piece in request:
            got.append(piece.text)
            if len(got) == 5:
                request.cancel()
    assert 5 <= len(got) < 500


def test_cancel_before_the_first_piece_is_not_lost(engine: Engine) -> None:
    for cancel in (Request.cancel, lambda _: engine.cancel()):
        request = engine.complete("Once upon a time", Sampling(temperature=0, max_tokens=400))
        cancel(request)
        with pytest.raises(Cancelled):
            list(request)
        assert list(request) == []  # it has ended


def test_cancel_without_a_request_does_nothing(engine: Engine) -> None:
    engine.cancel()
    assert list(engine.complete("Hello", Sampling(temperature=0, max_tokens=2)))


def test_a_dropped_request_is_cancelled(engine: Engine) -> None:
    before = engine.activity().completion_tokens_total
    engine.complete("Once upon a time", Sampling(temperature=0, max_tokens=-1, grammar=ENDLESS))
    wait_until(lambda: (now := engine.activity()).active + now.waiting == 0)
    assert engine.activity().completion_tokens_total - before < 500  # not to the end of the context


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


def test_the_second_request_waits_for_the_first(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [text_of(engine.complete(prompt, GREEDY)) for prompt in PROMPTS]
    seen: list[tuple[int, int]] = []  # active, waiting

    def look(_: int) -> None:
        now = engine.activity()
        seen.append((now.active, now.waiting))

    Batches(monkeypatch, look)
    with together(engine):
        requests = [engine.complete(prompt, GREEDY) for prompt in PROMPTS]
    assert [text_of(request) for request in reversed(requests)] == expected[::-1]
    assert list(dict.fromkeys(seen)) == [(1, 2), (1, 1), (1, 0)]


def test_a_prompt_longer_than_the_context(engine: Engine) -> None:
    with pytest.raises(ContextFull, match="context of 512"):
        engine.complete("word " * 600)


def test_an_answer_ends_where_the_context_does(engine: Engine, smollm2_path: Path) -> None:
    prompt = "word " * 490
    reference = stock(smollm2_path)
    expected = reference.create_completion(prompt, max_tokens=None, temperature=0.0)
    reference.close()
    request = engine.complete(prompt, Sampling(temperature=0))
    assert text_of(request) == expected["choices"][0]["text"]
    assert request.stats.finish_reason == expected["choices"][0]["finish_reason"] == "length"
    assert request.stats.prompt_tokens + request.stats.completion_tokens == 512


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"settings": Settings(type_k="q9_9")}, PlanError, "q9_9"),
        ({"settings": Settings(load_mode="teleport")}, PlanError, "teleport"),
        ({"settings": Settings(n_ubatch=0)}, PlanError, "n_ubatch"),
        ({"settings": Settings(n_ctx=1 << 40)}, PlanError, "n_ctx"),
        ({"settings": Settings(n_seq_max=300)}, PlanError, "n_seq_max"),
        ({"settings": Settings(n_seq_max=64, n_batch=32)}, PlanError, "n_seq_max"),
        ({"settings": Settings(type_v="q8_0", flash_attention="off")}, LoadError, "flash"),
        ({"placement": Placement(devices=("CUDA7",), n_gpu_layers=-1)}, BackendError, "CUDA7"),
        ({"placement": Placement(overrides=(Override("x", "Moon"),))}, PatternError, "Moon"),
        ({"placement": Placement(overrides=(Override("(", "CPU"),))}, PatternError, "regular expression"),
        ({"placement": Placement(n_gpu_layers=-7)}, PlanError, "-7"),
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


TOOLS = [
    {"type": "function", "function": {"name": "count", "description": "Counts.", "parameters": SCHEMA}},
    {
        "type": "function",
        "function": {
            "name": "say",
            "parameters": {
                "type": "object",
                "properties": {"word": {"$ref": "#/$defs/word"}},
                "required": ["word"],
                "$defs": {"word": {"enum": ["yes", "no"]}},
            },
        },
    },
]


def calls_of(pieces: list[Piece]) -> list[tuple[str, Any]]:
    """Put together as OpenAI's client does it."""
    calls: dict[int, list[str]] = {}
    for piece in pieces:
        for call in (piece.delta or {}).get("tool_calls", ()):
            known = calls.setdefault(call["index"], ["", ""])
            known[0] += call["function"].get("name", "")
            known[1] += call["function"]["arguments"]
    return [(name, json.loads(arguments)) for name, arguments in calls.values()]


@pytest.mark.parametrize(
    ("choice", "names"),
    [({"type": "function", "function": {"name": name}}, {name}) for name in ("count", "say")]
    + [("required", {"count", "say"})],
)
def test_tool_calls(engine: Engine, choice: Any, names: set[str]) -> None:
    pieces = list(engine.chat(ASK, replace(GREEDY, max_tokens=60), tools=TOOLS, tool_choice=choice))
    ((name, arguments),) = calls_of(pieces)
    assert name in names
    assert arguments in (
        [{"count": 7}, {"count": 42}] if name == "count" else [{"word": "yes"}, {"word": "no"}]
    )
    assert pieces[-1].finish_reason == "tool_calls"
    assert not any(piece.text for piece in pieces)


def test_tools_that_the_model_need_not_call(engine: Engine) -> None:
    """The prompt tells of them; an answer without a call is text."""
    request = engine.chat(ASK, GREEDY, tools=TOOLS)
    pieces = list(request)
    assert calls_of(pieces) or text_of(pieces)
    told = engine.chat(ASK, GREEDY, tools=TOOLS, tool_choice="none")
    assert text_of(told) == text_of(engine.chat(ASK, GREEDY))
    assert request.stats.prompt_tokens > told.stats.prompt_tokens + 50


def test_a_conversation_with_a_call_goes_on(engine: Engine) -> None:
    """OpenAI's messages: no content beside calls, arguments as text, parts of text, the role of developers."""
    call = {"id": "c1", "type": "function", "function": {"name": "count", "arguments": '{"count": 7}'}}
    messages = [
        {"role": "developer", "content": "Be short."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Give me"}, {"type": "text", "text": " a number."}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
    ]
    assert list(engine.chat(messages, GREEDY, tools=TOOLS))
    plain = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Give me a number."}]
    assert text_of(engine.chat(messages[:2], GREEDY)) == text_of(engine.chat(plain, GREEDY))


@pytest.mark.parametrize(
    ("messages", "options", "told"),
    [
        (ASK, {"response_format": {"type": "xml"}}, "'xml'"),
        (ASK, {"response_format": {"type": "json_schema"}}, "needs json_schema.schema"),
        (ASK, {"response_format": {"type": "json_object", "schema": {"type": "bogus"}}}, "JSON schema"),
        (ASK, {"tools": [], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "'g' not found"),
        (ASK, {"tool_choice": "required"}, "no tools"),
        (ASK, {"tools": TOOLS, "tool_choice": "maybe"}, "'maybe'"),
        (ASK, {"tools": [{"name": "count"}]}, "a tool is"),
        (
            ASK,
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "exclude",
        ),
        ([{"role": "user"}], {}, "content"),
        ([{"content": "x"}], {}, "role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], {}, "image_url"),
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
        request = engine.complete("word " * 400, Sampling(temperature=0, max_tokens=2))
        assert list(request)
        assert request.stats.prompt_tokens > 300


def test_closing_while_it_computes(smollm2_path: Path) -> None:
    """From another thread, in the middle of a prompt that takes many seconds: it waits, and nothing crashes."""
    settings = Settings(n_ctx=8192, n_batch=4096, n_ubatch=4096, threads=2)
    engine = Engine(Plan(model=str(smollm2_path), settings=settings))
    closing = threading.Thread(target=engine.close)
    operations = Operations(engine)

    def close() -> None:
        closing.start()
        wait_until(lambda: engine._scheduler._closing)

    with together(engine):
        request = engine.complete("one two three four five " * 1300, GREEDY)
        operations.limit, operations.then = 60, close
    with pytest.raises(Cancelled):
        list(request)
    closing.join()
    assert 60 <= operations.asked < 70
    assert engine._loaded.context is None
    assert not engine._scheduler._thread.is_alive()


def test_closing_under_a_request_that_waits(tiny_path: Path) -> None:
    engine = Engine(Plan(model=str(tiny_path), settings=Settings(n_ctx=8192, threads=1)))
    pieces = engine.complete("x", Sampling(temperature=0, max_tokens=-1, grammar=ENDLESS))
    next(pieces)
    engine.close()
    with pytest.raises(Cancelled):
        list(pieces)


def test_an_error_of_the_progress_callback_comes_through(smollm2_path: Path) -> None:
    def progress(fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine(Plan(model=str(smollm2_path), settings=Settings(load_mode="none")), progress=progress)
