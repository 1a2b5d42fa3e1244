"""``tensortier run`` on SmolLM2 as a user starts it: its own process, a real model, a real terminal (pty)."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tensortier import gguf

PROGRAM = [sys.executable, "-m", "tensortier.cli"]
COMMAND = [*PROGRAM, "run", "smollm2"]
SHORT = ["-c", "512", "--temp", "0", "-t", "2"]
QUESTION = "What is the capital of France? Answer in one sentence."
QUESTION_OF_MANY_WORDS = "Count from one to ten thousand, in words."
SECONDS = 120  # generous: the machine may be busy


def run(
    *arguments: str, data: str | None = None, command: list[str] = COMMAND
) -> subprocess.CompletedProcess[str]:
    # without data standard input is empty but no terminal: the tests do not depend on where they run
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=SECONDS, input=data or "", check=False
    )


def one_error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The error of a failed command, after checking that it is one line and nothing else went out."""
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("tensortier: error: "), result.stderr
    assert len([line for line in lines if line.startswith("tensortier: error")]) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[-1]


# --- one shot


@pytest.fixture(scope="module")
def answer() -> dict[str, object]:
    """The JSON object of one greedy answer."""
    result = run("-p", QUESTION, "-n", "24", "--json", *SHORT)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_json_has_what_it_promises(answer: dict[str, object]) -> None:
    expected = {
        "model": str, "text": str, "finish_reason": str, "prompt_tokens": int, "completion_tokens": int,
        "prompt_tokens_per_second": float, "decode_tokens_per_second": float, "load_seconds": float,
        "devices": list, "warnings": list,
    }  # fmt: skip
    assert {key: type(answer[key]) for key in expected} == expected
    assert answer["finish_reason"] in ("stop", "length")
    assert 0 < int(str(answer["completion_tokens"])) <= 24
    assert int(str(answer["prompt_tokens"])) > 10
    for key in ("prompt_tokens_per_second", "decode_tokens_per_second", "load_seconds"):
        assert float(str(answer[key])) > 0
    devices = answer["devices"]
    assert isinstance(devices, list)
    for device in devices:
        assert set(device) == {"device", "planned", "allocated"}
        assert device["planned"] is None or set(device["planned"]) == set(device["allocated"])
        assert all(type(n) is int for n in device["allocated"].values())
    allocated = sum(device["allocated"]["weights_bytes"] for device in devices)
    size = Path(str(answer["model"])).stat().st_size
    assert 0.9 * size < allocated < 1.5 * size  # repacked or not, each weight is in memory once


def test_the_answer_streams_to_stdout_and_the_rest_to_stderr(answer: dict[str, object]) -> None:
    result = run("-p", QUESTION, "-n", "24", *SHORT)
    assert result.returncode == 0
    assert result.stdout == str(answer["text"]).rstrip("\n") + "\n"  # greedy: the same text as in JSON
    assert re.search(
        r"^prompt: \d+ tokens, [\d.]+ tokens/s; answer: \d+ tokens, [\d.]+ tokens/s$", result.stderr, re.M
    )
    assert "\x1b" not in result.stdout + result.stderr


def test_piped_data_is_the_prompt_and_quiet_is_quiet(answer: dict[str, object]) -> None:
    result = run("-n", "24", "-q", *SHORT, data=QUESTION)
    assert result.returncode == 0
    assert result.stdout == str(answer["text"]).rstrip("\n") + "\n"
    assert result.stderr == ""


def test_raw_grammar_and_stop(tmp_path: Path) -> None:
    grammar = tmp_path / "yes.gbnf"
    grammar.write_text('root ::= " one two" " three four"', encoding="utf-8")
    arguments = ["--raw", "-p", "Count:", "--grammar", str(grammar), "--stop", " three", "--json", *SHORT]
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["text"], found["finish_reason"]) == (" one two", "stop")
    assert found["prompt_tokens"] < 6  # no chat template around it


