"""Pieces of the engine as OpenAI's objects: whole answers and the chunks of a stream."""

from __future__ import annotations

import contextlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensortier.server.respond import Work
from tensortier.types import GenerationStats, Piece, TokenLogprob

if TYPE_CHECKING:
    from tensortier.engine import Request

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Answer(ABC):
    """An answer with several choices, which are put together piece by piece.

    Args:
        work: whose requests are the choices, in order.
        prompts: that the choices are to; as many choices to each, one after another.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, work: Work, *, prompts: int = 1) -> None:
        self._work = work
        self._prompts = prompts
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": work.model,
        }

    async def whole(self) -> dict[str, Any]:
        async with contextlib.aclosing(self._work.pieces()) as arriving:
            async for pieces in arriving:
                for index, piece in pieces:
                    self.add(index, piece)
        choices = [self.choice(index) for index in range(len(self._work.requests))]
        return {
            **self._head,
            "object": self.kind,
            "choices": choices,
            "usage": usage(self._work.requests, self._prompts),
        }

    async def stream(self, with_usage: bool) -> AsyncGenerator[list[Any]]:
        """Chunks, in lists that are to be sent together."""
        head = {**self._head, "object": self.chunk_kind}
        end = {"usage": None} if with_usage else {}

        def chunk(choice: dict[str, Any]) -> dict[str, Any]:
            return {**head, "choices": [choice], **end}

        yield [chunk(choice) for index in range(len(self._work.requests)) for choice in self.opening(index)]
        async with contextlib.aclosing(self._work.pieces()) as arriving:
            async for pieces in arriving:
                yield [chunk(choice) for index, piece in pieces for choice in self.chunks(index, piece)]
        last: list[Any] = ["[DONE]"]
        if with_usage:
            last.insert(0, {**head, "choices": [], "usage": usage(self._work.requests, self._prompts)})
        yield last

    @abstractmethod
    def add(self, index: int, piece: Piece) -> None:
        """Keep a piece for ``choice``."""

    @abstractmethod
    def choice(self, index: int) -> dict[str, Any]:
        """The whole choice."""

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a choice begins with in a stream."""
        del index
        return []

    @abstractmethod
    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """A piece in a stream."""


class ChatAnswer(Answer):
    """``one_call``: of several tool calls only the first is passed on."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, work: Work, *, logprobs: bool, one_call: bool) -> None:
        super().__init__(work)
        self._with_logprobs = logprobs
        self._one_call = one_call
        n = len(work.requests)
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._calls: list[dict[int, dict[str, Any]]] = [{} for _ in range(n)]
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        self._reasons: list[str | None] = [None] * n

    def add(self, index: int, piece: Piece) -> None:
        self._texts[index].append(piece.text)
        self._logprobs[index] += [chat_logprob(token) for token in piece.logprobs]
        for call in self._tool_calls(piece):
            _merge(self._calls[index], call)
        self._reasons[index] = piece.finish_reason or self._reasons[index]

    def choice(self, index: int) -> dict[str, Any]:
        text = "".join(self._texts[index])
        calls = [call for _, call in sorted(self._calls[index].items())]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": self._logprobs[index], "refusal": None} if self._with_logprobs else None,
            "finish_reason": self._reasons[index],
        }

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": ""})]

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        found = []
        if piece.text or piece.logprobs:
            chunk = self._chunk(index, {"content": piece.text})
            if self._with_logprobs:
                chunk["logprobs"] = {
                    "content": [chat_logprob(token) for token in piece.logprobs],
                    "refusal": None,
                }
            found.append(chunk)
        if calls := self._tool_calls(piece):
            found.append(self._chunk(index, {"tool_calls": calls}))
        if piece.finish_reason is not None:
            found.append({**self._chunk(index, {}), "finish_reason": piece.finish_reason})
        return found

    def _tool_calls(self, piece: Piece) -> list[dict[str, Any]]:
        calls: Sequence[dict[str, Any]] = (piece.delta or {}).get("tool_calls") or ()
        return [dict(call) for call in calls if not self._one_call or call.get("index", 0) == 0]

    @staticmethod
    def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


class TextAnswer(Answer):
    """``echo``: the prompts that the choices begin with, one for each choice; empty for none."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, work: Work, *, prompts: int, logprobs: bool, echo: Sequence[str]) -> None:
        super().__init__(work, prompts=prompts)
        self._with_logprobs = logprobs
        self._echo = echo
        n = len(work.requests)
        self._texts: list[list[str]] = [[echo[i]] if echo else [] for i in range(n)]
        self._tokens: list[list[TokenLogprob]] = [[] for _ in range(n)]
        self._reasons: list[str | None] = [None] * n
        self._offsets = [len(echo[i]) if echo else 0 for i in range(n)]

    def add(self, index: int, piece: Piece) -> None:
        self._texts[index].append(piece.text)
        self._tokens[index] += piece.logprobs
        self._reasons[index] = piece.finish_reason or self._reasons[index]

    def choice(self, index: int) -> dict[str, Any]:
        text = "".join(self._texts[index])
        return self._choice(index, text, self._tokens[index], self._reasons[index])

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._choice(index, self._echo[index], (), None)] if self._echo else []

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        return [self._choice(index, piece.text, piece.logprobs, piece.finish_reason)]

    def _choice(
        self, index: int, text: str, tokens: Sequence[TokenLogprob], reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._with_logprobs:
            logprobs = text_logprobs(tokens, self._offsets[index])
            self._offsets[index] += sum(len(token) for token in logprobs["tokens"])
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def usage(requests: Sequence[Request], prompts: int) -> dict[str, Any]:
    """Of all choices; a prompt that several choices share counts once."""
    stats: list[GenerationStats] = [request.stats for request in requests]
    first = stats[:: max(1, len(stats) // prompts)]
    prompt = sum(s.prompt_tokens for s in first)
    completion = sum(s.completion_tokens for s in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in first)},
    }


def chat_logprob(token: TokenLogprob) -> dict[str, Any]:
    top = [_logprob(data, value) for _, data, value in token.top]
    return {**_logprob(token.token_bytes, token.logprob), "top_logprobs": top}


def text_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """``offset``: of the first token, in characters."""
    texts = [_text(token.token_bytes) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(token.logprob, _LEAST_LOGPROB) for token in tokens],
        "top_logprobs": [
            {_text(data): max(value, _LEAST_LOGPROB) for _, data, value in token.top} for token in tokens
        ],
        "text_offset": offsets,
    }


def _logprob(data: bytes, value: float) -> dict[str, Any]:
    return {"token": _text(data), "logprob": max(value, _LEAST_LOGPROB), "bytes": list(data)}


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _merge(calls: dict[int, dict[str, Any]], delta: Mapping[str, Any]) -> None:
    """Add a streamed part of a tool call to the calls so far."""
    index = int(delta.get("index", 0))
    call = calls.setdefault(
        index, {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
    )
    if delta.get("id"):
        call["id"] = delta["id"]
    function = delta.get("function") or {}
    if function.get("name"):
        call["function"]["name"] = function["name"]
    call["function"]["arguments"] += function.get("arguments") or ""
