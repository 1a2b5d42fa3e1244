"""``Engine``: a plan in, tokens out. Wraps ``llama_cpp.Llama`` for tokens, chat templates, tools and grammars."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tensortier.errors import (
    Cancelled,
    ContextFull,
    GenerationError,
    LoadError,
    ModelNotFound,
    OutOfMemory,
    PlanError,
    TensortierError,
    UsageError,
)
from tensortier.types import DeviceMemory, GenerationStats, Piece, Plan, Sampling

if TYPE_CHECKING:
    from tensortier.tier import PagedWeights


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

        if plan.settings.n_seq_max != 1:
            raise PlanError("this engine computes one sequence at a time: settings.n_seq_max must be 1")
        self.plan = plan
        self.stats = GenerationStats()
        self._closed = False
        self._busy = threading.Lock()  # held for a whole request
        self._computing = threading.Lock()  # held while llama.cpp works on it: close() waits for this one
        self._cancelled = threading.Event()
        self._cancel_lock = threading.Lock()  # the event and llama.cpp's flag change together
        log.set_verbose(verbose)
        devices.load_modules(plan.rpc)
        started = time.perf_counter()
        self._paged = self._open_paged()
        try:
            self._parameters = Parameters(plan, self._paged.buffer_type if self._paged else None)
            self._llama = self._load(progress, cancel or threading.Event())
        except BaseException:
            if self._paged:
                self._paged.close()
            raise
        self.load_seconds = time.perf_counter() - started
        try:
            self.n_ctx: int = self._llama.n_ctx()
            planned = {row.device: row for row in plan.memory}
            self.memory: tuple[DeviceReport, ...] = tuple(
                DeviceReport(row.device, planned.get(row.device), self._held(row))
                for row in memory.allocated(self._llama.ctx)
            )
        except BaseException:
            self.close()  # nobody else will
            raise

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

    def _load(self, progress: Callable[[float], None] | None, cancel: threading.Event) -> Any:
        from jinja2 import TemplateError

        from tensortier._llama import log
        from tensortier._llama.metered import MeteredLlama
        from tensortier._llama.params import given_to_llama

        self._check_file()

        raised: list[BaseException] = []  # by ``progress``: an exception cannot pass through llama.cpp

        def on_progress(fraction: float) -> bool:
            try:
                if progress is not None:
                    progress(fraction)
            except BaseException as exc:
                raised.append(exc)
            return not raised and not cancel.is_set()

        def edit_model(params: Any) -> None:
            self._parameters.edit_model(params)
            self._parameters.on_progress(params, on_progress)

        def edit_context(params: Any) -> None:
            if self._paged:
                self._paged.loaded()
            self._parameters.edit_context(params)

        record = log.Recording()
        try:
            with given_to_llama(edit_model, edit_context):
                llama = MeteredLlama(
                    self.plan.model,
                    n_ctx=self.plan.settings.n_ctx,
                    n_batch=self.plan.settings.n_batch,
                    verbose=False,
                )
        except TemplateError as exc:
            raise LoadError(f"the chat template of {self.plan.model} is not valid: {exc}") from exc
        except (ValueError, RuntimeError, AssertionError, MemoryError) as exc:
            if raised:
                raise raised[0] from None
            if cancel.is_set():
                raise Cancelled("loading was cancelled") from exc
            reason = record.reason(str(exc))
            if record.out_of_memory or isinstance(exc, MemoryError):
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

        ``response_format``: {"type": "json_object"} with or without "schema", or {"type": "json_schema"}.

        Raises:
            UsageError: the grammar, the schema, the tools or the messages cannot be used.
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
            options |= self._format(response_format)
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
        with self._cancel_lock:
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
            options["grammar"] = self._grammar(sampling.grammar, "the grammar is not valid GBNF")
        return options

    def _grammar(self, text: str, complaint: str) -> Any:
        from llama_cpp import LlamaGrammar

        with self._computing:
            self._check_open()
            try:
                self._llama.check_grammar(text)
            except ValueError as exc:
                raise UsageError(f"{complaint}: {exc}") from exc
        return LlamaGrammar.from_string(text, verbose=False)

    def _format(self, response_format: dict[str, Any]) -> dict[str, Any]:
        """OpenAI's ``response_format`` as an option of the bindings. Those know no "json_schema", and take a
        schema they cannot translate for "any JSON" without a word."""
        from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

        kind = response_format.get("type")
        if kind == "text":
            return {}
        if kind == "json_schema":
            schema = (response_format.get("json_schema") or {}).get("schema")
            if schema is None:
                raise UsageError('response_format "json_schema" needs json_schema.schema')
        elif kind == "json_object":
            schema = response_format.get("schema")
        else:
            raise UsageError(f'response_format is "text", "json_object" or "json_schema", not {kind!r}')
        if schema is None:
            return {"grammar": self._grammar(JSON_GBNF, "llama.cpp does not take its JSON grammar")}
        complaint = "the JSON schema of response_format cannot be used"
        try:
            text = json_schema_to_gbnf(json.dumps(schema))
        except Exception as exc:  # the translator asserts, looks up and casts what it was given
            raise UsageError(f"{complaint}: {exc or type(exc).__name__}") from exc
        return {"grammar": self._grammar(text, complaint)}

    def _check_open(self) -> None:
        if self._closed:
            raise GenerationError("the engine is closed")

    def _stream(self, start: Callable[[], Any]) -> Iterator[Piece]:
        self._check_open()
        if not self._busy.acquire(blocking=False):
            raise GenerationError("the engine is busy with another request")
        reason: str | None = None
        chunks: Iterator[Any] | None = None
        meter = self._llama.start_meter()
        try:
            with self._cancel_lock:
                self._cancelled.clear()
                self._parameters.abort(False)
            while True:
                with self._computing:
                    self._check_open()
                    try:
                        if chunks is None:
                            chunks = _begin(start)
                        chunk = next(chunks, None)
                    except BaseException:
                        self._llama.forget_interrupted()
                        raise
                if chunk is None:
                    return
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
            self._busy.release()

    def _translate(self, exc: Exception) -> TensortierError:
        text = str(exc)
        if self._cancelled.is_set():
            return Cancelled("the answer was cancelled")
        if self._paged and (reason := self._paged.take_error()):
            return GenerationError(reason)
        if "exceed context window" in text:
            return ContextFull(f"{text[0].lower()}{text[1:]}; raise --context or shorten the prompt")
        if "llama_decode returned 1" in text:
            return ContextFull("the KV cache is full; raise --context or shorten the conversation")
        return GenerationError(f"llama.cpp failed while it computed: {text}")

    @property
    def paged(self) -> PagedWeights | None:
        """The weights on the drive, with their statistics; None where the plan leaves none there."""
        return self._paged

    # --- life

    def close(self) -> None:
        """Frees the model and everything it holds. Closing twice is fine. A request under way raises
        ``Cancelled``; in another thread, this waits until llama.cpp has let go of it."""
        self._closed = True
        self.cancel()
        with self._computing:
            self._llama.close()
            if self._paged:
                self._paged.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _begin(start: Callable[[], Any]) -> Iterator[Any]:
    """Renders the chat template and prepares the request; nothing is computed yet, so what fails is the request:
    templates raise errors of their own, and the bindings look up and index what they were given unchecked."""
    from jinja2 import TemplateError

    try:
        return iter(start())
    except (TemplateError, ValueError, LookupError, TypeError) as exc:
        raise UsageError(f"this request cannot be used: {exc!s:.200}") from exc


def _piece(chunk: dict[str, Any]) -> Piece:
    choice = chunk["choices"][0]
    if "text" in choice:
        return Piece(choice["text"], choice.get("finish_reason"))
    delta = choice.get("delta") or {}
    extra = {k: v for k, v in delta.items() if k not in ("content", "role")}
    return Piece(delta.get("content") or "", choice.get("finish_reason"), extra or None)
