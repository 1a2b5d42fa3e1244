"""Logits of a model through stock llama.cpp, and of the same with weights on the drive."""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from tensortier import gguf
from tensortier._llama.params import Parameters
from tensortier.tier import PagedWeights
from tensortier.types import Override, Placement, Plan, Settings, Tier
from tests.models import llamacpp

Floats = NDArray[np.float32]

EXPERTS = r"_exps\."
DENSE = r"blk\.\d+\.(ffn_(up|gate|down)|attn_(q|k|v|output|qkv))\.weight"
# The kernels of slots: reordered weights have others, whose results differ in the last bits.
CONTEXT = {"n_ctx": 512, "n_batch": 128, "n_ubatch": 32, "n_threads": 1, "n_threads_batch": 1}
SETTINGS = Settings(
    n_ctx=512, n_batch=128, n_ubatch=32, threads=1, threads_batch=1, repack=False, load_mode="none"
)
PROMPT = tuple(range(300, 380))  # more than two micro-batches


def tier_plan(path: Path, pattern: str = EXPERTS, **fields: Any) -> Plan:
    """A plan that leaves what ``pattern`` finds on the drive; ``fields`` are those of ``Tier``. Nothing is read ahead
    by guesses or kept from run to run unless they say so: then the simulator counts the same hits."""
    tier = Tier(**{"guesses": 0, "warm_start": False, **fields})
    return Plan(str(path), Placement(overrides=(Override(pattern, "TIER"),)), SETTINGS, tier=tier)


def expert_bytes(path: Path) -> tuple[int, int]:
    """(least, all): what the experts of one token in one layer take, and all of them, with room for sectors."""
    model = gguf.read(path)
    layers: dict[int, int] = {}
    for tensor in model.tensors:
        if tensor.role.is_routed_expert and len(tensor.shape) == 3 and tensor.layer is not None:
            one = tensor.nbytes // tensor.shape[2]
            layers[tensor.layer] = layers.get(tensor.layer, 0) + (one + 2 * 4096) // 4096 * 4096 + 4096
    largest = max(layers.values())
    return largest * model.n_expert_used, largest * model.n_expert * len(layers)


@contextmanager
def stock(path: Path, **context: Any) -> Iterator[tuple[Any, Any]]:
    """Model and context of stock llama.cpp: all weights in RAM, none reordered."""
    with (
        llamacpp.model(path, use_extra_bufts=False, load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE) as model,
        llamacpp.context(model, **{**CONTEXT, **context}) as ctx,
    ):
        yield model, ctx


@contextmanager
def tiered_model(plan: Plan) -> Iterator[tuple[Any, PagedWeights]]:
    """The plan's model, ready for contexts, and the store of its weights on the drive."""
    paged = PagedWeights(plan)
    try:
        parameters = Parameters(plan, paged.buffer_type)
        params = llama_cpp.llama_model_default_params()
        parameters.edit_model(params)
        model = llama_cpp.llama_model_load_from_file(plan.model.encode(), params)
        assert model
        try:
            paged.loaded()
            yield model, paged
        finally:
            llama_cpp.llama_model_free(model)
    finally:
        paged.close()


@contextmanager
def tiered(plan: Plan, **context: Any) -> Iterator[tuple[Any, Any, PagedWeights]]:
    """Model, context and store of a plan with weights on the drive."""
    with tiered_model(plan) as (model, paged), llamacpp.context(model, **{**CONTEXT, **context}) as ctx:
        yield model, ctx, paged


def decode(ctx: Any, tokens: Sequence[int], position: int = 0) -> int:
    """llama_decode with logits of every token; its status."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        return int(llama_cpp.llama_decode(ctx, batch))
    finally:
        llama_cpp.llama_batch_free(batch)


def logits(model: Any, ctx: Any, tokens: Sequence[int], position: int = 0) -> Floats:
    """Of each token, computed at ``position``: ``[token, vocabulary]``."""
    status = decode(ctx, tokens, position)
    assert status == 0, f"llama_decode returned {status}"
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(ctx), (len(tokens), width)).copy()


def generate(model: Any, ctx: Any, prompt: Sequence[int] = PROMPT, steps: int = 12) -> Floats:
    """Logits of the prompt and of ``steps`` greedy tokens after it, which attend to what was stored before."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
    rows = [logits(model, ctx, prompt)]
    for step in range(steps):
        token = int(rows[-1][-1].argmax())
        rows.append(logits(model, ctx, [token], len(prompt) + step))
    result = np.concatenate(rows)
    assert np.isfinite(result).all() and result.std() > 0
    return result


def reads_directly(path: Path) -> bool:
    """Whether the file can be read past the page cache, asked of the system itself."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, 4096) as memory:  # begins at a page
                return os.preadv(descriptor, [memory], 0) > 0
        finally:
            os.close(descriptor)
    except OSError:
        return False


def resident_bytes() -> int:
    """Of this process, now."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()
