"""``/v1/*``: OpenAI's interface."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tensortier.errors import ModelNotFound
from tensortier.library import LibraryModel
from tensortier.server.choices import Answer, ChatAnswer, TextAnswer
from tensortier.server.host import ModelHost
from tensortier.server.limits import Gate
from tensortier.server.metrics import Metrics
from tensortier.server.problems import Problem
from tensortier.server.respond import Answering, Sender, working
from tensortier.server.schemas import ChatRequest, CompletionRequest, EmbeddingRequest, T, parse
from tensortier.server.threads import in_thread

_MOST_INPUTS = 2048  # of one request for embeddings, as OpenAI has it


def router(host: ModelHost, gate: Gate, metrics: Metrics) -> APIRouter:
    """The routes. Every path below /v1 needs the API key, where there is one."""
    routes = APIRouter(prefix="/v1")
    started = int(time.time())

    def described(model: LibraryModel) -> dict[str, Any]:
        return {"id": model.name, "object": "model", "created": started, "owned_by": model.source}

    async def parsed(kind: type[T], request: Request, endpoint: str) -> T:
        try:
            return parse(kind, await request.body())
        except Problem as problem:
            metrics.told(endpoint, False)(problem.status)
            raise

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(m) for m in await host.look() if not m.error]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if not name:
            raise ModelNotFound("the model's name is empty")
        return described(await host.find(name))

    @routes.post("/chat/completions")
    async def chat(request: Request) -> Response:
        asked = await parsed(ChatRequest, request, "chat")
        work = partial(_chat, host, gate, asked)
        return Answering(work, metrics.told("chat", asked.stream))

    @routes.post("/completions")
    async def completions(request: Request) -> Response:
        asked = await parsed(CompletionRequest, request, "completions")
        work = partial(_complete, host, gate, asked)
        return Answering(work, metrics.told("completions", asked.stream))

    @routes.post("/embeddings")
    async def embeddings(request: Request) -> Response:
        asked = await parsed(EmbeddingRequest, request, "embeddings")
        return Answering(partial(_embed, host, gate, asked), metrics.told("embeddings", False))

    return routes


async def _chat(host: ModelHost, gate: Gate, asked: ChatRequest, sender: Sender) -> None:
    messages = [message.plain(f"messages[{i}]") for i, message in enumerate(asked.messages)]
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Problem(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
    choice: Any = asked.tool_choice
    if choice is not None and not isinstance(choice, str):
        choice = choice.model_dump()
    if choice not in (None, "none", "auto") and not tools:
        raise Problem(400, "tool_choice needs tools", param="tool_choice")
    response_format = None if asked.response_format is None else asked.response_format.model_dump()
    samplings = [asked.sampling(i, asked.most_tokens, logprobs) for i in range(asked.n)]
    async with working(host, gate, asked.model, asked.n) as work:
        for sampling in samplings:
            begin = partial(
                work.engine.chat,
                messages,
                sampling,
                tools=tools or None,
                tool_choice=choice if tools else None,
                response_format=response_format,
            )
            await work.start(begin)
        answer = ChatAnswer(work, logprobs=asked.logprobs, one_call=asked.parallel_tool_calls is False)
        await _send(answer, sender, asked.stream, asked.with_usage)


async def _complete(host: ModelHost, gate: Gate, asked: CompletionRequest, sender: Sender) -> None:
    prompts = asked.prompts
    if not prompts:
        raise Problem(400, "prompt is empty", param="prompt")
    if asked.best_of is not None and asked.best_of != asked.n:
        raise Problem(400, "best_of has to be as n: the answers are not compared", param="best_of")
    if asked.echo and (asked.logprobs is not None or not all(isinstance(p, str) for p in prompts)):
        raise Problem(400, "echo goes with neither logprobs nor a prompt of tokens", param="echo")
    if asked.max_tokens == 0:
        raise Problem(400, "max_tokens: at least one token is generated", param="max_tokens")
    samplings = [asked.sampling(i, asked.max_tokens, asked.logprobs) for i in range(asked.n)]
    async with working(host, gate, asked.model, len(prompts) * asked.n) as work:
        for prompt in prompts:
            for sampling in samplings:
                await work.start(partial(work.engine.complete, prompt, sampling))
        echo = [str(prompt) for prompt in prompts for _ in samplings] if asked.echo else ()
        answer = TextAnswer(work, prompts=len(prompts), logprobs=asked.logprobs is not None, echo=echo)
        await _send(answer, sender, asked.stream, asked.with_usage)


async def _send(answer: Answer, sender: Sender, stream: bool, with_usage: bool) -> None:
    if stream:
        await sender.events(answer.stream(with_usage))
    else:
        await sender.json(await answer.whole())


async def _embed(host: ModelHost, gate: Gate, asked: EmbeddingRequest, sender: Sender) -> None:
    inputs = asked.inputs
    if not inputs or not all(inputs):
        raise Problem(400, "input is empty", param="input")
    if len(inputs) > _MOST_INPUTS:
        raise Problem(400, f"input has more than {_MOST_INPUTS} members", param="input")
    async with working(host, gate, asked.model, 1) as work:
        found = await in_thread(work.engine.embed, inputs, started=work.adopt)
        if asked.dimensions not in (None, len(found[0].vector)):
            text = (
                f"dimensions: the vectors of {work.model} have {len(found[0].vector)}, and are not shortened"
            )
            raise Problem(400, text, param="dimensions")
        tokens = sum(embedding.n_tokens for embedding in found)
        data = [
            {"object": "embedding", "index": i, "embedding": _vector(e.vector, asked.encoding_format)}
            for i, e in enumerate(found)
        ]
        used = {"prompt_tokens": tokens, "total_tokens": tokens}
        await sender.json({"object": "list", "data": data, "model": work.model, "usage": used})


def _vector(values: Sequence[float], encoding: str) -> str | list[float]:
    """Base64 is of 32-bit floats, the lowest byte first."""
    if encoding == "base64":
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
    return list(values)
