"""``llama_cpp.Llama`` with a clock in it: where a request's time went, token by token, at no cost to speak of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tensortier._llama.libs import llama as _initialised

_initialised()  # takes over llama.cpp's log before the class below is made

import numpy as np  # noqa: E402
from llama_cpp import Llama  # noqa: E402

from tensortier._llama import log  # noqa: E402
from tensortier.types import GenerationStats  # noqa: E402


class Meter:
    """Of one request. The prompt ends when its first token is chosen; each later token is one decode step."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first: float | None = None
        self.last = self.started
        self.evaluated = 0  # prompt tokens computed
        self.reused = 0  # prompt tokens that the KV cache still had
        self.sampled = 0
        self.ended_by_token = False

    def stats(self, finish_reason: str | None) -> GenerationStats:
        """What was counted. ``completion_tokens`` leaves out the end-of-text token, as OpenAI's count does."""
        first = self.first if self.first is not None else time.perf_counter()
        return GenerationStats(
            prompt_tokens=self.evaluated + self.reused,
            cached_tokens=self.reused,
            completion_tokens=self.sampled - (1 if self.ended_by_token else 0),
            prompt_seconds=first - self.started,
            decode_seconds=max(0.0, self.last - first),
            decode_steps=max(0, self.sampled - 1),
            finish_reason=finish_reason,
        )


class MeteredLlama(Llama):  # type: ignore[misc]  # the bindings are untyped
    """Counts and times the two calls that every request goes through."""

    meter = Meter()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # llama.cpp rounds the context up to a multiple of 256 cells; the bindings make room for what was asked
        # only, and fail on a prompt between the two.
        self.input_ids = np.ndarray((self.n_ctx(),), dtype=np.intc)

    def start_meter(self) -> Meter:
        """A fresh meter for the request that begins now."""
        self.meter = Meter()
        return self.meter

    def eval(self, tokens: Sequence[int]) -> None:
        meter = self.meter
        if meter.first is None:
            if meter.evaluated == 0:
                meter.reused = self.n_tokens
            super().eval(tokens)
            meter.evaluated += len(tokens)
        else:
            super().eval(tokens)

    def sample(self, *args: Any, **kwargs: Any) -> int:
        token: int = super().sample(*args, **kwargs)
        meter = self.meter
        meter.last = time.perf_counter()
        if meter.first is None:
            meter.first = meter.last
        meter.sampled += 1
        meter.ended_by_token = _initialised().llama_vocab_is_eog(self._model.vocab, token)
        return token

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        grammar = kwargs.get("grammar")
        if (
            grammar is not None
        ):  # whoever made it: the bindings turn tools and schemas into grammars of their own
            self.check_grammar(grammar._grammar)
        return super()._init_sampler(*args, **kwargs)

    def check_grammar(self, grammar: str) -> None:
        """ValueError with llama.cpp's reason for a text that is not GBNF. Asked first, because the bindings
        pass on the null sampler that llama.cpp makes of a bad grammar, and the process dies of it."""
        bindings = _initialised()
        if not grammar.strip():  # llama.cpp takes it for no grammar at all
            raise ValueError("it is empty")
        if "\0" in grammar:
            raise ValueError("it holds a NUL character, where llama.cpp would stop reading")
        record = log.Recording()
        with log.captured_stderr() as printed:  # the parser prints its reason there
            sampler = bindings.llama_sampler_init_grammar(self._model.vocab, grammar.encode(), b"root")
        if not sampler:
            parser = [line.partition("error parsing grammar: ")[2] for line in printed]
            told = [reason for reason in parser if reason]
            raise ValueError(
                told[0] if told else record.reason("it has no rule named root, or does not parse")
            )
        bindings.llama_sampler_free(sampler)

    def forget_interrupted(self) -> None:
        """After a computation was given up: drops what it may have left behind in the KV cache. A recurrent
        state cannot be cut back to a prefix, so those models start over."""
        if self._is_recurrent or self._is_hybrid:
            self.reset()
        else:
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        self._requires_eval = True
