"""The chat in the terminal: a conversation, its commands, and the loop that reads and answers.

The loop knows nothing of the engine: it is given a function that answers a list of messages. Answers are
written by that function; everything the chat itself says goes to standard error.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tensortier.errors import TensortierError, UsageError

Message = dict[str, str]
ReadLine = Callable[[str], str]  # prompt -> line; raises EOFError at the end, KeyboardInterrupt at Ctrl-C

PROMPT = "> "
CONTINUED = "... "
BLOCK = '"""'

HELP = f"""\
A line is a message. A line that ends in \\ goes on in the next; {BLOCK} begins and ends a block of lines.
/help         this text
/stats        speeds of the last answer, memory per device
/reset        forget the conversation
/save FILE    write the conversation to FILE (.json or .md); /save! FILE replaces an existing file
/quit         leave (also Ctrl-D)
Ctrl-C stops an answer and keeps what there is of it."""


@dataclass
class Conversation:
    """The messages so far, in the form chat templates take them."""

    model: str
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def to_json(self) -> str:
        return (
            json.dumps({"model": self.model, "messages": self.messages}, indent=2, ensure_ascii=False) + "\n"
        )

    def to_markdown(self) -> str:
        parts = [f"# Conversation with {self.model}\n"]
        parts += [f"## {m['role'].capitalize()}\n\n{m['content']}\n" for m in self.messages]
        return "\n".join(parts)

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the conversation, as JSON or Markdown by the suffix. The file appears whole or not at all.

        Raises UsageError for another suffix, a file that is there already (unless ``overwrite``), and a
        place that cannot be written.
        """
        suffix = path.suffix.lower()
        if suffix == ".json":
            text = self.to_json()
        elif suffix in (".md", ".markdown"):
            text = self.to_markdown()
        else:
            raise UsageError(f"{path} is neither .json nor .md: the suffix says how to write it")
        try:
            _write_whole(path, text, overwrite=overwrite)
        except FileExistsError as exc:
            raise UsageError(f"{path} is there already: /save! {path} replaces it") from exc
        except OSError as exc:
            raise UsageError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def _write_whole(path: Path, text: str, *, overwrite: bool) -> None:
    """Write to a temporary file beside ``path``, then give it the name. Raises FileExistsError."""
    if not overwrite and path.exists():
        raise FileExistsError(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are private; a saved text is an ordinary file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def read_message(read_line: ReadLine) -> str:
    """One message, of one or more lines. Raises EOFError when the input ends before it begins."""
    line = read_line(PROMPT)
    if line.lstrip().startswith(BLOCK):
        return _read_block(line.lstrip()[len(BLOCK) :], read_line)
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        try:
            line = read_line(CONTINUED)
        except EOFError:
            line = ""
    lines.append(line)
    return "\n".join(lines).strip()


def _read_block(rest: str, read_line: ReadLine) -> str:
    lines = []
    while BLOCK not in rest:
        lines.append(rest)
        try:
            rest = read_line(CONTINUED)
        except EOFError:
            rest = BLOCK
    lines.append(rest[: rest.index(BLOCK)])
    return "\n".join(lines).strip("\n")


@dataclass(frozen=True)
class Reply:
    """What the model said to one list of messages."""

    text: str
    cancelled: bool = False


class Chat:
    """The loop. ``answer`` is given the messages and shows its text itself; ``stats`` are the lines of
    ``/stats``; ``say`` shows one line of the chat's own."""

    def __init__(
        self,
        conversation: Conversation,
        answer: Callable[[list[Message]], Reply],
        *,
        stats: Callable[[], Sequence[str]],
        read_line: ReadLine,
        say: Callable[[str], None],
    ) -> None:
        self.conversation = conversation
        self._answer = answer
        self._stats = stats
        self._read_line = read_line
        self._say = say

    def run(self) -> bool:
        """Read and answer until the user leaves. True after /quit or the end of the input, False after two
        Ctrl-C at the prompt."""
        interrupted = False
        while True:
            try:
                text = read_message(self._read_line)
            except EOFError:
                self._say("")
                return True
            except KeyboardInterrupt:
                if interrupted:
                    self._say("")
                    return False
                interrupted = True
                self._say("\nCtrl-C again leaves; so does /quit")
                continue
            interrupted = False
            # "/home/..." at the start of a pasted text is a message: commands are one line
            if text.startswith("/") and "\n" not in text:
                if not self._command(text):
                    return True
            elif text:
                self._ask(text)

    def _ask(self, text: str) -> None:
        messages = self.conversation.messages
        messages.append({"role": "user", "content": text})
        try:
            reply = self._answer(messages)
        except TensortierError as exc:
            messages.pop()  # it can be asked again, shorter or after /reset
            self._say(f"tensortier: error: {exc}")
            return
        except BaseException:
            messages.pop()
            raise
        if reply.text or not reply.cancelled:
            messages.append({"role": "assistant", "content": reply.text})
        else:
            messages.pop()  # stopped before the first word: as if it had not been asked

    def _command(self, line: str) -> bool:
        """Carry out one command; False to leave."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/quit":
            return False
        if name == "/help":
            self._say(HELP)
        elif name == "/stats":
            for stat in self._stats():
                self._say(stat)
        elif name == "/reset":
            self.conversation.reset()
            self._say("the conversation is forgotten")
        elif name in ("/save", "/save!"):
            self._save(argument, overwrite=name.endswith("!"))
        else:
            self._say(f"{name}: no such command; /help lists them")
        return True

    def _save(self, argument: str, *, overwrite: bool) -> None:
        if not argument:
            self._say("/save needs a file name, ending in .json or .md")
            return
        try:
            path = Path(argument).expanduser()
            self.conversation.save(path, overwrite=overwrite)
        except (UsageError, RuntimeError) as exc:  # RuntimeError: "~name" of nobody
            self._say(f"tensortier: error: {exc}")
        else:
            self._say(f"saved {len(self.conversation.messages)} messages to {path}")
