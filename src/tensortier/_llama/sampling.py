"""How the next token is chosen: llama.cpp's own samplers, one chain per answer."""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensortier._llama import log
from tensortier._llama.libs import llama
from tensortier._llama.loaded import Loaded
from tensortier.errors import GenerationError, UsageError
from tensortier.types import Sampling, TokenLogprob

_PENALISED = 64  # tokens of the answer that penalties look back on, llama.cpp's default
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
_NO_PENALTIES = (1.0, 0.0, 0.0)
_LONGEST_GRAMMAR = 1 << 18  # characters
_DEEPEST_GRAMMAR = 2100  # brackets; of nested options llama.cpp takes 1000
_BRACKETS = re.compile(
    r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|[()]', re.DOTALL
)  # or texts, which have some too
_stderr = threading.Lock()  # only one thread at a time may take the process's standard error away


class Sampler:
    """Chooses the tokens of one answer, in the order of ``llama_cpp.Llama``: penalties, grammar, then greedy, or
    top-k, typical, top-p, min-p, temperature and chance.

    A grammar is asked about the chosen token first, and about the whole vocabulary only when it refuses that one:
    the same tokens for greedy choice, the same distribution otherwise, and far less work.

    Raises:
        UsageError: a grammar that llama.cpp does not take.
    """

    def __init__(self, loaded: Loaded, sampling: Sampling, seed: int) -> None:
        self._loaded = loaded
        self._bindings = bindings = llama()
        self._grammar: Any = None if sampling.grammar is None else _grammar(loaded, sampling.grammar)
        self._remembers = _penalties(sampling) != _NO_PENALTIES  # what was chosen changes what will be
        self._chain = bindings.llama_sampler_chain_init(bindings.llama_sampler_chain_default_params())
        for sampler in _samplers(bindings, loaded.n_vocab, sampling, seed):
            bindings.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, row: int) -> int:
        """The next token after the batch's token number ``row``; the samplers take note of it.

        Raises:
            GenerationError: the grammar allows none.
        """
        bindings = self._bindings
        token: int
        if self._grammar is None:
            token = bindings.llama_sampler_sample(self._chain, self._loaded.context, row)
            return token
        if self._remembers:
            token = self._choose(_candidates(self._loaded, row))
        else:  # may take note of a token that is then refused
            token = bindings.llama_sampler_sample(self._chain, self._loaded.context, row)
        single = np.array([(token, 1.0, 0.0)], _CANDIDATE)
        bindings.llama_sampler_apply(self._grammar, ctypes.byref(_array(single)))
        if single["logit"][0] == -np.inf:
            allowed = _candidates(self._loaded, row)
            bindings.llama_sampler_apply(self._grammar, ctypes.byref(_array(allowed)))
            allowed = allowed[allowed["logit"] > -np.inf]
            if not len(allowed):
                raise GenerationError("the grammar allows no further token of this model's vocabulary")
            token = self._choose(allowed)
        bindings.llama_sampler_accept(self._grammar, token)
        bindings.llama_sampler_accept(self._chain, token)
        return token

    def _choose(self, candidates: NDArray[Any]) -> int:
        array = _array(candidates)
        self._bindings.llama_sampler_apply(self._chain, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise GenerationError("llama.cpp's samplers chose no token")
        return int(array.data[array.selected].id)

    def close(self) -> None:
        """Frees the samplers. Closing twice is fine."""
        chain, grammar, self._chain, self._grammar = self._chain, self._grammar, None, None
        if chain:
            self._bindings.llama_sampler_free(chain)
        if grammar:
            self._bindings.llama_sampler_free(grammar)

    def __del__(self) -> None:
        if getattr(self, "_chain", None) is not None or getattr(self, "_grammar", None) is not None:
            self.close()


def _penalties(sampling: Sampling) -> tuple[float, float, float]:
    return sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty


def _samplers(bindings: Any, n_vocab: int, sampling: Sampling, seed: int) -> list[Any]:
    chain = []
    if sampling.logit_bias:
        biases = (bindings.llama_logit_bias * len(sampling.logit_bias))(*sampling.logit_bias)
        chain.append(bindings.llama_sampler_init_logit_bias(n_vocab, len(biases), biases))
    if (penalties := _penalties(sampling)) != _NO_PENALTIES:
        chain.append(bindings.llama_sampler_init_penalties(n_vocab, _PENALISED, *penalties))
    if sampling.temperature == 0.0:
        return [*chain, bindings.llama_sampler_init_greedy()]
    if sampling.temperature > 0.0:
        chain += [
            bindings.llama_sampler_init_top_k(sampling.top_k),
            bindings.llama_sampler_init_typical(sampling.typical_p, 1),
            bindings.llama_sampler_init_top_p(sampling.top_p, 1),
            bindings.llama_sampler_init_min_p(sampling.min_p, 1),
            bindings.llama_sampler_init_temp(sampling.temperature),
        ]
    return [*chain, bindings.llama_sampler_init_dist(seed)]


def _grammar(loaded: Loaded, text: str) -> Any:
    """llama.cpp's sampler of a GBNF text. UsageError with its reason where it takes none."""
    bindings = llama()
    if not text.strip():  # llama.cpp takes it for no grammar at all
        raise UsageError("the grammar is not valid GBNF: it is empty")
    _check_size(text)
    if "\0" in text:
        raise UsageError(
            "the grammar is not valid GBNF: it holds a NUL character, where llama.cpp would stop reading"
        )
    record = log.Recording()
    with _stderr, log.captured_stderr() as printed:  # the parser prints its reason there
        sampler = bindings.llama_sampler_init_grammar(loaded.vocab, text.encode(), b"root")
    if sampler:
        for line in printed:  # another thread's
            print(line, file=sys.stderr)
    else:
        parser = [line.partition("error parsing grammar: ")[2] for line in printed]
        told = [reason for reason in parser if reason]
        reason = told[0] if told else record.reason("it has no rule named root, or does not parse")
        raise UsageError(f"the grammar is not valid GBNF: {reason}")
    return sampler


def _check_size(text: str) -> None:
    """UsageError for a grammar whose brackets nest so deep that llama.cpp's parser would leave its stack and end the
    process, or that is so long that each token would take it a second, in which nobody else's is computed."""
    if len(text) > _LONGEST_GRAMMAR:
        raise UsageError(
            f"the grammar has {len(text)} characters, more than {_LONGEST_GRAMMAR}: describe less by it"
        )
    depth = deepest = 0
    for bracket in _BRACKETS.finditer(text):
        depth += {"(": 1, ")": -1}.get(bracket[0], 0)
        deepest = max(deepest, depth)
    if deepest > _DEEPEST_GRAMMAR:
        raise UsageError(f"the grammar nests {deepest} brackets, more than {_DEEPEST_GRAMMAR}")


def logits(loaded: Loaded, row: int) -> NDArray[np.float32]:
    """Of the batch's token number ``row``: a view of llama.cpp's memory, [vocabulary], until the next batch."""
    pointer = llama().llama_get_logits_ith(loaded.context, row)
    return np.ctypeslib.as_array(pointer, (loaded.n_vocab,))


def logprob(loaded: Loaded, row: int, token: int, alternatives: int) -> TokenLogprob:
    """ln of the model's own probability of ``token`` after the batch's token ``row`` (before any sampler), and of
    the ``alternatives`` most probable ones."""
    values = logits(loaded, row).astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    top: list[int] = []
    if alternatives:
        found = np.argpartition(-values, min(alternatives, len(values) - 1))[:alternatives]
        top = [int(i) for i in found[np.argsort(-values[found], kind="stable")]]

    def piece(number: int) -> bytes:
        return loaded.piece(number, special=True)

    return TokenLogprob(
        token,
        piece(token),
        float(values[token]),
        tuple((number, piece(number), float(values[number])) for number in top),
    )


def _candidates(loaded: Loaded, row: int) -> NDArray[Any]:
    candidates = np.empty(loaded.n_vocab, _CANDIDATE)
    candidates["id"] = np.arange(loaded.n_vocab, dtype=np.int32)
    candidates["logit"] = logits(loaded, row)
    candidates["p"] = 0.0
    return candidates


def _array(candidates: NDArray[Any]) -> Any:
    """A ``llama_token_data_array`` over them."""
    bindings = llama()
    data = candidates.ctypes.data_as(ctypes.POINTER(bindings.llama_token_data))
    return bindings.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)
