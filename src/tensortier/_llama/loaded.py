"""A model that llama.cpp has loaded, with one context: its vocabulary, its chat templates, its limits."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

from tensortier._llama import log
from tensortier._llama.libs import llama
from tensortier._llama.params import Parameters
from tensortier.errors import Cancelled, LoadError, OutOfMemory, UsageError
from tensortier.types import Plan

POOLING_NONE, POOLING_LAST, POOLING_RANK = 0, 3, 4  # enum llama_pooling_type


class Loaded:
    """Owns a ``llama_model`` and a ``llama_context``.

    Args:
        plan: what to load.
        parameters: the plan in llama.cpp's terms.
        progress: called with the loaded fraction, 0 to 1.
        cancelled: asked while it loads; True ends it.
        before_context: called when the weights are there.

    Raises:
        OutOfMemory, LoadError: llama.cpp refuses; the message holds the reason.
        Cancelled: ``cancelled`` returned True. And what ``progress`` raised.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Parameters,
        *,
        progress: Callable[[float], None] | None,
        cancelled: Callable[[], bool],
        before_context: Callable[[], None],
    ) -> None:
        self._bindings = bindings = llama()
        self._parameters = parameters
        self.model: Any = None
        self.context: Any = None
        raised: list[BaseException] = []  # by ``progress``: an exception cannot pass through llama.cpp

        def on_progress(fraction: float) -> bool:
            try:
                if progress is not None:
                    progress(fraction)
            except BaseException as exc:
                raised.append(exc)
            return not raised and not cancelled()

        record = log.Recording()
        try:
            params = bindings.llama_model_default_params()
            parameters.edit_model(params)
            parameters.on_progress(params, on_progress)
            self.model = bindings.llama_model_load_from_file(os.fsencode(plan.model), params)
            if raised:
                raise raised[0]
            if cancelled():
                raise Cancelled("loading was cancelled")
            if not self.model:
                raise _refused(plan, record)
            before_context()
            params = bindings.llama_context_default_params()
            params.n_ctx = plan.settings.n_ctx or bindings.llama_model_n_ctx_train(self.model)
            parameters.edit_context(params)
            self.context = bindings.llama_init_from_model(self.model, params)
            if not self.context:
                raise _refused(plan, record)
        except BaseException:
            self.close()
            raise
        self._describe()

    def _describe(self) -> None:
        bindings, model = self._bindings, self.model
        self.vocab = bindings.llama_model_get_vocab(model)
        self.memory = bindings.llama_get_memory(self.context)  # None where a model keeps none: encoders
        self.n_ctx: int = bindings.llama_n_ctx(self.context)
        self.n_batch: int = bindings.llama_n_batch(self.context)
        self.n_ubatch: int = bindings.llama_n_ubatch(self.context)
        self.n_seq_max: int = bindings.llama_n_seq_max(self.context)
        self.n_vocab: int = bindings.llama_vocab_n_tokens(self.vocab)
        self.n_embd: int = bindings.llama_model_n_embd_out(model)
        self.n_swa: int = bindings.llama_model_n_swa(model)
        self.recurrent: bool = bindings.llama_model_is_recurrent(model)
        self.hybrid: bool = bindings.llama_model_is_hybrid(model)
        self.pooling: int = bindings.llama_pooling_type(self.context)
        self.bos: int = bindings.llama_vocab_bos(self.vocab)  # -1 where there is none, as for the next
        self.eos: int = bindings.llama_vocab_eos(self.vocab)
        self._has_tokenizer = bindings.llama_vocab_type(self.vocab) != 0
        self._pieces: dict[tuple[int, bool], bytes] = {}

    @property
    def generates(self) -> bool:
        """False for models that only make embeddings, and for those that encode a text before they answer."""
        encodes = self._bindings.llama_model_has_encoder(self.model)
        return bool(self.memory) and bool(self._bindings.llama_model_has_decoder(self.model)) and not encodes

    @property
    def longest_text(self) -> int:
        """Tokens of a text that becomes an embedding: where the model pools, one micro-batch; an encoder has no more
        positions than it was trained for."""
        longest = self.n_ctx if self.pooling == POOLING_NONE else self.n_ubatch
        if not self.memory:
            longest = min(longest, self.n_ubatch, self._bindings.llama_model_n_ctx_train(self.model))
        return longest

    # --- tokens

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids. ``add_special``: with the beginning and end tokens the model wants; ``parse_special``: the
        text's names of control tokens mean those."""
        if not self._has_tokenizer:  # llama.cpp would end the process
            raise UsageError("this model file has no tokenizer: it takes tokens only")
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as exc:  # JSON can carry one; llama.cpp would end the process
            raise UsageError("the text holds half of a surrogate pair") from exc
        size = len(data) + 8
        for _ in range(2):
            tokens = (ctypes.c_int32 * size)()
            count: int = self._bindings.llama_tokenize(
                self.vocab, data, len(data), tokens, size, add_special, parse_special
            )
            if count >= 0:
                return list(tokens[:count])
            size = -count
        raise UsageError("the text is too long to be tokenized")

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes a token stands for; ``special``: of control tokens too, else those have none."""
        key = (token, special)
        found = self._pieces.get(key)
        if found is None:
            found = self._pieces[key] = self._make_piece(token, special)
        return found

    def _make_piece(self, token: int, special: bool) -> bytes:
        if not self._has_tokenizer:
            return b""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count: int = self._bindings.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> bytes:
        return b"".join(self.piece(token, special) for token in tokens)

    def ends(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return bool(self._bindings.llama_vocab_is_eog(self.vocab, token))

    def token_text(self, token: int) -> str:
        """The vocabulary's own name of a token; empty for -1."""
        if token < 0 or not self._has_tokenizer:
            return ""
        text: bytes = self._bindings.llama_vocab_get_text(self.vocab, token)
        return text.decode("utf-8", errors="replace")

    def template(self, name: str | None = None) -> str | None:
        """The file's chat template of that name, or its default one."""
        text: bytes | None = self._bindings.llama_model_chat_template(
            self.model, None if name is None else name.encode()
        )
        found = None if text is None else text.decode("utf-8", errors="replace")
        return found if found and "{" in found else None  # llama.cpp has names of its own for some models

    # --- life

    def close(self) -> None:
        """Frees both. Closing twice is fine."""
        if self.context:
            self._bindings.llama_free(self.context)
        self.context = None
        if self.model:
            self._bindings.llama_model_free(self.model)
        self.model = None


def _refused(plan: Plan, record: log.Recording) -> LoadError:
    reason = record.reason("it gave no reason")
    if record.out_of_memory:
        return OutOfMemory(f"not enough memory for {plan.model}: {reason}")
    return LoadError(f"llama.cpp does not load {plan.model}: {reason}")
