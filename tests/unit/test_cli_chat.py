"""The chat's loop, driven by scripted lines and scripted answers (no engine), and the engine's thread."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tensortier.chat import Chat, Conversation, Message, Reply
from tensortier.cli.worker import EngineThread
from tensortier.errors import Cancelled, ContextFull

Line = str | type[BaseException]


def drive(
    lines: list[Line], answer: Callable[[list[Message]], Reply], system: str | None = None
) -> tuple[Conversation, list[str], bool]:
    """Run a chat over ``lines`` (an exception type is raised instead of read), ended by the end of input."""
    said: list[str] = []
    left = iter(lines)

    def read_line(prompt: str) -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    conversation = Conversation("m", system)
    chat = Chat(conversation, answer, stats=lambda: ["the stats"], read_line=read_line, say=said.append)
    return conversation, said, chat.run()


def echo(messages: list[Message]) -> Reply:
    return Reply(f"{len(messages)}:{messages[-1]['content']}")


def contents(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


def test_history_is_kept_across_turns() -> None:
    conversation, _, left = drive(["one", "two", "", "/quit", "never"], echo, system="be brief")
    assert left
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert contents(conversation) == ["be brief", "one", "2:one", "two", "4:two"]


def test_lines_that_belong_together() -> None:
    lines: list[Line] = ["a\\", "b\\", "c", '"""', "d", "/e", 'f"""', '"""one"""', "g\\"]
    conversation, _, _ = drive(lines, lambda messages: Reply("ok"))
    assert contents(conversation)[::2] == ["a\nb\nc", "d\n/e\nf", "one", "g"]


def test_reset_keeps_the_system_prompt() -> None:
    conversation, _, _ = drive(["one", "/reset", "two"], echo, system="s")
    assert contents(conversation) == ["s", "two", "2:two"]


def test_commands_say_something_and_never_reach_the_model() -> None:
    def refuse(messages: list[Message]) -> Reply:
        raise AssertionError("a command was answered")

    _, said, _ = drive(
        ["/help", "/stats", "/nonsense x", "/save", "/save a.txt", "/save /no/dir/a.md"], refuse
    )
    assert "/save FILE" in said[0]
    assert said[1:3] == ["the stats", "/nonsense: no such command; /help lists them"]
    assert "needs a file name" in said[3]
    assert "neither .json nor .md" in said[4]
    assert "cannot be written" in said[5]


def test_a_cancelled_answer_is_kept_as_far_as_it_came() -> None:
    replies = iter([Reply("half", cancelled=True), Reply("", cancelled=True), Reply("", cancelled=False)])
    conversation, _, _ = drive(["one", "two", "three"], lambda messages: next(replies))
    assert contents(conversation) == ["one", "half", "three", ""]


def test_an_error_takes_the_message_back_and_the_chat_goes_on() -> None:
    def answer(messages: list[Message]) -> Reply:
        if messages[-1]["content"] == "long":
            raise ContextFull("too long")
        return Reply("fine")

    conversation, said, left = drive(["long", "short"], answer)
    assert left
    assert contents(conversation) == ["short", "fine"]
    assert said[0] == "tensortier: error: too long"


def test_ctrl_c_twice_at_the_prompt_leaves() -> None:
    conversation, said, left = drive(
        [KeyboardInterrupt, "one", KeyboardInterrupt, KeyboardInterrupt, "two"], echo
    )
    assert not left
    assert contents(conversation) == ["one", "1:one"]
    assert "Ctrl-C again" in said[0]


def test_save_as_json_and_markdown(tmp_path: Path) -> None:
    as_json, as_text = tmp_path / "talk.json", tmp_path / "talk.md"
    lines: list[Line] = ["héllo", f"/save {as_json}", f"/save {as_text}", "more", f"/save {as_text}"]
    _, said, _ = drive(lines, echo)
    saved = json.loads(as_json.read_text(encoding="utf-8"))
    assert saved["messages"] == [
        {"role": "user", "content": "héllo"},
        {"role": "assistant", "content": "1:héllo"},
    ]
    assert "## User\n\nhéllo\n" in as_text.read_text(encoding="utf-8")
    assert "is there already" in said[2]
    assert "more" not in as_text.read_text(encoding="utf-8")
    drive(["other", f"/save! {as_text}"], echo)
    assert "other" in as_text.read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["talk.json", "talk.md"]  # no temporary file stays
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(as_text.stat().st_mode) == 0o666 & ~mask


# --- the thread


@pytest.fixture
def worker() -> Iterator[EngineThread]:
    thread = EngineThread()
    yield thread
    thread.close()


def counting(stop: threading.Event, ended: threading.Event) -> Iterator[int]:
    """A source without an end (but for two minutes) that ends as the engine does: with Cancelled."""
    try:
        for number in range(24_000):
            if stop.wait(0.005):
                break
            yield number
        else:
            return
        raise Cancelled("stopped")
    finally:
        ended.set()


def test_stream_keeps_order_and_one_thread(worker: EngineThread) -> None:
    assert list(worker.stream(lambda: range(1000), lambda: None)) == list(range(1000))
    threads = {worker.call(threading.get_ident, lambda: None) for _ in range(3)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_errors_come_over(worker: EngineThread) -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise ContextFull("no room")

    seen = []
    with pytest.raises(ContextFull, match="no room"):
        for item in worker.stream(fail, lambda: None):
            seen.append(item)
    assert seen == [1]


def test_ctrl_c_cancels_and_keeps_what_there_is(worker: EngineThread) -> None:
    stop, ended = threading.Event(), threading.Event()
    before = signal.getsignal(signal.SIGINT)
    seen = []
    with pytest.raises(Cancelled):
        for item in worker.stream(lambda: counting(stop, ended), stop.set):
            seen.append(item)
            if item == 5:
                os.kill(os.getpid(), signal.SIGINT)
    assert seen[:6] == list(range(6))
    assert ended.is_set()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_cancel_that_comes_too_early_is_repeated(worker: EngineThread) -> None:
    stop, asked = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.wait(120)
        stop.clear()  # as an engine does when a request begins
        yield from counting(stop, threading.Event())

    def cancel() -> None:
        stop.set()
        asked.set()

    with pytest.raises(Cancelled):
        list(worker.stream(source, cancel))


def test_a_consumer_that_stops_early_ends_the_source(worker: EngineThread) -> None:
    stop, ended = threading.Event(), threading.Event()
    stream = worker.stream(lambda: counting(stop, ended), stop.set)
    assert next(iter(stream)) == 0
    stream.close()  # type: ignore[attr-defined]
    assert ended.is_set()
    assert worker.call(lambda: "free", lambda: None) == "free"


def test_a_second_ctrl_c_ends_a_process_that_is_stuck() -> None:
    program = textwrap.dedent("""
        import time
        from tensortier.cli.worker import EngineThread

        def work():  # does not listen to cancel
            print("inside", flush=True)
            time.sleep(600)

        EngineThread().call(work, lambda: print("asked to end", flush=True))
    """)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"inside\n"
        process.send_signal(signal.SIGINT)
        # twice: it goes on after the first time
        assert [process.stdout.readline() for _ in range(2)] == [b"asked to end\n"] * 2
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.count(b"\n") == 2
    assert b"Traceback" not in err