def test_what_does_nothing_or_harm_is_a_warning(tiny_path: Path) -> None:
    trained = gguf.read(tiny_path).context_length
    arguments = ["-p", "Hi", "-n", "1", "-t", "2", "--json", "-ngl", "99", "-ot", "no_such_tensor=CPU"]
    result = run(*arguments, "-c", str(trained + 256), command=[*PROGRAM, "run", str(tiny_path)])
    assert result.returncode == 0, result.stderr
    warnings = json.loads(result.stdout)["warnings"]
    assert any("no_such_tensor" in warning for warning in warnings)
    assert any(f"longer than the {trained} that" in warning for warning in warnings)
    assert result.stderr.count("tensortier: warning: ") == len(warnings)


def test_inspect_and_the_override_pattern_agree(smollm2_path: Path) -> None:
    pattern = r"blk\.(1|2[0-9])\.ffn_(up|down)"
    found = run("inspect", str(smollm2_path), "--match", pattern, "--json", command=PROGRAM)
    matched = json.loads(found.stdout)["match"]
    names = [t["name"] for t in json.loads(found.stdout)["tensors"] if re.search(pattern, t["name"])]
    assert len(names) == 22
    assert sorted(matched["tensors"]) == sorted(names)


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["no-such-model"], 2),
        (["/no/such/file.gguf"], 2),
        (["hf://owner/repo/file.gguf"], 2),
        (["smollm2", "-c", "-5"], 2),
        (["smollm2", "-n", "0"], 2),
        (["smollm2", "-ot", "(=CPU"], 2),
        (["smollm2", "-ot", "ffn_up"], 2),
        (["smollm2", "-ot", "ffn_up=NOWHERE7"], 2),
        (["smollm2", "--device", "NOWHERE7"], 2),
        (["smollm2", "-ts", "1,2,3,4,5,6,7,8,9"], 2),
        (["smollm2", "--rpc", "127.0.0.1:1"], 1),
    ],
)
def test_bad_requests_end_with_one_line(arguments: list[str], code: int) -> None:
    result = run(*arguments, "-p", "hi", command=COMMAND[:-1])
    one_error_line(result)
    assert result.returncode == code, result.stderr


def test_bad_files_end_with_one_line(tmp_path: Path) -> None:
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(b"not a model at all" * 100)
    result = run(str(noise), "-p", "hi", command=COMMAND[:-1])
    one_error_line(result)
    assert result.returncode == 1
    result = run(str(tmp_path), "-p", "hi", command=COMMAND[:-1])
    one_error_line(result)
    assert result.returncode in (1, 2)


def test_a_prompt_longer_than_the_context_and_a_bad_grammar(tmp_path: Path, tiny_path: Path) -> None:
    result = run(str(tiny_path), "-p", "word " * 400, "-c", "256", "-t", "2", command=COMMAND[:-1])
    assert "context" in one_error_line(result)
    assert result.returncode == 1
    grammar = tmp_path / "bad.gbnf"
    for text, reason in (("root ::= (", "expecting ')'"), ('other ::= "a"', "'root'")):
        grammar.write_text(text, encoding="utf-8")
        result = run(str(tiny_path), "-p", "hi", "--grammar", str(grammar), *SHORT, command=COMMAND[:-1])
        assert reason in one_error_line(result)
        assert result.returncode == 2
        # the plan's reason, a speed where this machine was measured, and the error: the parser's own message went
        # into that
        told = [line for line in result.stderr.splitlines() if not line.startswith("predicted: ")]
        assert len(told) == 2


# --- Ctrl-C


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def is_gone(pid: int) -> bool:
    """Ended; it may still wait for the one who has to take note of that."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def interrupt(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """Send SIGINT and expect the end, with 130, and no child left behind. What it still said."""
    started_here = children(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    deadline = time.monotonic() + SECONDS
    while not all(map(is_gone, started_here)):
        assert time.monotonic() < deadline, "a child is left"
        time.sleep(0.02)
    return out, err


@contextmanager
def start(*arguments: str, command: list[str] = COMMAND) -> Iterator[subprocess.Popen[bytes]]:
    """A running program; killed at the end if a test that failed left it."""
    with subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # a test reads some of it, communicate() the rest
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def endless(tmp_path: Path) -> list[str]:
    """Options of an answer that allows no end: it goes on until the context is full."""
    grammar = tmp_path / "endless.gbnf"
    grammar.write_text("root ::= [a-z ] root", encoding="utf-8")
    return ["--grammar", str(grammar), "-c", "8192", "-t", "1"]


# The program, which says on standard error when its first batch is begun, and when it has its third piece.
TELLING = """
import sys
from tensortier._llama.sequences import Sequences
from tensortier.request import Request

