"""Few, short, anchored override patterns for any assignment of tensors to devices.

What is written here is in the part of the ECMAScript grammar that ``std::regex`` and Python's ``re`` read
alike, and holds neither ``,`` nor ``;`` nor ``=``, which the engines' command lines split their options at.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from tensortier.types import Override

# The first number of a name that stands between dots: "blk.", "17", "ffn_up.weight". Numbers of four digits
# and more, or with leading zeros, are left to be matched as text.
_NUMBERED = re.compile(r"((?:[^.]*\.)*?)(0|[1-9][0-9]{0,2})\.(.+)", re.DOTALL)


class _Name(NamedTuple):
    head: str
    number: str
    tail: str


class _Box(NamedTuple):
    """All combinations of some layer numbers and some tails, under one head."""

    head: str
    numbers: frozenset[str]
    tails: frozenset[str]


def compact(
    names_by_device: Mapping[str, Collection[str]], all_names: Iterable[str] | None = None
) -> tuple[Override, ...]:
    """Overrides that send each name to its device and touch no other name.

    ``all_names``: every tensor of the model. With it a pattern may use ``\\d+`` or leave the end open where
    that finds nothing else in the model. Without it each pattern matches exactly the names asked for.

    The order of the answer does not matter: no name of the model is found by two patterns.

    Raises:
        ValueError: a name is given to two devices, or is not in ``all_names``.
    """
    model = None if all_names is None else frozenset(all_names)
    seen: set[str] = set()
    overrides: list[Override] = []
    for device, names in names_by_device.items():
        wanted = set(names)
        if wanted & seen:
            raise ValueError(f"{min(wanted & seen)!r} is given to two devices")
        if model is not None and not wanted <= model:
            raise ValueError(f"{min(wanted - model)!r} is not a tensor of the model")
        seen |= wanted
        overrides += (Override(pattern, device) for pattern in _patterns(wanted, model))
    return tuple(overrides)


def _split(name: str) -> _Name | None:
    found = _NUMBERED.fullmatch(name)
    return _Name(*found.groups()) if found else None


def _patterns(names: set[str], model: frozenset[str] | None) -> list[str]:
    plain = {name for name in names if _split(name) is None}
    numbered = [parts for name in sorted(names - plain) if (parts := _split(name))]
    answers = [[_of_box(box, model) for box in boxes] for boxes in (_by_tail(numbered), _by_number(numbered))]
    best = min(answers, key=lambda patterns: sum(len(p) + 5 for p in patterns))
    return best + ([f"^{_either(plain)}$"] if plain else [])


def _by_tail(names: Iterable[_Name]) -> list[_Box]:
    """Kinds of tensors that are wanted in the same layers."""
    layers: dict[tuple[str, str], set[str]] = {}
    for name in names:
        layers.setdefault((name.head, name.tail), set()).add(name.number)
    boxes: dict[tuple[str, frozenset[str]], set[str]] = {}
    for (head, tail), numbers in layers.items():
        boxes.setdefault((head, frozenset(numbers)), set()).add(tail)
    return [_Box(head, numbers, frozenset(tails)) for (head, numbers), tails in boxes.items()]


def _by_number(names: Iterable[_Name]) -> list[_Box]:
    """Layers of which the same kinds of tensors are wanted."""
    kinds: dict[tuple[str, str], set[str]] = {}
    for name in names:
        kinds.setdefault((name.head, name.number), set()).add(name.tail)
    boxes: dict[tuple[str, frozenset[str]], set[str]] = {}
    for (head, number), tails in kinds.items():
        boxes.setdefault((head, frozenset(tails)), set()).add(number)
    return [_Box(head, frozenset(numbers), tails) for (head, tails), numbers in boxes.items()]


def _of_box(box: _Box, model: frozenset[str] | None) -> str:
    """The shortest pattern that finds the box and, where the model is known, nothing else in it."""
    head, number, tail = escape(box.head), layers(map(int, box.numbers)), _either(box.tails) + "$"
    exact = rf"^{head}{number}\.{tail}"
    if model is None:
        return exact
    wanted = {f"{box.head}{n}.{t}" for n in box.numbers for t in box.tails}
    shorter = [rf"^{head}\d+\.", rf"^{head}{number}\.", rf"^{head}\d+\.{tail}"]
    for pattern in sorted(shorter, key=len):
        if len(pattern) < len(exact) and {n for n in model if re.search(pattern, n)} == wanted:
            return pattern
    return exact


def layers(numbers: Iterable[int]) -> str:
    """A pattern for exactly these numbers in decimal, in parentheses where it is an alternative."""
    texts = {str(n) for n in numbers}
    alternatives = _same_length_alternatives(texts)
    if len(alternatives) == 1:
        return alternatives[0]
    return f"({'|'.join(alternatives)})"


def _same_length_alternatives(texts: set[str]) -> list[str]:
    groups = [{t for t in texts if len(t) == n} for n in sorted({len(t) for t in texts})]
    alternatives: list[str] = []
    shorter: set[str] = set()
    for group in groups:
        for firsts, rest in _first_digits(group):
            if rest == shorter and rest:
                # "[1-3]?[13579]" for 1 3 5 7 9 and 11 13 ... 39: one alternative in place of two
                alternatives = [a for a in alternatives if a not in _spelled(shorter)]
                alternatives.append(f"{_digits(firsts)}?{_tail(rest)}")
                shorter = set()
            else:
                alternatives.append(_digits(firsts) + _tail(rest))
        shorter = group
    return alternatives


def _spelled(group: set[str]) -> list[str]:
    return [_digits(firsts) + _tail(rest) for firsts, rest in _first_digits(group)]


def _first_digits(group: set[str]) -> list[tuple[str, set[str]]]:
    """First digits that are followed by the same rests, with those rests; in order of the first digit."""
    rests: dict[str, set[str]] = {}
    for text in sorted(group):
        rests.setdefault(text[0], set()).add(text[1:])
    merged: dict[frozenset[str], str] = {}
    for first, rest in rests.items():
        merged[frozenset(rest)] = merged.get(frozenset(rest), "") + first
    return [(firsts, set(rest)) for rest, firsts in merged.items()]


def _tail(rests: set[str]) -> str:
    if rests == {""}:
        return ""
    alternatives = _spelled(rests)
    return alternatives[0] if len(alternatives) == 1 else f"({'|'.join(alternatives)})"


def _digits(digits: str) -> str:
    """A class for ascending digits: "7", "[1-4]", "[13579]", "\\d"."""
    if len(digits) == 1:
        return digits
    if len(digits) == 10:
        return r"\d"
    runs: list[str] = []
    for digit in digits:
        if runs and int(digit) == int(runs[-1][-1]) + 1:
            runs[-1] += digit
        else:
            runs.append(digit)
    return f"[{''.join(r if len(r) < 3 else f'{r[0]}-{r[-1]}' for r in runs)}]"


def _either(texts: Collection[str]) -> str:
    """A pattern for exactly these texts, with what they begin and end with in common said once."""
    optional = "" in texts
    rest = sorted(set(texts) - {""})
    if not rest:
        return ""
    if optional:
        inner = _either(rest)
        return f"{inner}?" if _is_atom(inner) else f"({inner})?"
    if len(rest) == 1:
        return escape(rest[0])
    if product := _product(rest):
        return product
    head = _common_start(rest)
    rest = [t[len(head) :] for t in rest]
    end = _common_start([t[::-1] for t in rest])[::-1]
    middles = {t[: len(t) - len(end)] for t in rest}
    return escape(head) + _choice(middles) + escape(end)


def _product(texts: Sequence[str]) -> str:
    """The pattern where the texts are all combinations of what stands before and after their last dot, as in
    "up.weight", "up.bias", "gate.weight", "gate.bias"; else nothing."""
    ends: dict[str, set[str]] = {}
    for text in texts:
        start, _, end = text.rpartition(".")
        ends.setdefault(start, set()).add(end)
    (first, *others) = ends.values()
    if "" in ends or not others or len(first) < 2 or any(end != first for end in others):
        return ""
    return rf"{_either(ends)}\.{_either(first)}"


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    return next((first[:i] for i, char in enumerate(first) if last[i : i + 1] != char), first)


def _choice(middles: set[str]) -> str:
    """Alternatives that have nothing in common at either end."""
    if "" in middles:
        return _either(middles)
    if all(len(m) == 1 and m.isascii() and m.isalnum() for m in middles):
        return f"[{''.join(sorted(middles))}]"
    groups: dict[str, set[str]] = {}
    for middle in sorted(middles):
        groups.setdefault(middle[0], set()).add(middle)
    return f"({'|'.join(_either(group) for group in groups.values())})"


def _is_atom(pattern: str) -> bool:
    """Whether a quantifier after it would apply to all of it."""
    if len(pattern) == 1:
        return pattern.isascii()  # std::regex sees the bytes of any other character
    if pattern[0] not in "([":
        return False
    depth = 0
    for i, char in enumerate(pattern):
        if pattern[i - 1 : i] != "\\":
            depth += (char in "([") - (char in ")]")
        if depth == 0:
            return i == len(pattern) - 1
    return False


def escape(text: str) -> str:
    """``text`` as a pattern that finds just it, without a character that an option would be split at."""
    out = []
    for char in text:
        if char.isascii() and (char.isalnum() or char in "_-/:@ "):
            out.append(char)
        elif char in r"^$\.*+?()[]{}|":
            out.append("\\" + char)
        elif ord(char) < 0x80:
            out.append(f"\\x{ord(char):02x}")
        else:
            out.append(char)
    return "".join(out)
