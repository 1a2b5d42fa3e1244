"""Patterns of tensor overrides, with the meaning that llama.cpp gives them.

llama.cpp hands the pattern to ``std::regex`` (ECMAScript grammar) and looks for it anywhere in the name
(``std::regex_search``). Python's ``re`` speaks almost the same language; what would mean something else
there is translated where both can say it and refused where they cannot.
"""

from __future__ import annotations

import re
from functools import lru_cache

from tensortier.errors import PatternError

# std::regex_traits::lookup_classname in the C locale.
_POSIX_CLASSES = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "blank": " \\t",
    "cntrl": "\\x00-\\x1f\\x7f",
    "d": "0-9",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": "!-/:-@\\[-`{-~",
    "s": "\\s",
    "space": "\\s",
    "upper": "A-Z",
    "w": "\\w",
    "xdigit": "0-9A-Fa-f",
}
_QUANTIFIER = re.compile(r"[*+?]|\{[0-9]{1,4}(?:,(?:[0-9]{1,4})?)?\}")
_SHARED_ESCAPES = frozenset("dDsSwWfnrtv")  # mean the same in both, in and outside of [...]
_HEX = re.compile(r"x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}")


@lru_cache(maxsize=256)
def compile_pattern(p: str) -> re.Pattern[str]:
    """The Python pattern that finds (``.search``) what llama.cpp's ``-ot`` pattern ``p`` finds.

    Raises ``PatternError`` for what is no ECMAScript regular expression or cannot be said in Python's.
    """
    try:
        return re.compile(_Translation(p).run(), re.ASCII)
    except re.error as exc:
        raise PatternError(f"the pattern {p!r} is not a regular expression: {exc}") from exc
    except (OverflowError, RecursionError) as exc:
        raise PatternError(f"the pattern {p!r} is too large") from exc


class _Translation:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.pos = 0
        self.out: list[str] = []

    def fail(self, problem: str) -> PatternError:
        return PatternError(f"the pattern {self.pattern!r} has {problem} at position {self.pos}")

    def run(self) -> str:
        """The pattern in Python's syntax."""
        while self.pos < len(self.pattern):
            char = self.pattern[self.pos]
            if char == "\\":
                self._escape()
            elif char == "[":
                self._bracket()
            elif char == "(":
                self._group()
            elif char in "*+?{":
                self._quantifier()
            else:
                # "$" in Python also matches before a final newline; "]" and "}" alone are literal in both.
                self.out.append({"$": r"\Z", "]": r"\]", "}": r"\}"}.get(char, char))
                self.pos += 1
        return "".join(self.out)

    def _escape(self) -> None:
        rest = self.pattern[self.pos + 1 :]
        if not rest:
            raise self.fail("a backslash without a character")
        char = rest[0]
        if char in "bB" or char in _SHARED_ESCAPES:
            self.out.append("\\" + char)
            self.pos += 2
        elif char in "123456789":
            number = re.match("[0-9]+", rest)
            assert number is not None
            # A group after it keeps a following digit out of the reference.
            self.out.append(f"(?:\\{number[0]})")
            self.pos += 1 + len(number[0])
        else:
            self.out.append(self._character_escape(rest))

    def _character_escape(self, rest: str) -> str:
        """One escaped character, in or outside of [...]; moves past it."""
        char = rest[0]
        if char == "0" and not rest[1:2].isdigit():
            self.pos += 2
            return r"\x00"
        if char in "xu":
            code = _HEX.match(rest)
            if not code:
                raise self.fail(f"an incomplete \\{char} escape")
            self.pos += 1 + len(code[0])
            return "\\" + code[0]
        if char == "c" and re.match("c[A-Za-z]", rest):
            self.pos += 3
            return f"\\x{ord(rest[1]) % 32:02x}"
        if char.isalnum():
            raise self.fail(f"the escape \\{char}, which is not in the ECMAScript grammar,")
        self.pos += 2
        return re.escape(char)

    def _group(self) -> None:
        rest = self.pattern[self.pos :]
        if not rest.startswith("(?"):
            self.out.append("(")
            self.pos += 1
            return
        if rest[2:3] not in (":", "=", "!"):
            raise self.fail("a (?...) group other than (?:, (?= and (?!, which llama.cpp does not know,")
        self.out.append(rest[:3])
        self.pos += 3

    def _quantifier(self) -> None:
        found = _QUANTIFIER.match(self.pattern, self.pos)
        if not found:
            raise self.fail("a { that starts no {n}, {n,} or {n,m} (write \\{ for the character)")
        self.pos = found.end()
        text = found[0]
        if self.pattern[self.pos : self.pos + 1] == "?":
            text += "?"
            self.pos += 1
        if self.pattern[self.pos : self.pos + 1] in tuple("*+?"):
            raise self.fail("a quantifier after a quantifier")
        self.out.append(text)

    def _bracket(self) -> None:
        self.pos += 1
        items = ["["]
        if self.pattern[self.pos : self.pos + 1] == "^":
            items.append("^")
            self.pos += 1
        if self.pattern[self.pos : self.pos + 1] == "]":
            raise self.fail("an empty [] (write \\] for the character)")
        while True:
            rest = self.pattern[self.pos :]
            if not rest:
                raise self.fail("a [ without its ]")
            if rest[0] == "]":
                self.pos += 1
                self.out.append("".join(items) + "]")
                return
            items.append(self._bracket_item(rest))

    def _bracket_item(self, rest: str) -> str:
        if rest.startswith("[:"):
            named = re.match(r"\[:([a-z]+):\]", rest)
            if not named or named[1] not in _POSIX_CLASSES:
                raise self.fail("an unknown [:class:]")
            self.pos += len(named[0])
            return _POSIX_CLASSES[named[1]]
        if rest.startswith(("[.", "[=")):
            raise self.fail("a collating element, which is not supported here,")
        if rest[0] == "\\":
            if len(rest) == 1:
                raise self.fail("a backslash without a character")
            if rest[1] in _SHARED_ESCAPES:
                self.pos += 2
                return rest[:2]
            if rest[1] == "b":
                self.pos += 2
                return r"\x08"
            return self._character_escape(rest[1:])
        self.pos += 1
        # Python reserves "[", "&&", "||", "~~" in sets; only "-" must stay bare, since it makes ranges.
        return rest[0] if rest[0] == "-" or rest[0].isalnum() else "\\" + rest[0]
