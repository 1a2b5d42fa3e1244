"""Prompts of conversations, against llama.cpp's own rendering of the templates it knows by heart."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import llama_cpp
import pytest
from llama_cpp import llama_chat_format

from tensortier.errors import LoadError, UsageError
from tensortier.prompts import ChatTemplate, response_grammar
from tensortier.toolcalls import CallFinder, ForcedCall

CONVERSATIONS = [
    [("user", "Hello")],
    [("system", "Be short."), ("user", "Hello")],
    [("user", "Hello"), ("assistant", "Hi!"), ("user", "Zwei Wörter: {{ x }} <b>")],
]
TEMPLATES = {
    "chatml": (llama_chat_format.CHATML_CHAT_TEMPLATE, "", "<|im_end|>"),
    "llama3": (llama_chat_format.LLAMA3_INSTRUCT_CHAT_TEMPLATE, "<|begin_of_text|>", "<|eot_id|>"),
}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


def by_llama_cpp(template: str, conversation: list[tuple[str, str]]) -> str:
    count = len(conversation)
    messages = (llama_cpp.llama_chat_message * count)(
        *(llama_cpp.llama_chat_message(role=r.encode(), content=c.encode()) for r, c in conversation)
    )
    buffer = ctypes.create_string_buffer(4096)
    size = llama_cpp.llama_chat_apply_template(template.encode(), messages, count, True, buffer, len(buffer))
    assert 0 < size < len(buffer)
    return buffer.raw[:size].decode()


def messages(conversation: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in conversation]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_known_templates(name: str, conversation: list[tuple[str, str]]) -> None:
    template, bos, eos = TEMPLATES[name]
    prompt = ChatTemplate(template, None, bos, eos).prompt(messages(conversation))
    assert prompt.text.removeprefix(bos) == by_llama_cpp(template, conversation)
    assert prompt.stops == (eos,)
    assert prompt.grammar is None and prompt.parser is None


def test_a_model_without_a_template() -> None:
    """ChatML, as in llama.cpp's server."""
    prompt = ChatTemplate(None, None, "<s>", "</s>").prompt(messages(CONVERSATIONS[0]))
    assert prompt.text == by_llama_cpp("chatml", CONVERSATIONS[0])
    assert prompt.stops == ("</s>", "<|im_end|>")


SIMPLE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
HERMES = "{% if tools %}<tools>{{ tools | tojson }}</tools><tool_call>{% endif %}" + SIMPLE


def test_tools_in_the_template_and_beside_it() -> None:
    ask = messages(CONVERSATIONS[1])
    own = ChatTemplate(HERMES, None, "", "").prompt(ask, tools=[TOOL])
    assert own.text.startswith(f"<tools>{json.dumps([TOOL])}</tools>")
    added = ChatTemplate(SIMPLE, None, "", "").prompt(ask, tools=[TOOL])
    assert added.text.startswith("system: Be short.\n\nYou may call")
    assert json.dumps(TOOL) in added.text
    special = ChatTemplate(SIMPLE, HERMES, "", "")
    assert special.prompt(ask, tools=[TOOL]).text == own.text
    assert special.prompt(ask).text == special.prompt(ask, tools=[TOOL], tool_choice="none").text
    assert "<tools>" not in special.prompt(ask).text
    for prompt in (own, added):
        assert prompt.grammar is None
        assert prompt.parser is not None and isinstance(prompt.parser(), CallFinder)


def test_a_forced_call_begins_in_the_prompt() -> None:
    choice = {"type": "function", "function": {"name": "add"}}
    prompt = ChatTemplate(HERMES, None, "", "").prompt(
        messages(CONVERSATIONS[0]), tools=[TOOL], tool_choice=choice
    )
    assert prompt.text.endswith('<tool_call>\n{"name": "add", "arguments": ')
    assert prompt.grammar is not None
    assert prompt.parser is not None and isinstance(prompt.parser(), ForcedCall)


def test_arguments_are_objects_for_the_template() -> None:
    call = "{{ c.function.arguments | tojson }}"
    template = "{% for m in messages %}{% for c in m.tool_calls %}" + call + "{% endfor %}{% endfor %}"
    made = ChatTemplate(template, None, "", "")
    for given, shown in (('{"a": 1}', '{"a": 1}'), ("", "{}"), ("a=1", '"a=1"'), ({"a": 1}, '{"a": 1}')):
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": given}}
        assert made.prompt([{"role": "assistant", "tool_calls": [call]}]).text == shown


@pytest.mark.parametrize("template", ["{% if %}", "{{ x | nofilter }}", "{% for m in messages %}"])
def test_templates_that_are_not_valid(template: str) -> None:
    with pytest.raises(LoadError, match="chat template is not valid"):
        ChatTemplate(template, None, "", "")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ none.x() }}",
    ],
)
def test_templates_that_refuse(template: str) -> None:
    with pytest.raises(UsageError, match="this request cannot be used"):
        ChatTemplate(template, None, "", "").prompt(messages(CONVERSATIONS[0]))


def test_schemas_are_not_changed_and_not_fetched() -> None:
    schema = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}
    before = json.dumps(schema)
    grammar = response_grammar({"type": "json_schema", "json_schema": {"schema": schema}})
    assert grammar is not None and "root ::=" in grammar
    assert json.dumps(schema) == before
    with pytest.raises(UsageError, match="JSON schema"):
        response_grammar({"type": "json_object", "schema": {"$ref": "https://example.org/x.json"}})
    deep: dict[str, Any] = {}
    for _ in range(3000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(UsageError, match="JSON schema"):
        response_grammar({"type": "json_object", "schema": deep})
    assert response_grammar({"type": "text"}) is None
