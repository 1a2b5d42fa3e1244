"""``Engine``: a plan in, tokens out. Wraps ``llama_cpp.Llama`` for tokens, chat templates, tools and grammars."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tensortier.errors import (
    Cancelled,
    ContextFull,
    GenerationError,
    LoadError,
    ModelNotFound,
    OutOfMemory,
    TensortierError,
    UsageError,
)
from tensortier.types import DeviceMemory, GenerationStats, Piece, Plan, Sampling


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

    One request at a time; ``cancel`` may be called from any thread. Loading ends with ``Cancelled`` once
    ``cancel`` (an event) is set.

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

        self.plan = plan
        self.stats = GenerationStats()
        self._closed = False
        self._busy = threading.Lock()
        self._cancelled = threading.Event()
        log.set_verbose(verbose)
        devices.load_modules(plan.rpc)
        self._parameters = Parameters(plan)
        started = time.perf_counter()
        self._llama = self._load(progress, cancel or threading.Event())
        self.load_seconds = time.perf_counter() - started
        self.n_ctx: int = self._llama.n_ctx()
        planned = {row.device: row for row in plan.memory}
        self.memory: tuple[DeviceReport, ...] = tuple(
            DeviceReport(row.device, planned.get(row.device), row)
            for row in memory.allocated(self._llama.ctx)
        )

    def _load(self, progress: Callable[[float], None] | None, cancel: threading.Event) -> Any:
        from pathlib import Path

        from tensortier._llama import log
        from tensortier._llama.metered import MeteredLlama
        from tensortier._llama.params import given_to_llama

        if not Path(self.plan.model).is_file():
            raise ModelNotFound(f"there is no file {self.plan.model}")

        def on_progress(fraction: float) -> bool:
            if progress is not None:
                progress(fraction)
            return not cancel.is_set()

        def edit_model(params: Any) -> None:
            self._parameters.edit_model(params)
            self._parameters.on_progress(params, on_progress)

        record = log.Recording()
        try:
            with given_to_llama(edit_model, self._parameters.edit_context):
                llama = MeteredLlama(
                    self.plan.model,
                    n_ctx=self.plan.settings.n_ctx,
                    n_batch=self.plan.settings.n_batch,
                    verbose=False,
                )
        except (ValueError, RuntimeError, AssertionError) as exc:
            if cancel.is_set():
                raise Cancelled("loading was cancelled") from exc
            reason = record.reason(str(exc))
            if record.out_of_memory:
                raise OutOfMemory(f"not enough memory for {self.plan.model}: {reason}") from exc
            raise LoadError(f"llama.cpp does not load {self.plan.model}: {reason}") from exc
        if cancel.is_set():
            llama.close()
            raise Cancelled("loading was cancelled")
        return llama

    # --- requests

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of a text."""
        tokens: list[int] = self._llama.tokenize(text.encode(), add_bos, special)
        return tokens

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        tool_choice: Any = None,
        response_format: dict[str, Any] | None = None,
    ) -> Iterator[Piece]:
        """Streams the answer to a conversation (OpenAI's message format) through the model's chat template.

        Raises:
            ContextFull: the conversation does not fit in the context.
            Cancelled: ``cancel`` was called; ``stats`` and the pieces so far stand.
            GenerationError: llama.cpp failed.
        """
        options = self._options(sampling)
        if tools is not None:
            options["tools"] = list(tools)
        if tool_choice is not None:
            options["tool_choice"] = tool_choice
        if response_format is not None:
            options["response_format"] = response_format
        return self._stream(
            lambda: self._llama.create_chat_completion(messages=list(messages), stream=True, **options)
        )

    def complete(self, prompt: str, sampling: Sampling = Sampling()) -> Iterator[Piece]:  # noqa: B008 - frozen
        """Streams the continuation of a text, without a chat template. Raises as ``chat``."""
        options = self._options(sampling)
        options["max_tokens"] = options["max_tokens"] or -1
        return self._stream(lambda: self._llama.create_completion(prompt, stream=True, **options))

    def cancel(self) -> None:
        """Has the request under way raise ``Cancelled`` soon, also in the middle of a long prompt. Without one
        it does nothing."""
        self._cancelled.set()
        self._parameters.abort(True)

    def _options(self, sampling: Sampling) -> dict[str, Any]:
        options: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "typical_p": sampling.typical_p,
            "repeat_penalty": sampling.repeat_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "seed": sampling.seed,
            "max_tokens": sampling.max_tokens if sampling.max_tokens > 0 else None,
            "stop": list(sampling.stop),
        }
        if sampling.grammar is not None:
            from llama_cpp import LlamaGrammar

            try:
                self._llama.check_grammar(sampling.grammar)
            except ValueError as exc:
                raise UsageError(f"the grammar is not valid GBNF: {exc}") from exc
            options["grammar"] = LlamaGrammar.from_string(sampling.grammar, verbose=False)
        return options

    def _stream(self, start: Callable[[], Any]) -> Iterator[Piece]:
        if self._closed:
            raise GenerationError("the engine is closed")
        if not self._busy.acquire(blocking=False):
            raise GenerationError("the engine is busy with another request")
        meter = self._llama.start_meter()
        reason: str | None = None
        try:
            self._cancelled.clear()
            self._parameters.abort(False)
            for chunk in start():
                piece = _piece(chunk)
                reason = piece.finish_reason or reason
                if piece.text or piece.delta or piece.finish_reason:
                    yield piece
                if self._cancelled.is_set():
                    raise Cancelled("the answer was cancelled")
        except TensortierError:
            raise
        except (RuntimeError, ValueError) as exc:
            raise self._translate(exc) from exc
        finally:
            self.stats = meter.stats(reason)
            self._parameters.abort(False)
            if self._cancelled.is_set():
                self._llama.forget_interrupted()
            self._busy.release()

    def _translate(self, exc: Exception) -> TensortierError:
        text = str(exc)
        if self._cancelled.is_set():
            return Cancelled("the answer was cancelled")
        if "exceed context window" in text:
            return ContextFull(f"{text[0].lower()}{text[1:]}; raise --context or shorten the prompt")
        if "llama_decode returned 1" in text:
            return ContextFull("the KV cache is full; raise --context or shorten the conversation")
        return GenerationError(f"llama.cpp failed while it computed: {text}")

    # --- life

    def close(self) -> None:
        """Frees the model and everything it holds. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._llama.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _piece(chunk: dict[str, Any]) -> Piece:
    choice = chunk["choices"][0]
    if "text" in choice:
        return Piece(choice["text"], choice.get("finish_reason"))
    delta = choice.get("delta") or {}
    extra = {k: v for k, v in delta.items() if k not in ("content", "role")}
    return Piece(delta.get("content") or "", choice.get("finish_reason"), extra or None)
