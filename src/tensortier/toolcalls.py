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

    @property
    def called(self) -> bool:
        return self._count > 0

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while True:
            step = self._step_inside() if self._inside else self._step_outside()
            if step is None:
                return pieces
            pieces += step

    def finish(self) -> list[Piece]:
        rest, self._held = self._held, ""
        if self._inside:
            marker = self._style.value if not self._bare else ""
            calls = self._calls(rest)
            if calls is not None:
                return calls
            rest = marker + rest
        return self._text(rest)

    # --- outside of calls

    _bare = False  # Llama 3: the call has no marker, the answer begins with {

    def _step_outside(self) -> list[Piece] | None:
        """Pieces, perhaps none, where something was decided; None where more text is needed."""
        marker = self._style.value
        at = self._held.find(marker)
        if at >= 0:
            before, self._held = self._held[:at], self._held[at + len(marker) :]
            self._inside, self._bare = True, False
            return self._text(before)
        if self._style is Style.LLAMA3 and not self._begun and self._held.lstrip().startswith("{"):
            self._inside = self._bare = True
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
        if self._style is Style.HERMES:
            body, end, rest = self._held.partition("</tool_call>")
            if not end:
                return None
        else:
            body, rest = self._held, ""
            if not body.rstrip().endswith(("}", "]")):
                return None
        calls = self._calls(body)
        if calls is None:
            if self._style is not Style.HERMES:
                return None  # more text may complete it
            self._inside = False
            self._held = rest
            return self._text("<tool_call>" + body + "</tool_call>")
        self._inside = False
        self._held = rest
        return calls

    def _calls(self, body: str) -> list[Piece] | None:
        """The calls that a text is, or None."""
        body = body.strip()
        if self._style is Style.MISTRAL and "[ARGS]" in body:
            name, _, arguments = body.partition("[ARGS]")
            found = _load(arguments)
            named: Any = {"name": name.partition("[CALL_ID]")[0].strip(), "arguments": found}
            calls = None if found is None else [named]
        else:
            found = _load(body)
            calls = found if isinstance(found, list) else None if found is None else [found]
        if not calls:
            return None
        pieces = []
        for number, call in enumerate(calls):
            if not isinstance(call, Mapping) or call.get("name") not in self._names:
                return None
            arguments = call.get("arguments", call.get("parameters", {}))
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            pieces.append(_call(self._count + number, call["name"], text))
        self._count += len(calls)
        self._begun = True
        return pieces


def _load(text: str) -> Any:
    """JSON, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
