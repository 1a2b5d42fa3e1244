"""From a chat request to what the engine computes: the prompt's text, the grammar that binds the answer, and who
takes the answer apart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tensortier import toolcalls
from tensortier.errors import LoadError, UsageError

_TOOLS_PROMPT = """\
You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""  # for models whose template knows no tools; the format is Hermes'
_CHATML_END = "<|im_end|>"
_MOST_REPEATS = 2000  # in a grammar, as llama.cpp has it
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_REPEATED = re.compile(r"(?:\{|,)\s*([0-9]{1,400})")  # numbers in {n}, {n,} and {n,m} of a pattern


@dataclass(frozen=True)
class ChatPrompt:
    """``grammar`` is GBNF; ``parser`` makes what takes the answer's text apart, None where it is just text."""

    text: str
    stops: tuple[str, ...]
    grammar: str | None = None
    parser: Callable[[], toolcalls.Parser] | None = None


class ChatTemplate:
    """A model's chat template.

    Args:
        template: Jinja2, as the file has it; None: the model has none, and ChatML is used, as llama.cpp's
            server does.
        tool_template: the one for requests with tools, where the file has a second.
        bos, eos: the texts of those tokens.

    Raises:
        LoadError: the template is not valid.
    """

    def __init__(self, template: str | None, tool_template: str | None, bos: str, eos: str) -> None:
        from jinja2 import TemplateError
        from llama_cpp.llama_chat_format import CHATML_CHAT_TEMPLATE, Jinja2ChatFormatter

        self._stops = tuple(filter(None, (eos,) if template else (eos, _CHATML_END)))
        template = template or CHATML_CHAT_TEMPLATE
        self._text = tool_template or template
        try:
            self._plain, self._tools = (
                Jinja2ChatFormatter(text, eos_token=eos, bos_token=bos)
                for text in (template, tool_template or template)
            )
        except TemplateError as exc:
            raise LoadError(f"the model's chat template is not valid: {exc}") from exc

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Any = None,
        response_format: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """The prompt of a conversation in OpenAI's format.

        ``tool_choice``: "auto" (None, with tools), "none", "required", or {"type": "function", "function": {"name"}}.

        Raises:
            UsageError: the messages, the tools or the format cannot be used.
        """
        offered = _functions(tools or ())
        choice, name = _choice(tool_choice, offered)
        grammar = None if response_format is None else response_grammar(response_format)
        if choice == "none":
            offered = {}
        if grammar is not None and choice in ("required", "function"):
            raise UsageError("a response_format and a tool_choice that asks for a call exclude each other")
        style = toolcalls.style_of(self._text)
        known = [_message(message) for message in messages]
        if offered and style is None:
            known = _with_tools_prompt(known, tools or ())
        text = self._render(known, list(tools or ()) if offered and style is not None else None, tool_choice)
        style = style or toolcalls.Style.HERMES
        if choice == "function":
            text += toolcalls.wrapping(style, name).before
            return ChatPrompt(
                text,
                self._stops,
                schema_grammar(offered[name], f"parameters of {name}"),
                lambda: toolcalls.ForcedCall(name),
            )
        if choice == "required":
            grammar = _call_grammar(style, offered)
        if not offered or (grammar is not None and choice == "auto"):
            return ChatPrompt(text, self._stops, grammar)
        return ChatPrompt(text, self._stops, grammar, lambda: toolcalls.CallFinder(style, offered))

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Mapping[str, Any]] | None, tool_choice: Any
    ) -> str:
        """Templates raise errors of their own, and look up and index what they were given unchecked."""
        from jinja2 import TemplateError

        formatter = self._tools if tools else self._plain
        try:
            text = formatter(
                messages=messages, tools=tools, tool_choice=tool_choice if tools else None
            ).prompt
        except (TemplateError, ValueError, LookupError, TypeError, AttributeError) as exc:
            raise UsageError(f"this request cannot be used: {exc!s:.200}") from exc
        return str(text)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's message as templates know it: content is one text, calls' arguments are objects, "developer" is
    "system"."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise UsageError('a message is an object with "role" and "content"')
    found = dict(message)
    if found["role"] == "developer":
        found["role"] = "system"
    content = found.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        found["content"] = "".join(_part(part) for part in content)
    calls = found.get("tool_calls")
    if calls:
        found["tool_calls"] = [_tool_call(call) for call in calls]
        found["content"] = found.get("content") or ""
    return found


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise UsageError(f"this model reads text only: a part of a message is {kind!r}")


