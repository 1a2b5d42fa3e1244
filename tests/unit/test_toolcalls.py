"""Calls of tools in streamed text. The examples are those of the models' own documentation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensortier.toolcalls import CallFinder, ForcedCall, Parser, Style, style_of

NAMES = ("get_weather", "add")


def run(parser: Parser, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls, put together as OpenAI's client does."""
    text = ""
    calls: dict[int, dict[str, str]] = {}
    found = [piece for part in pieces for piece in parser.feed(part)] + parser.finish()
    for piece in found:
        text += piece.text
        for call in (piece.delta or {}).get("tool_calls", ()):
            known = calls.setdefault(call["index"], {"name": "", "arguments": ""})
            if "id" in call:
                assert call["type"] == "function" and not known["name"]
                known["name"] = call["function"]["name"]
            known["arguments"] += call["function"]["arguments"]
    assert sorted(calls) == list(range(len(calls)))
    assert parser.called == bool(calls)
    return text, [(c["name"], json.loads(c["arguments"] or "{}")) for _, c in sorted(calls.items())]


PARIS = {"city": "Paris"}
EXAMPLES = [
    # Hermes 2 Pro, Qwen 2.5: one call, two, behind text
    (
        Style.HERMES,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        1,
    ),
    (
        Style.HERMES,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        2,
    ),
    (
        Style.HERMES,
        'I look <it> up.\n<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>',
        "I look <it> up.\n",
        1,
    ),
    # an end of text where the closing tag should be
    (Style.HERMES, '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}', "", 1),
    # Llama 3.1: bare, and behind its tag
    (Style.LLAMA3, '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", 1),
    (Style.LLAMA3, '\n{"name": "get_weather", "parameters": {"city": "Paris"}}', "", 1),
    (Style.LLAMA3, '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', "", 1),
    # Mistral: v3 list, v11 name and arguments
    (Style.MISTRAL, '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", 1),
    (
        Style.MISTRAL,
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "get_weather", "arguments": {"city": "Paris"}}]',
        "",
        2,
    ),
    (Style.MISTRAL, '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', "", 1),
    (
        Style.MISTRAL,
        '[TOOL_CALLS]get_weather[CALL_ID]abc[ARGS]{"city": "Paris"}[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}',
        "",
        2,
    ),
]


@pytest.mark.parametrize(("style", "answer", "text", "calls"), EXAMPLES)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_examples(style: Style, answer: str, text: str, calls: int, size: int) -> None:
    pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
    assert run(CallFinder(style, NAMES), pieces) == (text, [("get_weather", PARIS)] * calls)


NO_CALLS = [
    (Style.HERMES, "<tool_call>\nnot json\n</tool_call> and more"),
    (Style.HERMES, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),  # nobody offered that
    (Style.HERMES, "a < b <tool"),
    (Style.LLAMA3, '{"city": "Paris"}'),
    (Style.LLAMA3, "{ this is a set }"),
    (Style.LLAMA3, 'Use {"name": "add", "parameters": {}} for that'),
    (Style.MISTRAL, "[1, 2, 3] [TOOL"),
    (Style.MISTRAL, '[TOOL_CALLS][{"name": "rm", "arguments": {}}]'),
]


@pytest.mark.parametrize(("style", "answer"), NO_CALLS)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_what_is_no_call_is_text(style: Style, answer: str, size: int) -> None:
    pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
    assert run(CallFinder(style, NAMES), pieces) == (answer, [])


@given(st.sampled_from(Style), st.text(max_size=40), st.lists(st.integers(1, 7), max_size=10))
def test_plain_text_passes_as_it_is(style: Style, text: str, sizes: list[int]) -> None:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(text[start : start + size])
        start += size
    assert run(CallFinder(style, NAMES), [*pieces, text[start:]]) == (text, [])


def test_text_is_not_held_back_longer_than_needed() -> None:
    finder = CallFinder(Style.HERMES, NAMES)
    assert [piece.text for piece in finder.feed("Hello <b>")] == ["Hello <b>"]
    assert [piece.text for piece in finder.feed(" <tool")] == [" "]
    assert [piece.text for piece in finder.feed("box>")] == ["<toolbox>"]


def test_a_forced_call_streams_its_arguments() -> None:
    parser = ForcedCall("add")
    deltas = [piece.delta for part in ('{"a"', ": 1}") for piece in parser.feed(part)]
    assert [delta["tool_calls"][0]["function"]["arguments"] for delta in deltas if delta] == ['{"a"', ": 1}"]
    assert parser.finish() == []
    assert run(ForcedCall("add"), ['{"a"', ": 1}"]) == ("", [("add", {"a": 1})])
    assert run(ForcedCall("add"), []) == ("", [("add", {})])


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{%- if tools %}...<tools>...<tool_call>{{ tool_call.name }}", Style.HERMES),
        ("[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS][TOOL_CALLS]", Style.MISTRAL),
        ('{%- if builtin_tools %}<|python_tag|>{"name": function name, "parameters": ...}', Style.LLAMA3),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", None),
    ],
)
def test_the_template_tells_the_style(template: str, style: Style | None) -> None:
    assert style_of(template) is style
