"""Times llama.cpp itself on a plan: single tokens and batches, without tokenizer or sampling."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tensortier._llama import devices, log
from tensortier._llama.libs import llama
from tensortier._llama.params import Parameters
from tensortier.errors import GenerationError, LoadError
from tensortier.types import Plan


class Timer:
    """A loaded model and a context. Token numbers are made up from the vocabulary."""

    def __init__(self, context: Any, n_vocab: int) -> None:
        self.context = context  # llama_context *
        self._n_vocab = n_vocab
        self._memory = llama().llama_get_memory(context)

    def forget(self, beyond: int) -> None:
        """Drops what the KV cache holds beyond so many tokens."""
        llama().llama_memory_seq_rm(self._memory, 0, beyond, -1)

    def compute(self, tokens: int) -> float:
        """Seconds that so many more tokens take together, as one batch.

        Raises:
            GenerationError: llama.cpp failed.
        """
        bindings = llama()
        numbers = (ctypes.c_int32 * tokens)(*((17 * i + 5) % self._n_vocab for i in range(tokens)))
        start = time.perf_counter()
        result = bindings.llama_decode(self.context, bindings.llama_batch_get_one(numbers, tokens))
        bindings.llama_synchronize(self.context)
        seconds = time.perf_counter() - start
        if result != 0:
            raise GenerationError(f"llama.cpp failed while it computed: llama_decode returned {result}")
        return seconds

    def fill(self, tokens: int) -> None:
        """Computes so many tokens, in batches of 512."""
        while tokens > 0:
            self.compute(min(512, tokens))
            tokens -= 512

    def single(self, tokens: int) -> float:
        """Seconds per token of so many, one after the other."""
        bindings = llama()
        numbers = (ctypes.c_int32 * 1)(7 % self._n_vocab)
        start = time.perf_counter()
        for _ in range(tokens):
            if bindings.llama_decode(self.context, bindings.llama_batch_get_one(numbers, 1)) != 0:
                raise GenerationError("llama.cpp failed while it computed")
            bindings.llama_synchronize(self.context)
        return (time.perf_counter() - start) / tokens


@contextmanager
def timer(plan: Plan) -> Iterator[Timer]:
    """Loads a plan to time it.

    Raises:
        LoadError: llama.cpp refuses; the message holds the reason. And what ``Parameters`` raises.
    """
    bindings = llama()
    devices.load_modules(plan.rpc)
    parameters = Parameters(plan)
    record = log.Recording()
    model_params = bindings.llama_model_default_params()
    parameters.edit_model(model_params)
    model = bindings.llama_model_load_from_file(os.fsencode(plan.model), model_params)
    if not model:
        raise LoadError(f"llama.cpp does not load {plan.model}: {record.reason('no reason given')}")
    try:
        context_params = bindings.llama_context_default_params()
        context_params.n_ctx = plan.settings.n_ctx
        parameters.edit_context(context_params)
        context = bindings.llama_init_from_model(model, context_params)
        if not context:
            raise LoadError(f"llama.cpp makes no context: {record.reason('no reason given')}")
        try:
            vocabulary = bindings.llama_vocab_n_tokens(bindings.llama_model_get_vocab(model))
            yield Timer(context, vocabulary)
        finally:
            bindings.llama_free(context)
    finally:
        bindings.llama_model_free(model)


def per_token(plan: Plan, *, depth: int = 0, tokens: int = 32, runs: int = 5) -> Sequence[float]:
    """Seconds per token behind ``depth`` others, of each run of ``tokens`` single ones."""
    with timer(plan) as t:
        t.fill(depth)
        t.single(4)
        found = []
        for _ in range(runs):
            t.forget(depth)
            found.append(t.single(tokens))
        return found
