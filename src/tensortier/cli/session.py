"""From the checked options of ``run`` to a loaded engine and its answers."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import typer

from tensortier.chat import Chat, Conversation, Message, Reply
from tensortier.cli.answer import (
    Answer,
    DriveMeter,
    answer_json,
    memory_lines,
    print_plan,
    speed_line,
    stream_answer,
)
from tensortier.cli.common import note, progress_bar
from tensortier.cli.deciding import make_plan
from tensortier.cli.turn import loading_turn
from tensortier.cli.worker import EXIT_INTERRUPTED, EngineThread
from tensortier.deciding import Planned, Wish, given_plan, plan_with_less, ram_of
from tensortier.errors import Cancelled, OutOfMemory, PlanError, UsageError
from tensortier.types import Plan, Sampling

if TYPE_CHECKING:
    from tensortier.engine import Engine

_LONGEST_TEXT = 64 << 20  # bytes
_PLANS_AGAIN = 3  # after allocations that failed
_WAIT_SECONDS = 2.0  # for piped data, before a line says what the program waits for


@dataclass(frozen=True)
class Request:
    """What ``run`` was asked. ``prompt`` None is a chat."""

    wish: Wish
    prompt: str | None
    system: str | None
    raw: bool
    json: bool
    verbose: bool
    quiet: bool
    sampling: Sampling
    plan: Plan | None = None  # from a file; then the wish says nothing but the model


def argument_text(value: str, option: str) -> str:
    """An argument's text as UTF-8, whatever the locale says of it. Raises UsageError."""
    try:
        return os.fsencode(value).decode("utf-8")
    except UnicodeError as exc:
        raise UsageError(f"the text of {option} is not UTF-8") from exc


def _read_all(stream: BinaryIO, what: str) -> str:
    data = stream.read(_LONGEST_TEXT + 1)
    if len(data) > _LONGEST_TEXT:  # a device without end among them
        raise UsageError(f"{what} is longer than {_LONGEST_TEXT >> 20} MiB, more than any model can read")
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{what} is not UTF-8 text") from exc


def _read_text(path: Path, what: str) -> str:
    try:
        with path.open("rb") as file:
            return _read_all(file, f"{what} {path}")
    except OSError as exc:
        raise UsageError(f"{what} {path} cannot be read: {exc.strerror or exc}") from exc


def read_grammar(path: Path) -> str:
    """The grammar file's text. Raises UsageError."""
    text = _read_text(path, "the grammar file")
    if not text.strip():
        raise UsageError(f"the grammar file {path} is empty")
    return text


def read_prompt(prompt: str | None, file: Path | None) -> str | None:
    """The one-shot prompt: ``-p`` or ``-f``, then a blank line and what is piped in, or that alone. None when
    nothing is given and standard input is a terminal. Raises UsageError for an empty one."""
    if prompt is not None and file is not None:
        raise UsageError("-p and -f both give the prompt: use one of them")
    if file is not None:
        prompt = _read_text(file, "the prompt file")
    parts = [] if prompt is None else [prompt]
    if sys.stdin is not None and not sys.stdin.isatty():
        piped = _read_standard_input()
        if piped.strip():
            parts.append(piped)
    elif prompt is None:
        return None
    text = "\n\n".join(part.strip("\n") for part in parts) if len(parts) > 1 else "".join(parts)
    if not text.strip():
        where = "standard input" if prompt is None else "the prompt"
        raise UsageError(f"{where} is empty: give -p TEXT, -f FILE, or pipe a prompt in")
    return text


def _read_standard_input() -> str:
    # Someone's script may hold the other end open without knowing: say what is being waited for.
    timer = threading.Timer(_WAIT_SECONDS, note, ("reading standard input to its end ...",))
    timer.daemon = True
    timer.start()
    try:
        return _read_all(sys.stdin.buffer, "standard input")
    finally:
        timer.cancel()


def read_plan(path: Path) -> Plan:
    """The plan in a file that ``tensortier plan --json`` wrote. Raises UsageError, PlanError."""
    from tensortier import planfile

    text = _read_text(path, "the plan file")
    try:
        return planfile.parse(text)
    except PlanError as exc:
        raise PlanError(f"the plan file {path} cannot be used: {exc}") from exc


