"""What requests may say: OpenAI's fields, and a few of llama.cpp's for sampling.

A field that is not known is refused, as it may have been meant to change the answer; so is a known one that cannot be
followed. Those of ``IGNORED`` do not change what is computed here, and are taken without effect. ``null`` is the same
as leaving a field out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from tensortier.server.problems import Problem
from tensortier.types import Sampling

# Book-keeping of OpenAI's own service, and hints
IGNORED = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "reasoning_effort", "verbosity", "prediction"),
    )
)
# Why they cannot be followed
_REFUSED = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "only text is generated",
    "web_search_options": "nothing is looked up",
    "suffix": "text is only continued at its end",
}
_UNION_TAGS = re.compile(
    r"str|int|float|bool|dict\[.*|list\[.*|constrained-.*|function-.*|literal\[.*|[A-Z]\w*"
)
_SEEDS = 2**32 - 1  # the last number means "random" to llama.cpp
_SAMPLING = Sampling()

_MOST_BIAS = 100
_TOKEN = re.compile(r"[0-9]{1,9}")

T = TypeVar("T", bound="_Body")
L = TypeVar("L")
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
# The first wrong member is told, and the others are not looked at: a request has room for millions
Several = Annotated[list[L], Field(fail_fast=True)]


def _shape(value: Any) -> str:
    """Which kind of ``Texts`` is meant; trying all of them on a million tokens would take seconds."""
    first = value[0] if isinstance(value, list) and value else ""
    if not isinstance(value, list):
        return "str"
    return "list[list]" if isinstance(first, list) else "list[str]" if isinstance(first, str) else "list[int]"


Texts = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[Several[str], Tag("list[str]")]
    | Annotated[Several[Count], Tag("list[int]")]
    | Annotated[Several[Several[Count]], Tag("list[list]")],
    Discriminator(_shape),
]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Loose(BaseModel):
    """Parts of messages and tools come with fields of other services; the chat template sees only ours."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Part(_Loose):
    type: str
    text: str | None = None
    refusal: str | None = None


class Called(_Loose):
    name: str
    arguments: str


class ToolCall(_Loose):
    id: str
    type: Literal["function"] = "function"
    function: Called


class Message(_Loose):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Several[Part] | None = None
    name: str | None = None
    tool_calls: Several[ToolCall] | None = None
    tool_call_id: str | None = None

    def plain(self, where: str) -> dict[str, Any]:
        """As the chat template takes it. Raises Problem."""
        content = self.content
        if isinstance(content, list):
            for number, part in enumerate(content):
                if part.type not in ("text", "refusal"):
                    param = f"{where}.content[{number}]"
                    raise Problem(400, f"{param}: only text is read, not {part.type[:40]!r}", param=param)
            content = "\n".join(part.text or part.refusal or "" for part in content)
        if content is None and not self.tool_calls:
            if self.role != "assistant":
                raise Problem(400, f"{where}.content is missing", param=f"{where}.content")
            content = ""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class Function(_Loose):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Loose):
    type: Literal["function"]
    function: Function


class Named(_Loose):
    name: str


class ToolChoice(_Loose):
    type: Literal["function"]
    function: Named


class StreamOptions(_Loose):
    include_usage: bool = False


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    type: Literal["text", "json_object", "json_schema"]


class _Body(_Strict):
    model: str | None = None


class _Generating(_Body):
    """What chat and plain completions share. Bounds are OpenAI's; defaults are ours."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: dict[str, Any] | None = None
    # llama.cpp's
    top_k: Count | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None

    def sampling(self, choice: int, max_tokens: int | None, logprobs: int | None) -> Sampling:
        """Of one of the ``n`` choices. Raises Problem."""
        given = {
            name: value
            for name in (
                *("temperature", "top_p", "presence_penalty", "frequency_penalty"),
                *("top_k", "min_p", "typical_p", "repeat_penalty", "grammar"),
            )
            if (value := getattr(self, name)) is not None
        }
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            **given,
            seed=None if self.seed is None else (self.seed + choice) % _SEEDS,
            max_tokens=_SAMPLING.max_tokens if max_tokens is None else max_tokens,
            stop=tuple(text for text in stop if text),
            logprobs=logprobs,
            logit_bias=self._biases,
        )

    @functools.cached_property
    def _biases(self) -> tuple[tuple[int, float], ...]:
        found = []
        for token, bias in (self.logit_bias or {}).items():
            if not _TOKEN.fullmatch(token):
                raise Problem(
                    400, f"logit_bias: {token[:20]!r} is not the number of a token", param="logit_bias"
                )
            number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
            if not number or not -_MOST_BIAS <= bias <= _MOST_BIAS:
                text = f"logit_bias.{token}: a bias is a number from -{_MOST_BIAS} to {_MOST_BIAS}"
                raise Problem(400, text, param=f"logit_bias.{token}", code="invalid_value")
            found.append((int(token), float(bias)))
        return tuple(found)

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Generating):
    messages: Annotated[Several[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Several[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: Several[Literal["text"]] | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Generating):
    prompt: Texts
    max_tokens: Count = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        return _several(self.prompt)


class EmbeddingRequest(_Body):
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        return _several(self.input)


def _several(given: Any) -> list[str | list[int]]:
    """One text or one list of tokens is a list of one."""
    single = isinstance(given, str) or (given and isinstance(given[0], int))
    return [given] if single else list(given)


def parse(kind: type[T], body: bytes) -> T:
    """A request. Raises Problem: 400 with the field that is to blame."""
    try:
        data = pydantic_core.from_json(body, allow_inf_nan=False)
    except (ValueError, RecursionError) as exc:
        raise Problem(400, f"the body is not JSON: {exc!s:.200}") from exc
    if not isinstance(data, dict):
        raise Problem(400, "the body is not a JSON object")
    data = {name: value for name, value in data.items() if value is not None and name not in IGNORED}
    for name in data:
        if name in _REFUSED:
            raise Problem(400, f"{name} is not supported: {_REFUSED[name]}", param=name)
        if name not in kind.model_fields:
            raise invalid({"type": "extra_forbidden", "loc": (name,)})
    try:
        return kind.model_validate(data)
    except pydantic.ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        raise invalid(first) from exc


def invalid(error: Mapping[str, Any]) -> Problem:
    """An error of pydantic's."""
    if error["type"] == "json_invalid":
        return Problem(400, "the body is not JSON")
    param = ""
    for step in error["loc"]:
        if isinstance(step, int):
            param += f"[{step}]"
        elif not _UNION_TAGS.fullmatch(step):
            param += f".{step}" if param else step[:100]
    if error["type"] == "extra_forbidden":
        return Problem(400, f"unrecognized field: {param}", param=param, code="unknown_parameter")
    if error["type"] == "missing":
        return Problem(400, f"{param} is missing", param=param, code="missing_required_parameter")
    return Problem(400, f"{param}: {error['msg']}", param=param, code="invalid_value")
