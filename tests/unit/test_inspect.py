"""The report, against sums made here and against ``std::regex`` itself."""

from __future__ import annotations

import io
import json
import math
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path

import gguf as gguf_py
import pytest
from rich.console import Console

from tensortier import gguf, inspect
from tensortier.errors import PatternError
from tensortier.gguf import _read_bytes
from tensortier.patterns import compile_pattern
from tests.unit.gguf_samples import ARR, F32, STR, U32, blob, small_model, tensor, value, write_moe


def _render(report: inspect.Report, width: int = 200) -> str:
    out = io.StringIO()
    inspect.render(report, Console(file=out, width=width))
    return out.getvalue()


def test_sums(tmp_path: Path) -> None:
    write_moe(tmp_path / "moe.gguf")
    theirs = gguf_py.GGUFReader(tmp_path / "moe.gguf").tensors
    report = inspect.summarize(gguf.read(tmp_path / "moe.gguf"), match="_exps", top=3)
    total = sum(t.n_bytes for t in theirs)
    assert report.total.nbytes == total
    assert report.total.params == sum(t.n_elements for t in theirs)
    for rows in (report.by_role, report.by_type, report.by_layer):
        assert sum(r.nbytes for r in rows) == total
        assert sum(r.tensors for r in rows) == len(theirs)
    by_type: Counter[str] = Counter()
    for t in theirs:
        by_type[t.tensor_type.name] += t.n_bytes
    assert {r.key: r.nbytes for r in report.by_type} == by_type
    assert next(r for r in report.by_type if r.key == "Q4_0").bits_per_weight == 4.5
    assert [t.nbytes for t in report.largest] == sorted((t.n_bytes for t in theirs), reverse=True)[:3]
    assert [row.layer for row in report.by_layer] == [0, 1, None]
    assert report.match is not None and not report.warnings
    exps = [t for t in theirs if "_exps" in t.name]
    assert [t.name for t in report.match.tensors] == [t.name for t in exps]
    assert report.match.nbytes == sum(t.n_bytes for t in exps)


def test_json_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "moe.gguf"
    write_moe(path)
    model = gguf.read(path)
    data = json.loads(json.dumps(inspect.summarize(model, match="nothing").to_json(), allow_nan=False))
    theirs = gguf_py.GGUFReader(path)
    assert [(t["name"], t["shape"], t["type"], t["bytes"], t["offset"]) for t in data["tensors"]] == [
        (t.name, t.shape.tolist(), t.tensor_type.name, t.n_bytes, t.data_offset) for t in theirs.tensors
    ]
    assert {(t["role"], t["layer"], t["file"]) for t in data["tensors"] if "down_exps" in t["name"]} == {
        ("expert_down", 1, 0)
    }
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert data["metadata"] == fields
    assert data["files"] == [{"path": str(path), "bytes": path.stat().st_size}]
    assert data["match"]["tensors"] == [] and data["match"]["bytes"] == 0
    assert data["warnings"] == ["the pattern 'nothing' matches no tensor of this model"]
    assert data["model"]["n_expert"] == 4 and data["model"]["kv_lora_rank"] == 32


def test_long_arrays_and_numbers_that_json_lacks() -> None:
    keys = [
        ("general.architecture", value(STR, "llama")),
        ("a", value(ARR, (U32, list(range(1000))))),
        ("b", value(ARR, (U32, list(range(999))))),
        ("c", struct.pack("<If", F32, math.inf)),
        ("d", value(ARR, (STR, ["x"] * 1000))),
    ]
    data = inspect.summarize(_read_bytes(blob(keys))).to_json()["metadata"]
    assert data["a"] == {"type": "uint32", "length": 1000} and data["d"] == {"type": "string", "length": 1000}
    assert data["b"] == list(range(999)) and data["c"] == "inf"
    json.dumps(data, allow_nan=False)


def test_rendered() -> None:
    report = inspect.summarize(_read_bytes(small_model()), match=r"blk\.\d+\.ffn_up", top=2)
    shown = _render(report)
    assert "gemma3, Q4_K_M" in shown and "sliding window of 512 tokens in 2 layers" in shown
    nbytes = 512 * 144 + 768 * 210
    assert f"matches 2 of 5 tensors, 229.50 KiB ({nbytes} bytes" in shown
    assert "blk.1.ffn_up.weight" in shown and "[64 x string]" not in shown and "64 in all" in shown
    assert "warning" not in shown
    assert "warning: the pattern 'zzz' matches no tensor" in _render(
        inspect.summarize(report.model, match="zzz"), width=40
    )
    _render(inspect.summarize(_read_bytes(blob([("general.architecture", value(STR, "llama"))]))))


