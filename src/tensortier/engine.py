"""``Engine``: a plan in, tokens out, for several requests at once."""

from __future__ import annotations

import math
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tensortier.errors import Cancelled, ContextFull, GenerationError, ModelNotFound, UsageError
from tensortier.request import Request
from tensortier.types import Activity, DeviceMemory, Embedding, Plan, Sampling

if TYPE_CHECKING:
    from tensortier._llama.loaded import Loaded
    from tensortier._llama.params import Parameters
    from tensortier.request import EmbeddingTask
    from tensortier.tier import PagedWeights
    from tensortier.toolcalls import Parser

__all__ = ["Activity", "DeviceReport", "Embedding", "Engine", "Request"]


_LONG = 8  # characters per token, more than texts have
_EMBEDDED_AHEAD = 2  # texts of one call that are computed or wait, per sequence


@dataclass(frozen=True)
class DeviceReport:
    """What the plan said of a device, and what llama.cpp allocated there."""

    device: str
    planned: DeviceMemory | None  # None where the plan made no prediction
    allocated: DeviceMemory


class Engine:
    """A loaded model.

    ::

        with Engine(plan) as engine:
            for piece in engine.chat([{"role": "user", "content": "Hello"}]):
                print(piece.text, end="")

    ``plan.settings.n_seq_max`` requests are computed at once; further ones wait. All methods may be called from any
    thread. Loading ends with ``Cancelled`` once ``cancel`` (an event) is set.

    Args:
        plan: what to load and where.
        progress: called with the loaded fraction, 0 to 1.
        verbose: llama.cpp's messages go to standard error.

    Raises:
        OutOfMemory: a device has too little memory for its part of the plan.
        LoadError: llama.cpp refuses for another reason, which the message holds.
        PatternError, BackendError, PlanError: the plan names what is not here.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        progress: Callable[[float], None] | None = None,
        cancel: threading.Event | None = None,
        verbose: bool = False,
    ) -> None:
        from tensortier._llama import devices, log, memory
        from tensortier._llama.params import Parameters
        from tensortier.prompts import ChatTemplate
        from tensortier.scheduler import Scheduler

        self.plan = plan
        self._closed = False
        self._using = _Users()
        log.set_verbose(verbose)
        devices.load_modules(plan.rpc)
        started = time.perf_counter()
        self._paged = self._open_paged()
        try:
            self._parameters = Parameters(plan, self._paged.buffer_type if self._paged else None)
            self._loaded = self._load(progress, cancel or threading.Event())
        except BaseException:
            if self._paged:
                self._paged.close()
            raise
        self.load_seconds = time.perf_counter() - started
        try:
            loaded = self._loaded
            self.n_ctx: int = loaded.n_ctx
            planned = {row.device: row for row in plan.memory}
            self.memory: tuple[DeviceReport, ...] = tuple(
                DeviceReport(row.device, planned.get(row.device), self._held(row))
                for row in memory.allocated(loaded.context)
            )
            self._template = ChatTemplate(
                loaded.template(),
                loaded.template("tool_use"),
                loaded.token_text(loaded.bos),
                loaded.token_text(loaded.eos),
            )
            self._scheduler = Scheduler(
                loaded,
                abort=self._parameters.abort,
                take_error=self._paged.take_error if self._paged else str,
                at_end=partial(_free, self._using, loaded, self._paged, self._parameters),
            )
        except BaseException:
            _free(self._using, self._loaded, self._paged, self._parameters)
            raise
        # its thread does not keep the engine alive; an engine that nobody closed is closed when it is dropped
        self._release = weakref.finalize(self, self._scheduler.close)

    def _open_paged(self) -> PagedWeights | None:
        """The store of the weights that the plan leaves on the drive, if it leaves any."""
        from tensortier import pageable, tier

        overrides = self.plan.placement.overrides
        if self.plan.tier is None and all(o.device != pageable.DEVICE for o in overrides):
            return None
        self._check_file()
        return tier.PagedWeights(self.plan)

    def _held(self, row: DeviceMemory) -> DeviceMemory:
        """Of weights on the drive llama.cpp counts all; what counts is the RAM that holds some of them."""
        from tensortier import pageable

        if self._paged is None or row.device != pageable.DEVICE:
            return row
        return DeviceMemory(row.device, self._paged.stats().memory_bytes, 0, 0)

    def _check_file(self) -> None:
        from pathlib import Path

        if not Path(self.plan.model).is_file():
            raise ModelNotFound(f"there is no file {self.plan.model}")

    def _load(self, progress: Callable[[float], None] | None, cancel: threading.Event) -> Loaded:
        from tensortier._llama.loaded import Loaded

        self._check_file()

        def before_context() -> None:
            if self._paged:
                self._paged.loaded(cancel.is_set)

        loaded = Loaded(
            self.plan,
            self._parameters,
            progress=progress,
            cancelled=cancel.is_set,
            before_context=before_context,
        )
        if cancel.is_set():
            loaded.close()
            raise Cancelled("loading was cancelled")
        return loaded

    # --- requests

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of a text. ``add_bos``: with the beginning and end tokens that the model wants; ``special``: the
        names of control tokens in it mean those."""
        with self._open() as loaded:
            return loaded.tokenize(text, add_special=add_bos, parse_special=special)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Any = None,
        response_format: Mapping[str, Any] | None = None,
    ) -> Request:
        """The answer to a conversation (OpenAI's message format) through the model's chat template.

        ``response_format``: {"type": "json_object"} with or without "schema", or {"type": "json_schema"}.

        Raises:
            UsageError: the sampling, the grammar, the schema, the tools or the messages cannot be used.
            ContextFull: the conversation does not fit in the context.
            GenerationError: the engine is closed.
        """
        if (
            response_format is not None
            and sampling.grammar is not None
            and response_format.get("type") != "text"
        ):
            raise UsageError("a grammar and a response_format exclude each other")
        prompt = self._template.prompt(
            messages, tools=tools, tool_choice=tool_choice, response_format=response_format
        )
        if prompt.grammar is not None:
            sampling = replace(sampling, grammar=prompt.grammar)
        sampling = replace(sampling, stop=(*sampling.stop, *prompt.stops))
        with self._open() as loaded:
            tokens = _read(loaded, prompt.text, add_special=False)
            return self._start(loaded, tokens, sampling, prompt.parser)

    def complete(self, prompt: str | Sequence[int], sampling: Sampling = Sampling()) -> Request:  # noqa: B008
        """The continuation of a text, or of tokens, without a chat template. Raises as ``chat``."""
        with self._open() as loaded:
            return self._start(loaded, _tokens(loaded, prompt), sampling, None)

    def embed(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        started: Callable[[Sequence[Request]], None] | None = None,
    ) -> list[Embedding]:
        """The vector of each text, pooled as the model says, else the mean over its tokens. Blocks. ``started`` is
        called with the requests that compute them, as they begin, so that they can be cancelled. Only a few wait at a
        time: others who come meanwhile have their turn before the last text.

        Raises:
            UsageError: an input is empty, or this model makes no embeddings.
            ContextFull: an input is too long.
            Cancelled, GenerationError: as for ``chat``.
        """
        with self._open() as loaded:
            tasks = [self._embedding_task(loaded, text) for text in inputs]
        under_way: deque[Request] = deque()
        most = _EMBEDDED_AHEAD * self.plan.settings.n_seq_max
        for task in tasks:
            if len(under_way) == most:
                _finish(under_way.popleft())
            self._scheduler.submit(task)
            request = Request(self._scheduler, task)
            under_way.append(request)
            if started is not None:
                started([request])
        for request in under_way:
            _finish(request)
        return [task.result() for task in tasks]

    def cancel(self) -> None:
        """Has all requests end with ``Cancelled`` soon, also in the middle of a long prompt. Without one it does
        nothing."""
        self._scheduler.cancel_all()

    def activity(self) -> Activity:
        """What the engine does at the moment. Cheap, from any thread."""
        return self._scheduler.activity()

    def _start(
        self, loaded: Loaded, tokens: list[int], sampling: Sampling, parser: Callable[[], Parser] | None
    ) -> Request:
        from tensortier._llama.sampling import Sampler
        from tensortier.request import Generation
        from tensortier.textstream import TextStream

        _check_sampling(sampling, loaded.n_vocab)
        if not loaded.generates:
            raise UsageError(
                "this model does not generate text: it makes embeddings, or needs an encoder first"
            )
        self._check_length(tokens)
        room = loaded.n_ctx - len(tokens)
        seed = sampling.seed if sampling.seed is not None else random.getrandbits(32)
        task = Generation(
            tokens,
            Sampler(loaded, sampling, seed % (1 << 32)),
            TextStream(sampling.stop),
            limit=room if sampling.max_tokens <= 0 else min(sampling.max_tokens, room),
            logprobs=sampling.logprobs,
            parser=None if parser is None else parser(),
            special=frozenset() if parser is None else _markers(loaded),
        )
        self._scheduler.submit(task)
        return Request(self._scheduler, task)

    def _check_length(self, tokens: list[int]) -> None:
        if not tokens:
            raise UsageError("the prompt is empty")
        if len(tokens) >= self.n_ctx:
            raise ContextFull(
                f"the prompt's {len(tokens)} tokens do not fit in the context of {self.n_ctx}; "
                "raise --context or shorten the prompt"
            )

    def _embedding_task(self, loaded: Loaded, text: str | Sequence[int]) -> EmbeddingTask:
        from tensortier._llama.loaded import POOLING_NONE, POOLING_RANK
        from tensortier.request import EmbeddingTask

        if loaded.pooling == POOLING_RANK:
            raise UsageError("this model ranks texts, it makes no embeddings")
        tokens = _tokens(loaded, text)
        self._check_length(tokens)
        if len(tokens) > loaded.longest_text:
            raise ContextFull(
                f"the input's {len(tokens)} tokens are more than the {loaded.longest_text} "
                "that this model computes at once"
            )
        return EmbeddingTask(tokens, mean=loaded.pooling == POOLING_NONE)

    @contextmanager
    def _open(self) -> Iterator[Loaded]:
        """The model, which stays while this lasts. Raises GenerationError when it is gone."""
        with self._using.one():
            if self._closed or self._loaded.model is None:
                raise GenerationError("the engine is closed")
            yield self._loaded

    @property
    def paged(self) -> PagedWeights | None:
        """The weights on the drive, with their statistics; None where the plan leaves none there."""
        return self._paged

    # --- life

    def close(self) -> None:
        """Ends all requests with ``Cancelled`` and frees the model and everything it holds. Closing twice is fine."""
        self._closed = True
        self._release()
        self._scheduler.close()  # waits, where another thread was first

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Users:
    """Callers' threads that use the model: any number at a time, and it is not freed then."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        with self._change:
            self._count += 1
        try:
            yield
        finally:
            with self._change:
                self._count -= 1
                self._change.notify_all()

    @contextmanager
    def none(self) -> Iterator[None]:
        """Waits until there is none, and keeps others waiting."""
        with self._change:
            self._change.wait_for(lambda: self._count == 0)
            yield


def _free(using: _Users, loaded: Loaded, paged: PagedWeights | None, parameters: Parameters) -> None:
    """``parameters``: llama.cpp reads its abort flag to the last."""
    with using.none():
        loaded.close()
    if paged:
        paged.close()
    del parameters


def _finish(request: Request) -> None:
    for _ in request:
        pass


def _read(loaded: Loaded, text: str, *, add_special: bool) -> list[int]:
    """The tokens of a prompt, in which the names of control tokens mean those. ContextFull where the beginning of a
    long text is too much already: reading all of it could take minutes (with many control tokens the time grows with
    the square of the length)."""
    length = _LONG * loaded.n_ctx
    while length < len(text):
        found = len(loaded.tokenize(text[:length], add_special=add_special, parse_special=True))
        if found > 1.1 * loaded.n_ctx + 64:  # the end of a text may change what comes before it, a little
            raise ContextFull(
                f"the prompt is longer than the context of {loaded.n_ctx} tokens; "
                "raise --context or shorten the prompt"
            )
        length *= _LONG
    return loaded.tokenize(text, add_special=add_special, parse_special=True)


def _tokens(loaded: Loaded, prompt: str | Sequence[int]) -> list[int]:
    """Those of a prompt that is no conversation: with the beginning that the model wants. UsageError."""
    if isinstance(prompt, str):
        tokens = _read(loaded, prompt, add_special=True)
    else:
        tokens = list(prompt)
        if any(not isinstance(t, int) or not 0 <= t < loaded.n_vocab for t in tokens):
            raise UsageError(f"the prompt's tokens must be numbers from 0 to {loaded.n_vocab - 1}")
    if not tokens and loaded.bos >= 0:
        tokens = [loaded.bos]
    return tokens


def _markers(loaded: Loaded) -> frozenset[int]:
    """Control tokens that begin or end a call of a tool."""
    from tensortier.toolcalls import MARKERS

    found = (loaded.tokenize(name, add_special=False, parse_special=True) for name in MARKERS)
    return frozenset(tokens[0] for tokens in found if len(tokens) == 1)


# (field, least, most): llama.cpp takes any number, and some make no sense or end the process
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", -1.0, 100.0),  # below 0: by the model's own probabilities
    ("top_k", -(1 << 30), 1 << 30),  # below 1: all
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("typical_p", 0.0, 1.0),
    ("repeat_penalty", 1e-3, 1e3),
    ("frequency_penalty", -1e3, 1e3),
    ("presence_penalty", -1e3, 1e3),
)


def _check_sampling(sampling: Sampling, n_vocab: int) -> None:
    """UsageError for what cannot be meant."""
    for field, least, most in _RANGES:
        value = getattr(sampling, field)
        if not least <= value <= most:  # false for NaN
            raise UsageError(f"{field} must be from {least:g} to {most:g}, not {value}")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= 20:
        raise UsageError(f"logprobs must be from 0 to 20, not {sampling.logprobs}")
    for token, bias in sampling.logit_bias:
        if not 0 <= token < n_vocab or not math.isfinite(bias):
            raise UsageError(f"logit_bias: token {token} must be from 0 to {n_vocab - 1}, and {bias} finite")