def _tool_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise UsageError("a message's tool_calls are objects with function.name and function.arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(
            ValueError, RecursionError
        ):  # what a model wrote may be no JSON: the template gets the text
            arguments = json.loads(arguments) if arguments.strip() else {}
    return {**call, "function": {**function, "arguments": arguments}}


# --- tools


def _functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> JSON schema of the arguments."""
    found: dict[str, dict[str, Any]] = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UsageError('a tool is {"type": "function", "function": {"name", "parameters"}}')
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, Mapping):
            raise UsageError(f"the parameters of the tool {function['name']!r} are no JSON schema")
        found[function["name"]] = dict(parameters)
    return found


def _choice(tool_choice: Any, offered: Mapping[str, Any]) -> tuple[str, str]:
    """("none" | "auto" | "required", "") or ("function", its name)."""
    if isinstance(tool_choice, Mapping):
        function = tool_choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else tool_choice.get("name")
        if not isinstance(name, str) or name not in offered:
            raise UsageError(f"tool choice {name!r} not found in tools")
        return "function", name
    if tool_choice in (None, "auto"):
        return ("auto" if offered else "none"), ""
    if tool_choice == "none":
        return "none", ""
    if tool_choice == "required":
        if not offered:
            raise UsageError('tool_choice is "required", but there are no tools')
        return "required", ""
    raise UsageError(f'tool_choice is "none", "auto", "required" or a function, not {tool_choice!r:.60}')


def _with_tools_prompt(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    text = _TOOLS_PROMPT.format(tools="\n".join(json.dumps(tool) for tool in tools))
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0].get('content') or ''}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _call_grammar(style: toolcalls.Style, offered: Mapping[str, dict[str, Any]]) -> str:
    """Of one call of any of the functions."""
    converter = _converter()
    calls = []
    for number, (name, schema) in enumerate(offered.items()):
        around = toolcalls.wrapping(style, name)
        rule = _rule(converter, schema, f"arguments-{number}", f"parameters of {name}")
        calls.append(f"{_literal(around.before)} {rule} {_literal(around.after)}")
    grammar: str = converter.format_grammar()
    return f"{grammar}\nroot ::= {' | '.join(calls)}"


# --- grammars


def response_grammar(response_format: Mapping[str, Any]) -> str | None:
    """The grammar of OpenAI's ``response_format``: {"type": "text"}, {"type": "json_object"} with or without
    "schema", or {"type": "json_schema"}. Raises UsageError."""
    from llama_cpp.llama_grammar import JSON_GBNF

    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_schema":
        schema = (response_format.get("json_schema") or {}).get("schema")
        if schema is None:
            raise UsageError('response_format "json_schema" needs json_schema.schema')
    elif kind == "json_object":
        schema = response_format.get("schema")
    else:
        raise UsageError(f'response_format is "text", "json_object" or "json_schema", not {kind!r}')
    return str(JSON_GBNF) if schema is None else schema_grammar(schema, "JSON schema of response_format")


def schema_grammar(schema: Any, what: str) -> str:
    """GBNF of the texts that a JSON schema describes. UsageError, naming it as ``what``."""
    converter = _converter()
    rule = _rule(converter, schema, "", what)
    grammar: str = converter.format_grammar()
    return grammar if rule == "root" else f"{grammar}\nroot ::= {rule}"


def _converter() -> Any:
    from llama_cpp.llama_grammar import SchemaConverter

    return SchemaConverter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)


def _rule(converter: Any, schema: Any, name: str, what: str) -> str:
    """The name of the rule for a schema, which the converter has then."""
    _check_repeats(schema, what)
    try:
        copied = json.loads(json.dumps(schema))  # the converter writes into what it is given
        rule: str = converter.visit(converter.resolve_refs(copied, name or "stdin"), name)
    except Exception as exc:  # the translator asserts, looks up and casts what it was given
        raise UsageError(f"the {what} cannot be used: {exc or type(exc).__name__}") from exc
    return rule


def _check_repeats(schema: Any, what: str) -> None:
    """UsageError for lengths that the translator would write out: a billion characters take all memory."""
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        if not isinstance(part, Mapping):
            continue
        for key, value in part.items():
            most = value if key in _COUNTS and isinstance(value, (int, float)) else 0
            if key == "pattern" and isinstance(value, str):
                most = max((int(number) for number in _REPEATED.findall(value)), default=0)
            if most > _MOST_REPEATS:
                raise UsageError(
                    f"the {what} cannot be used: {key} asks for {most!s:.20}, at most {_MOST_REPEATS} can be"
                )
            if key not in ("enum", "const", "default", "examples"):
                parts.append(value)


def _literal(text: str) -> str:
    """A text as GBNF writes it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'
