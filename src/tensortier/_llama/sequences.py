"""llama.cpp's sequences: what each holds, the cells they share, and batches of their next tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensortier._llama.libs import llama
from tensortier._llama.loaded import POOLING_NONE, Loaded


class Outcome(Enum):
    """Of computing a batch. After anything but DONE, ``Sequences`` holds what it held before, or less."""

    DONE = 0
    NO_CELLS = 1
    ABORTED = 2
    FAILED = 3


@dataclass(eq=False)
class Held:
    """One of llama.cpp's sequences."""

    number: int
    tokens: list[int] = field(default_factory=list)  # computed, in order of position
    cells: list[int] = field(default_factory=list)  # of each token: a name, shared by copies

    def common(self, tokens: Sequence[int]) -> int:
        """Length of the common prefix."""
        mine = self.tokens
        n = min(len(mine), len(tokens))
        if mine[:n] == list(tokens[:n]):
            return n
        low, high = 0, n  # mine[:low] is common, mine[:high] is not
        while high - low > 1:
            middle = (low + high) // 2
            if mine[low:middle] == list(tokens[low:middle]):
                low = middle
            else:
                high = middle
        return low


class Batch:
    """Tokens to compute together. ``rows`` counts them."""

    def __init__(self, capacity: int) -> None:
        bindings = llama()
        self._token = np.zeros(capacity, np.int32)
        self._pos = np.zeros(capacity, np.int32)
        self._n_seq = np.ones(capacity, np.int32)
        self._seq = np.zeros(capacity, np.int32)
        self._output = np.zeros(capacity, np.int8)
        first = self._seq.ctypes.data
        self._seq_pointers = np.arange(first, first + 4 * capacity, 4, dtype=np.uintp)
        self.parts: list[tuple[Held, list[int]]] = []
        self.rows = 0

        def pointer(array: NDArray[Any], name: str) -> Any:
            return array.ctypes.data_as(types[name])

        types = dict(bindings.llama_batch._fields_)
        self.raw = bindings.llama_batch(
            n_tokens=0,
            token=pointer(self._token, "token"),
            embd=None,
            pos=pointer(self._pos, "pos"),
            n_seq_id=pointer(self._n_seq, "n_seq_id"),
            seq_id=pointer(self._seq_pointers, "seq_id"),
            logits=pointer(self._output, "logits"),
        )

    def clear(self) -> None:
        self.parts.clear()
        self.rows = 0

    def add(self, held: Held, tokens: list[int], *, output: bool = False, every: bool = False) -> int:
        """The next tokens of a sequence; ``output``: with logits after the last, ``every``: with outputs of all.
        Returns the row of the last."""
        start, position = self.rows, len(held.tokens)
        end = start + len(tokens)
        if len(tokens) == 1:
            self._token[start], self._pos[start], self._seq[start] = tokens[0], position, held.number
            self._output[start] = output or every
        else:
            self._token[start:end] = tokens
            self._pos[start:end] = np.arange(position, position + len(tokens))
            self._seq[start:end] = held.number
            self._output[start:end] = every
            self._output[end - 1] = output or every
        self.parts.append((held, tokens))
        self.rows = end
        self.raw.n_tokens = end
        return end - 1


