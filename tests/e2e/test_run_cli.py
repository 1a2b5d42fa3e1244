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
ENDLESS = "Count from one to ten thousand, in words."
SECONDS = 60  # generous: the machine may be busy


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


def interrupt(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Send SIGINT and expect the end, with 130, soon, and no child left behind."""
    started_here = children(process.pid)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    process.wait(timeout=SECONDS)
    assert time.monotonic() - begun < seconds
    assert process.returncode == 130
    assert [pid for pid in started_here if Path(f"/proc/{pid}").exists()] == []


@contextmanager
def start(*arguments: str, command: list[str] = COMMAND) -> Iterator[subprocess.Popen[bytes]]:
    """A running program; killed at the end if a test that failed left it."""
    with subprocess.Popen(
        [*command, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_during_a_streamed_answer() -> None:
    with start("-p", ENDLESS, "-c", "2048", "-t", "2") as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(1)
        interrupt(process, seconds=10)
        rest, err = process.stdout.read(), process.stderr.read()
    assert first
    assert rest.endswith(b"\n")
    assert err.endswith(b"tensortier: interrupted\n")
    assert b"Traceback" not in err


def test_ctrl_c_and_json(tiny_path: Path) -> None:
    command = [*PROGRAM, "run", str(tiny_path)]
    with start("-p", "Hi", "-c", "8192", "-t", "1", "--json", "--verbose", command=command) as process:
        assert process.stdout is not None and process.stderr is not None
        while b"reserve took" not in (line := process.stderr.readline()):  # one of the load's last lines
            assert line
        time.sleep(0.5)
        interrupt(process, seconds=10)
        out, err = process.stdout.read(), process.stderr.read()
    found = json.loads(out)  # one object and nothing else
    assert found["finish_reason"] == "cancelled"
    assert b"\ntensortier: interrupted\n" in err


@pytest.mark.parametrize("seconds", [0.15, 0.45])  # while modules are imported, while it plans
def test_ctrl_c_at_the_start(tiny_path: Path, seconds: float) -> None:
    with start("-p", "Hi", "-c", "8192", command=[*PROGRAM, "run", str(tiny_path)]) as process:
        assert process.stderr is not None
        time.sleep(seconds)
        interrupt(process, seconds=10)
        err = process.stderr.read()
    assert b"Traceback" not in err


def test_ctrl_c_during_a_long_prompt(tmp_path: Path) -> None:
    prompt = tmp_path / "long.txt"
    prompt.write_text("The quick brown fox jumps over the lazy dog. " * 400, encoding="utf-8")
    with start("-f", str(prompt), "-c", "8192", "-t", "1", "-n", "1") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stderr.readline()  # the plan's reason: the load comes next, then ten seconds of prompt
        time.sleep(2)
        interrupt(process, seconds=10)
        out, err = process.stdout.read(), process.stderr.read()
    assert out == b""
    assert b"Traceback" not in err


def test_ctrl_c_while_it_loads() -> None:
    with start("-p", ENDLESS) as process:
        assert process.stderr is not None
        process.stderr.readline()  # the plan's reason: the load comes next
        interrupt(process, seconds=10)
        err = process.stderr.read()
    assert b"Traceback" not in err


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    with start("-p", ENDLESS, "-c", "2048", "-t", "2", "-q") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=30)
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


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    program = Terminal(
        [*COMMAND, "-c", "1024", "-n", "40", "--temp", "0", "-t", "2", "-s", "Be brief."], tmp_path
    )
    yield program
    program.close()


SPEEDS = r"answer: \d+ tokens, [\d.]+ tokens/s(; interrupted)?\r\n"


def test_a_chat_in_the_terminal(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for(r"/help lists the commands")
    terminal.wait_for("> ")
    terminal.type("/help\n")
    terminal.wait_for(r"/save FILE")
    terminal.wait_for("keeps what there is of it")
    terminal.type("/nonsense\n")
    terminal.wait_for("no such command")

    terminal.type("Say hello \\\nto me.\n")
    terminal.wait_for(SPEEDS)
    terminal.type('"""\nfirst line\nsecond line\n"""\n')
    second = terminal.wait_for(SPEEDS)
    assert "cached" in second  # the history was sent again, and computed once
    terminal.type("/stats\n")
    terminal.wait_for(r"context: \d+ of 1024 tokens; loaded in")
    terminal.wait_for(r"CPU: .*KV cache")

    terminal.type("/save talk.json\n")
    terminal.wait_for("saved 5 messages to talk.json")
    terminal.type("/save talk.json\n")
    terminal.wait_for("is there already")
    messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[1]["content"] == "Say hello \nto me."
    assert messages[3]["content"] == "first line\nsecond line"
    assert all(m["content"] for m in messages)

    terminal.type("/reset\n")
    terminal.wait_for("forgotten")
    terminal.type(ENDLESS + "\n")
    terminal.wait_for(re.escape(ENDLESS) + r"\s+\w+\W+\w+")  # the echo of the question, then two words
    terminal.type("\x03")
    assert "interrupted" in terminal.wait_for(SPEEDS)
    terminal.type("/save! talk.json\n")
    terminal.wait_for("saved 3 messages")
    messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert messages[1]["content"] == ENDLESS
    assert messages[2]["content"]

    terminal.wait_for("> ")
    time.sleep(0.3)  # readline shows the prompt a moment before it listens to signals
    terminal.type("\x03")
    terminal.wait_for("Ctrl-C again leaves")
    terminal.wait_for("> ")
    terminal.type("/quit\n")
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.all


def test_two_ctrl_c_at_the_prompt_leave(terminal: Terminal) -> None:
    terminal.wait_for("lists the commands")
    for answer in ("again leaves", ""):
        terminal.wait_for("> ")
        time.sleep(0.3)  # readline shows the prompt a moment before it listens to signals
        terminal.type("\x03")
        terminal.wait_for(answer)
    assert terminal.wait() == 130
    assert "Traceback" not in terminal.all
