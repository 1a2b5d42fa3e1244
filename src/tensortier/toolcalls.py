"""Tool calls in a streamed answer: the formats that models were trained on, found and taken apart."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from tensortier.types import Piece


class Style(Enum):
    """How a model writes a call. Hermes: ``<tool_call>{"name", "arguments"}</tool_call>``, also Qwen's. Llama 3:
    ``{"name", "parameters"}`` as the whole answer, or after ``<|python_tag|>``. Mistral: ``[TOOL_CALLS]`` and a
    list of {"name", "arguments"}, or the name, ``[ARGS]`` and the arguments."""

    HERMES = "<tool_call>"
    LLAMA3 = "<|python_tag|>"
    MISTRAL = "[TOOL_CALLS]"


MARKERS = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
_DECODER = json.JSONDecoder()
_ARGUMENTS = {Style.HERMES: "arguments", Style.LLAMA3: "parameters", Style.MISTRAL: "arguments"}


@dataclass(frozen=True)
class Wrapping:
    """The text around a call's arguments: ``before`` ends where the JSON of the arguments begins."""

    before: str
    after: str


def style_of(template: str) -> Style | None:
    """The format that a chat template teaches; None where it knows no tools."""
    if "<tool_call>" in template:
        return Style.HERMES
    if "[TOOL_CALLS]" in template:
        return Style.MISTRAL
    if "<|python_tag|>" in template or ('"parameters"' in template and "tools" in template):
        return Style.LLAMA3
    return Style.HERMES if "tools" in template else None


def wrapping(style: Style, name: str) -> Wrapping:
    """How a call of the function ``name`` is written."""
    head = f'{{"name": {json.dumps(name)}, "{_ARGUMENTS[style]}": '
    if style is Style.HERMES:
        return Wrapping("<tool_call>\n" + head, "}\n</tool_call>")
    if style is Style.MISTRAL:
        return Wrapping("[TOOL_CALLS][" + head, "}]")
    return Wrapping(head, "}")


class Parser(Protocol):
    """Text in, pieces out: text, and the OpenAI deltas of calls."""

    @property
    def called(self) -> bool:
        """Whether there was a call."""
        ...

    def feed(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]:
        """What was held back, when no more text comes."""
        ...


def _call(index: int, name: str | None, arguments: str) -> Piece:
    """``name`` begins a call; None goes on with its arguments."""
    function: dict[str, Any] = {"arguments": arguments}
    call: dict[str, Any] = {"index": index, "function": function}
    if name is not None:
        function = {"name": name, "arguments": arguments}
        call = {
            "index": index,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": function,
        }
    return Piece("", None, {"tool_calls": [call]})


class ForcedCall:
    """The whole answer is the arguments of one function: they are passed on as they come."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    @property
    def called(self) -> bool:
        return True

    def feed(self, text: str) -> list[Piece]:
        if not text:
            return []
        begun, self._begun = self._begun, True
        return [_call(0, None if begun else self._name, text)]

    def finish(self) -> list[Piece]:
        if self._begun:
            return []
        self._begun = True
        return [_call(0, self._name, "")]


class CallFinder:
    """Finds calls of the functions ``names`` in an answer that may also be plain text. What looks like a call but
    is none, is given out as text."""

    def __init__(self, style: Style, names: Collection[str]) -> None:
        self._style = style
        self._names = frozenset(names)
        self._held = ""
        self._inside = False  # behind a marker
        self._begun = False  # there was text other than space
        self._count = 0
        self._may_end = False  # the newest text may complete JSON; without, it is not parsed again

    @property
    def called(self) -> bool:
        return self._count > 0

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        self._may_end = "}" in text or "]" in text
        pieces: list[Piece] = []
        while True:
            step = self._step_inside() if self._inside else self._step_outside()
            if step is None:
                return pieces
            pieces += step

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._inside:
            body, self._held, self._inside = self._held, "", False
            pieces = self._calls(_load(body)) or self._text(self._opening + body)
        rest, self._held = self._held, ""
        return pieces + self._text(rest)

    # --- outside of calls

    _opening = ""  # the marker behind which we are; Llama 3's calls may have none

    def _step_outside(self) -> list[Piece] | None:
        """Pieces, perhaps none, where something was decided; None where more text is needed."""
        marker = self._style.value
        at = self._held.find(marker)
        if at >= 0:
            before, self._held = self._held[:at], self._held[at + len(marker) :]
            self._inside, self._opening = True, marker
            return self._text(before)
        if self._style is Style.LLAMA3 and not self._begun and self._held.lstrip().startswith("{"):
            self._inside, self._opening = True, ""
            return []
        if not self._held or (self._style is Style.LLAMA3 and not self._begun and self._held.isspace()):
            return None
        keep = next(
            (
                n
                for n in range(min(len(marker) - 1, len(self._held)), 0, -1)
                if self._held.endswith(marker[:n])
            ),
            0,
        )
        if keep == len(self._held):
            return None
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._text(text)

    def _text(self, text: str) -> list[Piece]:
        if self._count and text.isspace():
            return []  # the line ends between calls
        self._begun = self._begun or bool(text.strip())
        return [Piece(text)] if text else []

    # --- inside of one

    def _step_inside(self) -> list[Piece] | None:
        found = self._closed() if self._style is Style.HERMES else self._json()
        if found is None:
            return None
        value, end = found
        body, self._held, self._inside = self._held[:end], self._held[end:], False
        return self._calls(value) or self._text(self._opening + body)

    def _closed(self) -> tuple[Any, int] | None:
        """What the closing tag closes, and where that ends."""
        body, tag, _ = self._held.partition("</tool_call>")
        return (_load(body), len(body) + len(tag)) if tag else None

    def _json(self) -> tuple[Any, int] | None:
        """The first value in the text, and where it ends. Mistral's may have its name before it."""
        if not self._may_end:
            return None
        start, name = 0, None
        if self._style is Style.MISTRAL and (at := self._held.find("[ARGS]")) >= 0:
            name, start = self._held[:at].partition("[CALL_ID]")[0].strip(), at + len("[ARGS]")
        start += len(self._held[start:]) - len(self._held[start:].lstrip())
        try:
            value, end = _DECODER.raw_decode(self._held, start)
        except (ValueError, RecursionError):
            return None  # more text may complete it
        return value if name is None else {"name": name, "arguments": value}, end

    def _calls(self, value: Any) -> list[Piece]:
        """The calls that a value is; none where it is something else."""
        calls = value if isinstance(value, list) else [value]
        if not all(isinstance(call, Mapping) and self._offered(call.get("name")) for call in calls):
            return []
        pieces = []
        for number, call in enumerate(calls):
            arguments = call.get("arguments", call.get("parameters", {}))
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            pieces.append(_call(self._count + number, call["name"], text))
        self._count += len(calls)
        self._begun = True
        return pieces

    def _offered(self, name: Any) -> bool:
        return isinstance(name, str) and name in self._names


def _load(text: str) -> Any:
    """JSON, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
