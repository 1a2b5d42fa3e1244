"""Override patterns against brute force over every name, and quoting against the shells' own rules."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortier import overrides as patterns
from tensortier.errors import UsageError
from tensortier.export import quoting
from tensortier.types import Override

TAILS = st.sampled_from(
    [
        *("ffn_up.weight", "ffn_gate.weight", "ffn_down.weight", "ffn_up_exps.weight", "ffn_up.bias"),
        *("attn_q.weight", "attn_k.weight", "attn_norm.weight", "a", "b", "ab", "x.1.y", "é", "èa"),
        *("w,=;\"'", "(a|b)*", "k\\d", ""),
    ]
)
NAMES = st.one_of(
    st.builds("{}.{}.{}".format, st.sampled_from(["blk", "v.blk", ""]), st.integers(0, 1200), TAILS),
    st.builds("blk.0{}.{}".format, st.integers(0, 9), TAILS),
    st.sampled_from(
        ["output.weight", "output_norm.weight", "token_embd.weight", "", "blk", "rope_freqs.weight"]
    ),
)


def found_by(overrides: Sequence[Override], names: Sequence[str]) -> dict[str, str]:
    """{name: device} of the first pattern found, with Python's ``re``."""
    regexes = [(re.compile(o.pattern), o.device) for o in overrides]
    return {n: d for n in names if (d := next((d for r, d in regexes if r.search(n)), None)) is not None}


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, st.sampled_from([None, None, "CPU", "CUDA0", "CUDA1"]), max_size=60))
def test_patterns_find_what_they_should(where: dict[str, str | None]) -> None:
    names: dict[str, list[str]] = {}
    for name, device in where.items():
        if device:
            names.setdefault(device, []).append(name)
    overrides = patterns.compact(names, where)
    assert found_by(overrides, list(where)) == {n: d for n, d in where.items() if d}
    assert not any(set(o.pattern) & set(",;=\"'") for o in overrides)
    # whatever their order
    assert found_by(overrides[::-1], list(where)) == {n: d for n, d in where.items() if d}


@settings(max_examples=60, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 999), st.sampled_from(["up", "gate", "down_exps"])), max_size=200))
def test_without_the_model_nothing_else_is_ever_found(wanted: set[tuple[int, str]]) -> None:
    overrides = patterns.compact({"CPU": [f"blk.{i}.ffn_{k}.weight" for i, k in wanted]})
    for kind in ("up", "gate", "down_exps", "down", "u", "upp"):
        numbers = range(1000) if kind != "u" else range(0, 1000, 7)
        found = found_by(overrides, [f"blk.{i}.ffn_{kind}.weight" for i in numbers])
        assert {int(name.split(".")[1]) for name in found} == {i for i, k in wanted if k == kind}
    assert not found_by(overrides, ["blk.01.ffn_up.weight", "blk.1000.ffn_up.weight", "xblk.1.ffn_up.weight"])
    assert not found_by(overrides, ["blk.1.ffn_up.weight2", "blk.1.ffn_up.bias", "blk.1xffn_up.weight"])


@settings(max_examples=150, deadline=None)
@given(st.sets(st.integers(0, 999), min_size=1))
def test_layer_numbers(numbers: set[int]) -> None:
    regex = re.compile(patterns.layers(numbers))
    assert {n for n in range(10000) if regex.fullmatch(str(n))} == numbers


@pytest.mark.parametrize("first", range(0, 80, 7))
@pytest.mark.parametrize("last", [79, 84, 99, 120])
def test_ranges_stay_short(first: int, last: int) -> None:
    kinds = ("ffn_up", "ffn_gate", "ffn_down")
    names = [f"blk.{i}.{k}.weight" for i in range(first, last + 1) for k in kinds]
    (override,) = patterns.compact({"CPU": names})
    assert len(override.pattern) < 80


def test_the_story_of_odd_layers() -> None:
    names = [f"blk.{i}.ffn_up.weight" for i in range(1, 40, 2)]
    assert patterns.compact({"CPU": names}) == (Override(r"^blk\.[1-3]?[13579]\.ffn_up\.weight$", "CPU"),)


def test_combinations_are_said_once() -> None:
    names = [
        f"blk.{i}.ffn_{k}_exps.{e}" for i in range(8) for k in ("up", "down") for e in ("weight", "bias")
    ]
    expected = Override(r"^blk\.[0-7]\.ffn_(down|up)_exps\.(bias|weight)$", "CPU")
    assert patterns.compact({"CPU": names}) == (expected,)


def test_patterns_of_names_given_wrongly() -> None:
    with pytest.raises(ValueError, match="two devices"):
        patterns.compact({"CPU": ["a"], "CUDA0": ["a"]})
    with pytest.raises(ValueError, match="not a tensor"):
        patterns.compact({"CPU": ["a"]}, ["b"])


HARD = [
    "llama-server",
    "-m",
    "my models/it's 5.gguf",
    "-ot",
    r"^blk\.(1|2[0-4])\.x$=CPU",
    "a&b%|<>",
    "$HOME",
    "",
]


def test_posix_quoting_by_a_real_shell() -> None:
    line = quoting.quote(["printf", r"%s\n", *HARD])
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == HARD
    assert shlex.split(quoting.quote(HARD)) == HARD


def test_windows_quoting() -> None:
    """Split back by PowerShell's rule for single quotes, and by the C runtime's for what cmd passes on."""
    words = re.findall(r"'((?:[^']|'')*)'|(\S+)", quoting.quote(HARD, "powershell"))
    assert [single.replace("''", "'") or bare for single, bare in words] == HARD
    hard = [*HARD, "C:\\a folder\\"]
    words = re.findall(r'"([^"]*)"|(\S+)', quoting.quote(hard, "cmd"))
    assert [re.sub(r"(\\+)$", lambda m: m[1][: len(m[1]) // 2], q) or bare for q, bare in words] == hard
    with pytest.raises(UsageError, match="double quote"):
        quoting.quote(['a"b'], "cmd")
    with pytest.raises(UsageError, match="posix, powershell, cmd"):
        quoting.quote(["a"], "fish")