class Sequences:
    """The sequences of a context. Used by one thread only.

    ``used`` counts the cells of the KV cache that hold something: a prefix that sequences share is counted once.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._bindings = llama()
        self._loaded = loaded
        self._memory = loaded.memory
        self.all = [Held(number) for number in range(loaded.n_seq_max)]
        self.used = 0
        self._shared: dict[int, int] = {}  # cells that more than one sequence has, and how many do
        self._next_cell = 0

    # --- what they hold

    def keep(self, held: Held, n: int) -> int:
        """Cuts a sequence to its first ``n`` tokens, or where llama.cpp cannot, to nothing: a recurrent state
        cannot go back, and of a sliding window the cells before it may be gone. Returns how many are kept."""
        n = min(n, self.reusable(held, n))
        if n == len(held.tokens):
            return n
        if n == 0 or not self._bindings.llama_memory_seq_rm(self._memory, held.number, n, -1):
            n = 0
            self._bindings.llama_memory_seq_rm(self._memory, held.number, -1, -1)
        self._release(held.cells[n:])
        del held.tokens[n:], held.cells[n:]
        return n

    def reusable(self, held: Held, n: int) -> int:
        """How many of the first ``n`` tokens could be gone on from: ``n`` or 0."""
        if n in (0, len(held.tokens)):
            return n
        if self._loaded.recurrent or self._loaded.hybrid or not self._window_is_there(held, n):
            return 0
        return n

    def _window_is_there(self, held: Held, n: int) -> bool:
        """Whether what the token behind the first ``n`` would look at was not overwritten."""
        if not self._loaded.n_swa:
            return True
        first: int = self._bindings.llama_memory_seq_pos_min(self._memory, held.number)
        return 0 <= first <= max(0, n - self._loaded.n_swa)

    def copy(self, source: Held, target: Held, n: int) -> int:
        """Gives ``target`` the first ``n`` tokens of ``source``, without copying data; it must be empty. Returns how
        many it has then, ``n`` or 0. States of recurrent layers are not shared."""
        n = 0 if self._loaded.recurrent or self._loaded.hybrid else self.reusable(source, n)
        if n == 0:
            return 0
        self._bindings.llama_memory_seq_cp(self._memory, source.number, target.number, 0, n)
        target.tokens[:] = source.tokens[:n]
        target.cells[:] = source.cells[:n]
        for cell in target.cells:
            self._shared[cell] = self._shared.get(cell, 1) + 1
        return n

    def clear(self, held: Held) -> None:
        self.keep(held, 0)

    def _release(self, cells: Iterable[int]) -> None:
        for cell in cells:
            count = self._shared.get(cell)
            if count is None:
                self.used -= 1
            elif count == 2:
                del self._shared[cell]
            else:
                self._shared[cell] = count - 1

    # --- computing

    def compute(self, batch: Batch) -> Outcome:
        """Computes a batch. What an interrupted or failed one has left behind is removed; a sequence whose state
        cannot be cut back is emptied."""
        code: int = self._bindings.llama_decode(self._loaded.context, batch.raw)
        if code == 0:
            self._bindings.llama_synchronize(self._loaded.context)
            for held, tokens in batch.parts:
                held.tokens += tokens
                held.cells += range(self._next_cell, self._next_cell + len(tokens))
                self._next_cell += len(tokens)
                self.used += len(tokens)
            return Outcome.DONE
        if code == 1:
            return Outcome.NO_CELLS
        for held, _ in batch.parts:
            self._forget_beyond(held)
        return Outcome.ABORTED if code == 2 else Outcome.FAILED

    def _forget_beyond(self, held: Held) -> None:
        """What llama.cpp may hold of a sequence beyond ``held.tokens``, after a computation that did not end."""
        n = len(held.tokens)
        broken = (
            self._loaded.recurrent or self._loaded.hybrid
        )  # some layers have the new state, others the old
        if n == 0 or broken or not self._bindings.llama_memory_seq_rm(self._memory, held.number, n, -1):
            self._bindings.llama_memory_seq_rm(self._memory, held.number, -1, -1)
            self._release(held.cells)
            held.tokens.clear()
            held.cells.clear()

    # --- embeddings

    def embed(self, batch: Batch) -> tuple[Outcome, list[NDArray[np.float64]]]:
        """Computes a batch for embeddings; every token must be an output. Per part of the batch: the model's pooled
        vector, or where it does not pool, the sum over the part's tokens."""
        bindings, context = self._bindings, self._loaded.context
        bindings.llama_set_embeddings(context, True)
        try:
            outcome = self.compute(batch)
            if outcome is not Outcome.DONE:
                return outcome, []
            return outcome, [*self._vectors(batch)]
        finally:
            bindings.llama_set_embeddings(context, False)

    def _vectors(self, batch: Batch) -> Iterable[NDArray[np.float64]]:
        bindings, context, width = self._bindings, self._loaded.context, self._loaded.n_embd
        if self._loaded.pooling != POOLING_NONE:
            for held, _ in batch.parts:
                pointer = bindings.llama_get_embeddings_seq(context, held.number)
                yield np.ctypeslib.as_array(pointer, (width,)).astype(np.float64)
            return
        pointer = bindings.llama_get_embeddings(context)
        rows = np.ctypeslib.as_array(pointer, (batch.rows, width))
        start = 0
        for _, tokens in batch.parts:
            yield rows[start : start + len(tokens)].sum(axis=0, dtype=np.float64)
            start += len(tokens)