compute, more, pieces = Sequences.compute, Request.__next__, 0

def computed(self, batch):
    Sequences.compute = compute
    print("the first batch", file=sys.stderr, flush=True)
    return compute(self, batch)

def next_piece(self):
    global pieces
    piece = more(self)
    pieces += 1
    if pieces == 3:
        print("the third piece", file=sys.stderr, flush=True)
    return piece

Sequences.compute, Request.__next__ = computed, next_piece
from tensortier.cli import main
sys.exit(main(sys.argv[1:]))
"""
TELLING_COMMAND = [sys.executable, "-c", TELLING, "run"]


def wait_for_line(process: subprocess.Popen[bytes], told: bytes) -> None:
    assert process.stderr is not None
    while told not in (line := process.stderr.readline()):
        assert line, f"it ended before it said {told!r}"


def test_ctrl_c_during_a_streamed_answer(endless: list[str]) -> None:
    with start("-p", "Hi", *endless) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        rest, err = interrupt(process)
    assert first
    assert rest.endswith(b"\n")
    assert err.endswith(b"tensortier: interrupted\n")
    assert b"Traceback" not in err


def test_ctrl_c_and_json(tiny_path: Path, endless: list[str]) -> None:
    with start(str(tiny_path), "-p", "Hi", "--json", *endless, command=TELLING_COMMAND) as process:
        wait_for_line(process, b"the third piece")
        out, err = interrupt(process)
    found = json.loads(out)  # one object and nothing else
    assert found["finish_reason"] == "cancelled"
    assert err.startswith(b"tensortier: interrupted\n") or b"\ntensortier: interrupted\n" in err


# The program, interrupted where it begins to import a module: by itself, as a signal from outside may come in one of
# the moments in which Python forgets exceptions (in the callback of a weak reference, of which imports make some).
INTERRUPTED = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            sys.meta_path.remove(self)
            print("interrupted there", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from tensortier.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("module", ["typer", "tensortier.hardware", "tensortier.planner", "llama_cpp"])
def test_ctrl_c_at_the_start(module: str, tiny_path: Path, endless: list[str]) -> None:
    """While the options are read, while it plans, before it loads."""
    command = [sys.executable, "-c", INTERRUPTED, module, "run", str(tiny_path)]
    result = run("-p", "Hi", *endless, command=command)
    assert "interrupted there" in result.stderr
    assert (result.returncode, result.stdout.strip()) == (130, ""), result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_during_a_long_prompt(tmp_path: Path) -> None:
    prompt = tmp_path / "long.txt"
    prompt.write_text("The quick brown fox jumps over the lazy dog. " * 700, encoding="utf-8")
    arguments = [
        "smollm2",
        "-f",
        str(prompt),
        "-c",
        "8192",
        "-ub",
        "4096",
        "-b",
        "4096",
        "-t",
        "1",
        "-n",
        "1",
    ]
    with start(*arguments, command=TELLING_COMMAND) as process:
        wait_for_line(process, b"the first batch")  # of many seconds
        out, err = interrupt(process)
    assert out == b""
    assert b"Traceback" not in err


def test_ctrl_c_while_it_loads(endless: list[str]) -> None:
    with start("-p", "Hi", "--verbose", *endless) as process:
        wait_for_line(process, b"llama_model_loader")
        _, err = interrupt(process)
    assert b"Traceback" not in err


def test_a_reader_that_goes_away_ends_it_quietly(endless: list[str]) -> None:
    with start("-p", "Hi", "-q", *endless) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=SECONDS)
    assert err == b""
    assert process.returncode == 141


# --- the chat, in a terminal


class Terminal:
    """A program on a pseudo-terminal: type into it, wait for what it shows."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.environ["TERM"] = "dumb"  # no bracketed paste, no cursor movements
            os.execv(arguments[0], arguments)
        self.shown = ""
        self.all = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Read until ``pattern`` is shown; what was shown up to its end is taken away and returned."""
        deadline = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, f"{pattern!r} never came; last: {self.shown[-2000:]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    data = os.read(self.fd, 65536).decode(errors="replace")
                except OSError:  # Linux's answer when the program has closed the terminal
                    data = ""
                assert data, f"ended before {pattern!r} came: {self.shown[-2000:]!r}"
                self.shown += data
                self.all += data
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text

    def wait_until_it_listens(self) -> None:
        """readline shows the prompt a moment before it waits for keys, and before that it loses a Ctrl-C: until it
        sleeps, and goes on to."""
        deadline = time.monotonic() + SECONDS
        asleep = 0
        while asleep < 10:
            assert time.monotonic() < deadline
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            asleep = asleep + 1 if state == "S" else 0
            time.sleep(0.01)

    def wait(self) -> int:
        """The exit code, after reading what is left."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.all += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:
                    break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # ended, and waited for by the test
        os.close(self.fd)