def test_text_of_the_file_cannot_drive_the_terminal() -> None:
    keys = [
        ("general.architecture", value(STR, "llama")),
        ("general.name", value(STR, "a\x1b[2J[bold]b\u202e")),
        ("x[/red]\n", value(STR, "\x07[link=file:///]y")),
    ]
    shown = _render(inspect.summarize(_read_bytes(blob(keys, [tensor("t\x1b[1m", (4,), 0, 0)], 16))))
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert "a\\x1b[2J[bold]b" in shown and "x[/red]\\n" in shown


NAMES = [
    "token_embd.weight",
    "output.weight",
    "output_norm.weight",
    "per_layer_token_embd.weight",
    *(
        f"blk.{i}.{part}.weight"
        for i in (0, 1, 9, 10, 19, 31)
        for part in ("attn_q", "ffn_up", "ffn_gate_exps")
    ),
    "blk.3.ffn_down_shexp.weight",
    "blk.3.attn_q.bias",
    "blk.3.ssm_a",
    "weird]name}[{-^\\",
]
SAME = [
    "ffn_up",
    "",
    r"blk\.(1|3)\d?\.",
    r"blk\.([0-9]|1[0-5])\.ffn_.*_exps\.weight",
    r"^blk\.[[:digit:]]+\.attn",
    r"weight$",
    r"(?:up|down)_?\w*\.weight",
    r"blk\.(?!0\.)\d+\.ffn_(?=up)",
    r"[^a-z._0-9]",
    r"(.)\1",
    r"(b)lk\.(\d)\2?",
    r"\bffn",
    r"\Battn",
    r"[\d]{2}",
    r"\d{2,}",
    r"1{1,2}?9",
    r"[[:upper:]]|[[:punct:]][[:alpha:]]{6}$",
    r"[\w.]+_embd",
    r"\x62lk\u002e3",
    r"a|b|",
    r"]",
    r"}",
    r"[\]}]",
    r"[-.]name|[a\-]\^",
    r"[a&&b]lk|[||]",
    r"(?:a*)*$",
    r"\.\*",
    r"[.]weight",
    r"\{|\[\{",
    r"[[:space:][:digit:]]\.",
    r"(ffn|attn)_(up|q)\.",
    r"\/|\-\^",
]
REFUSED = [
    "(", "a)", "[a", "*a", "a**", "a{", "a{,3}", "a{x}", "a++", "a{3,1}",
    "(?i)a", "(?P<n>a)", "(?<=a)b", "(?<n>a)", "(?#x)", "(?>a)", "(?",
    "a\\", r"\A", r"\Z", r"\z", r"\k", r"\x4", r"\u12", r"\1",
    "[]a]", "[^]a]", "[[:nope:]]", "[[.a.]]", "[[=a=]]", "[z-a]", r"[\d-z", "[a\\",
]  # fmt: skip


@pytest.mark.parametrize("pattern", REFUSED)
def test_refused_patterns(pattern: str) -> None:
    with pytest.raises(PatternError) as caught:
        compile_pattern(pattern)
    assert "\n" not in str(caught.value) and repr(pattern) in str(caught.value)


_PROGRAM = """
#include <cstdio>
#include <iostream>
#include <regex>
#include <string>
#include <vector>
int main() {  // first line: number of names; then the names; then patterns
    std::string line;
    std::getline(std::cin, line);
    std::vector<std::string> names(std::stoi(line));
    for (auto & n : names) std::getline(std::cin, n);
    while (std::getline(std::cin, line)) {
        try {
            std::regex re(line);
            for (auto & n : names) putchar(std::regex_search(n, re) ? '1' : '0');
        } catch (const std::regex_error &) {
            putchar('!');
        }
        putchar('\\n');
    }
}
"""


def test_patterns_mean_what_they_mean_to_llama_cpp(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    assert compiler, "a C++ compiler builds the native part, so there is one"
    (tmp_path / "match.cpp").write_text(_PROGRAM)
    subprocess.run([compiler, "-std=c++17", "-o", tmp_path / "match", tmp_path / "match.cpp"], check=True)
    lines = [str(len(NAMES)), *NAMES, *SAME]
    done = subprocess.run(
        [tmp_path / "match"], input="\n".join(lines) + "\n", capture_output=True, text=True, check=True
    )
    differing = []
    for pattern, expected in zip(SAME, done.stdout.splitlines(), strict=True):
        try:
            regex = compile_pattern(pattern)
            actual = "".join("1" if regex.search(n) else "0" for n in NAMES)
        except PatternError as exc:
            actual = f"! {exc}"
        if actual != expected:
            differing.append((pattern, actual, expected))
    assert not differing