def run_session(request: Request) -> None:
    """Plan, load, answer. Raises ``typer.Exit(130)`` after a Ctrl-C that ended it."""
    worker = EngineThread()
    try:
        with ExitStack() as turn:
            turn.enter_context(loading_turn(quiet=request.quiet))
            if request.plan is not None:
                planned, plan = None, given_plan(request.plan, request.wish.model)
            else:
                planned = make_plan(request.wish, quiet=request.quiet)
                plan = planned.plan
            if not _fills_ram(plan, planned):
                turn.close()
            print_plan(plan, quiet=request.quiet)
            engine, plan = _load_or_plan_again(plan, planned, worker, request)
        try:
            if request.prompt is None:
                _chat(engine, worker, request)
            else:
                _one_shot(engine, worker, plan, request, request.prompt)
        finally:
            worker.call(engine.close, lambda: None)
    finally:
        worker.close()


def _fills_ram(plan: Plan, planned: Planned | None) -> bool:
    """Whether another that counted the same free RAM would find too little of it."""
    if plan.tier is not None or planned is None:
        return plan.tier is not None
    return 2 * ram_of(plan, planned.hardware) > planned.hardware.ram_available


def _load_or_plan_again(
    plan: Plan, planned: Planned | None, worker: EngineThread, request: Request
) -> tuple[Engine, Plan]:
    """The engine and the plan that was loaded. Where memory does not suffice after all, a plan that was made here
    is made again with less of it; one that somebody gave is not changed."""
    for _ in range(_PLANS_AGAIN):
        try:
            return _load(plan, worker, request), plan
        except OutOfMemory as exc:
            if planned is None or request.wish.manual.given:
                raise
            planned = plan_with_less(planned, exc)
            plan = planned.plan
            note(f"tensortier: warning: {exc}; planned again: {'; '.join(plan.reasons)}")
    return _load(plan, worker, request), plan


def _load(plan: Plan, worker: EngineThread, request: Request) -> Engine:
    cancel = threading.Event()

    def make() -> Engine:
        # imported in the worker too: it takes a while, and CPython forgets the exit code when a Ctrl-C breaks
        # off code that runs through exec(), as the making of dataclasses and named tuples does
        from tensortier.engine import Engine

        return Engine(plan, progress=progress, verbose=request.verbose, cancel=cancel)

    bar = sys.stderr.isatty() and not request.quiet and not request.verbose
    with progress_bar(bar, "loading") as progress:
        engine = worker.call(make, cancel.set)
    if cancel.is_set():  # too late for the engine to see
        worker.call(engine.close, lambda: None)
        raise Cancelled("loading was cancelled")
    for line in () if engine.paged is None else engine.paged.warnings():
        note(f"tensortier: warning: {line}")
    return engine


def _one_shot(engine: Engine, worker: EngineThread, plan: Plan, request: Request, prompt: str) -> None:
    drive = DriveMeter(engine)
    if request.raw:
        ask = partial(engine.complete, prompt, request.sampling)
    else:
        messages = Conversation(request.wish.model, request.system).messages
        messages.append({"role": "user", "content": prompt})
        ask = partial(engine.chat, messages, request.sampling)
    answer = stream_answer(worker, ask, show=not request.json)
    if request.json:
        print(answer_json(engine, plan, answer, layers=request.verbose))
    if not request.quiet:
        note(speed_line(answer) + drive.line())
    if answer.cancelled:
        note("tensortier: interrupted")
        raise typer.Exit(EXIT_INTERRUPTED)


def _chat(engine: Engine, worker: EngineThread, request: Request) -> None:
    latest: Answer | None = None
    drive = DriveMeter(engine)

    def answer(messages: list[Message]) -> Reply:
        nonlocal latest
        # a copy: the engine may keep what it is given, the conversation goes on
        ask = partial(engine.chat, list(messages), request.sampling)
        latest = stream_answer(worker, ask, show=True)
        if not request.quiet:
            note(speed_line(latest) + drive.line() + ("; interrupted" if latest.cancelled else ""))
        return Reply(latest.text, latest.cancelled)

    def stats() -> list[str]:
        first = "no answer yet" if latest is None else speed_line(latest)
        used = 0 if latest is None else latest.stats.prompt_tokens + latest.stats.completion_tokens
        loaded = f"context: {used} of {engine.n_ctx} tokens; loaded in {engine.load_seconds:.1f} s"
        return [first, loaded, *memory_lines(engine)]

    if not request.quiet:
        note("Chat with " + request.wish.model + "; /help lists the commands, Ctrl-D leaves")
    conversation = Conversation(request.wish.model, request.system)
    chat = Chat(conversation, answer, stats=stats, read_line=_line_reader(), say=note)
    if not chat.run():
        raise typer.Exit(EXIT_INTERRUPTED)


def _line_reader() -> Callable[[str], str]:
    """Reads a line from the terminal, with editing and history where Python has readline."""
    with suppress(ImportError):  # Windows has none: its console edits lines by itself
        import readline  # noqa: F401  importing it is what gives input() its editing
    return input