@contextmanager
def terminal(folder: Path, *options: str) -> Iterator[Terminal]:
    program = Terminal([*COMMAND, "--temp", "0", "-s", "Be brief.", *options], folder)
    try:
        yield program
    finally:
        program.close()


SPEEDS = r"answer: \d+ tokens, [\d.]+ tokens/s(; interrupted)?\r\n"


def test_a_chat_in_the_terminal(tmp_path: Path) -> None:
    with terminal(tmp_path, "-c", "1024", "-n", "40", "-t", "2") as program:
        program.wait_for(r"/help lists the commands")
        program.wait_for("> ")
        program.type("/help\n")
        program.wait_for(r"/save FILE")
        program.wait_for("keeps what there is of it")
        program.type("/nonsense\n")
        program.wait_for("no such command")

        program.type("Say hello \\\nto me.\n")
        program.wait_for(SPEEDS)
        program.type('"""\nfirst line\nsecond line\n"""\n')
        second = program.wait_for(SPEEDS)
        assert "cached" in second  # the history was sent again, and computed once
        program.type("/stats\n")
        program.wait_for(r"context: \d+ of 1024 tokens; loaded in")
        program.wait_for(r"CPU: .*KV cache")

        program.type("/save talk.json\n")
        program.wait_for("saved 5 messages to talk.json")
        program.type("/save talk.json\n")
        program.wait_for("is there already")
        messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
        assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
        assert messages[1]["content"] == "Say hello \nto me."
        assert messages[3]["content"] == "first line\nsecond line"
        assert all(m["content"] for m in messages)

        program.type("/reset\n")
        program.wait_for("forgotten")
        program.wait_for("> ")
        program.type("/quit\n")
        assert program.wait() == 0
        assert "Traceback" not in program.all


def test_an_answer_is_interrupted_in_the_terminal(tmp_path: Path, endless: list[str]) -> None:
    """What there is of it is kept, and the chat goes on."""
    with terminal(tmp_path, *endless) as program:
        program.wait_for("> ")
        program.type(QUESTION_OF_MANY_WORDS + "\n")
        program.wait_for(
            re.escape(QUESTION_OF_MANY_WORDS) + r"\s+[a-z]+"
        )  # the echo of the question, then the answer
        program.type("\x03")
        assert "interrupted" in program.wait_for(SPEEDS)
        program.type("/save talk.json\n")
        program.wait_for("saved 3 messages")
        messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
        assert messages[1]["content"] == QUESTION_OF_MANY_WORDS
        assert messages[2]["content"]
        program.type("/save! talk.json\n")
        program.wait_for("saved 3 messages")

        program.wait_for("> ")
        program.wait_until_it_listens()
        program.type("\x03")
        program.wait_for("Ctrl-C again leaves")
        program.wait_for("> ")
        program.type("/quit\n")
        assert program.wait() == 0
        assert "Traceback" not in program.all


def test_two_ctrl_c_at_the_prompt_leave(tmp_path: Path) -> None:
    with terminal(tmp_path, "-c", "1024", "-t", "2") as program:
        program.wait_for("lists the commands")
        for answer in ("again leaves", ""):
            program.wait_for("> ")
            program.wait_until_it_listens()
            program.type("\x03")
            program.wait_for(answer)
        assert program.wait() == 130
        assert "Traceback" not in program.all
