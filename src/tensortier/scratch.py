"""What computing with weights from the drive takes in RAM beside the room that holds them.

Counted from above for the widest batch, all of whose tokens may choose the same experts: the rows that
native/expert_products.cpp gathers for experts that are there while others are awaited (``gathered_bytes``, which the
store measures as ``TierStats.scratch_bytes``), the buffer that the CPU's kernels take for the inputs in their own type
and for the list of each expert's rows (``graph_plan`` of ggml's CPU backend), and what the store remembers of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensortier.pageable import EXPERT_WEIGHT
from tensortier.types import ModelInfo, Role, Settings, Tensor

_GATHER_BYTES = 4 << 20  # as in native/expert_products.cpp
_F32 = 4
_ID = 4
_ROUTED = 8  # a token and which of its choices: in the store, and in the kernel's list
_LINE = 64  # of the processor's cache; the kernel's buffer has one per expert
_TILE = 512 << 10  # per thread, of the kernels that compute in tiles
# A kernel's input per value: 256 in 292 bytes for most quantized weights, or the weights' own width of 2 bytes.
_QUANTIZED, _HALF = 292 / 256, 2.0
_MOST_THREADS = 16  # where their number is left open
_PARTS = 3  # products of a layer that may wait together to be computed
# A graph of 2048 operations and their tensors, the reader's books, the stacks of its threads.
_FIXED = 4 << 20


def scratch_bytes(model: ModelInfo, paged: Sequence[Tensor], settings: Settings) -> int:
    """Bytes beside ``types.Tier``'s rooms that computing with ``paged`` takes at most.

    Args:
        paged: the weights on the drive.
        settings: of the context; the wider its micro-batches, the more.
    """
    if not paged:
        return 0
    tokens, used = _tokens(settings), max(1, model.n_expert_used)
    experts = [t for t in paged if is_experts(t)]
    layers = len({t.layer for t in experts})
    work = [_work(t, tokens, used) for t in paged]
    books = layers * tokens * used * (_ID + _ROUTED)
    threads = max(settings.threads, settings.threads_batch) or _MOST_THREADS
    return _FIXED + gathered_bytes(model, paged, settings) + max(work) + books + threads * _TILE


def gathered_bytes(model: ModelInfo, paged: Sequence[Tensor], settings: Settings) -> int:
    """Of that, the rows gathered and computed apart, and slots in the place of experts: kept once they were needed."""
    tokens = _tokens(settings)
    largest = 0
    for t in (t for t in paged if is_experts(t)):
        row = _F32 * (t.shape[0] + t.shape[1])
        # several experts together, or a single one that has more: then all rows of the batch may be its own
        rows = max(_GATHER_BYTES // row, tokens)
        largest = max(largest, max(_GATHER_BYTES, tokens * row) + rows * _ID + t.shape[2] * 3 * _LINE)
    return largest + _PARTS * tokens * model.n_expert_used * _ID if largest else 0


def is_experts(tensor: Tensor) -> bool:
    """Whether a weight is one of all routed experts of a layer."""
    found = EXPERT_WEIGHT.fullmatch(tensor.name)
    return found is not None and found[2] == "weight" and len(tensor.shape) == 3


def _work(tensor: Tensor, tokens: int, used: int) -> int:
    """The kernel's buffer."""
    width = {"F32": 0.0, "F16": _HALF, "BF16": _HALF}.get(tensor.qtype, _QUANTIZED)
    if not is_experts(tensor):
        return int(width * tensor.shape[0] * tokens)
    # the first products of a layer have one input per token, the last has one per chosen expert
    inputs = tokens * (used if tensor.role is Role.EXPERT_DOWN else 1)
    values = max(inputs * tensor.shape[0], _GATHER_BYTES // _F32)
    return int(width * values) + tensor.shape[2] * (tokens * used * _ROUTED + _LINE + _ROUTED)


def _tokens(settings: Settings) -> int:
    return max(1, min(settings.n_batch, settings.n_ubatch))
