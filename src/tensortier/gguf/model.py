"""Headers of all parts of a model to the ``ModelInfo`` that planning works with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from tensortier.errors import ModelFileError
from tensortier.gguf.ggml_types import FILE_TYPES
from tensortier.gguf.header import Header
from tensortier.gguf.hparams import (
    MAX_LAYERS,
    PARALLEL_HYBRIDS,
    Keys,
    kv_heads,
    recurrent_layers,
    sliding_window,
)
from tensortier.gguf.roles import role_and_layer
from tensortier.types import ModelInfo, Role, Tensor

_GUESSED = 1024  # LLAMA_FTYPE_GUESSED


def build(headers: Sequence[Header]) -> ModelInfo:
    """``ModelInfo`` from the headers of all parts, in order. Metadata is that of the first, as in llama.cpp.

    Raises ``ModelFileError`` where a value makes no sense. What a file leaves out gets the value that
    llama.cpp would use, or 0 where it would refuse to load (a file for something else than text, say).
    """
    first = headers[0]
    source, metadata = first.source, first.metadata
    architecture = _text(source, metadata, "general.architecture")
    if not architecture:
        raise ModelFileError(
            f"{source}: no 'general.architecture' in it, so it is not a model that can be run"
        )
    keys = Keys(source, architecture, metadata)
    tensors = _tensors(headers)

    n_layers = keys.integer("block_count", _layers_in_names(tensors))
    if n_layers > MAX_LAYERS:
        raise keys.fail(
            f"{architecture}.block_count", f"is {n_layers}, llama.cpp supports {MAX_LAYERS} layers"
        )
    n_nextn = keys.integer("nextn_predict_layers")
    if n_nextn > n_layers:
        raise keys.fail(
            f"{architecture}.nextn_predict_layers", f"is {n_nextn}, but there are {n_layers} layers"
        )
    zeros = (0,) * n_layers
    n_embd = keys.integer("embedding_length")
    n_ff = keys.per_layer("feed_forward_length", n_layers, zeros)
    n_head = keys.per_layer("attention.head_count", n_layers, zeros)
    n_head_kv = keys.per_layer("attention.head_count_kv", n_layers, n_head)
    n_expert_used = keys.per_layer("expert_used_count", n_layers, zeros)

    recurrent = recurrent_layers(keys, n_layers, n_nextn, n_head_kv, n_ff)
    window, swa_layers = sliding_window(keys, n_layers, n_nextn, recurrent)
    # Models without attention heads in their first layer get no head size at all, whatever the keys say.
    has_heads = bool(n_head) and n_head[0] > 0
    head_dim = n_embd // n_head[0] if has_heads else 0
    head_dim_k = keys.integer("attention.key_length", head_dim) if has_heads else 0
    head_dim_v = keys.integer("attention.value_length", head_dim) if has_heads else 0
    mla = keys.integer("attention.key_length_mla") and keys.integer("attention.value_length_mla")
    if architecture not in PARALLEL_HYBRIDS:
        tensors = tuple(_recurrent_role(t, recurrent) for t in tensors)

    return ModelInfo(
        files=tuple(h.source for h in headers),
        file_sizes=tuple(h.file_size for h in headers),
        architecture=architecture,
        name=_text(source, metadata, "general.name") or _stem(source),
        quantization=_quantization(metadata, tensors),
        tensors=tensors,
        n_layers=n_layers,
        n_layers_nextn=n_nextn,
        n_embd=n_embd,
        n_vocab=_vocabulary(keys, tensors),
        context_length=keys.integer("context_length"),
        n_head=n_head,
        n_head_kv=kv_heads(keys, n_layers, n_nextn, n_head_kv, n_ff, recurrent),
        head_dim_k=head_dim_k,
        head_dim_v=head_dim_v,
        n_ff=n_ff,
        n_expert=keys.integer("expert_count"),
        n_expert_used=max(n_expert_used, default=0),
        n_expert_shared=_shared_experts(keys, tensors),
        sliding_window=window,
        swa_layers=swa_layers,
        head_dim_k_swa=keys.integer("attention.key_length_swa", head_dim_k) if window else 0,
        head_dim_v_swa=keys.integer("attention.value_length_swa", head_dim_v) if window else 0,
        recurrent_layers=recurrent,
        kv_lora_rank=keys.integer("attention.kv_lora_rank") if mla else 0,
        n_rot=keys.integer("rope.dimension_count", head_dim_k) if has_heads else 0,
        tied_output=_tied(tensors),
        chat_template=_text(source, metadata, "tokenizer.chat_template") or None,
        metadata=metadata,
    )


def _tensors(headers: Sequence[Header]) -> tuple[Tensor, ...]:
    tensors = []
    owner: dict[str, str] = {}
    for file, header in enumerate(headers):
        for t in header.tensors:
            if t.name in owner:
                raise ModelFileError(f"{header.source}: tensor {t.name!r} is also in {owner[t.name]}")
            owner[t.name] = header.source
            role, layer = role_and_layer(t.name)
            tensors.append(Tensor(t.name, role, layer, t.shape, t.qtype, t.nbytes, file, t.offset))
    return tuple(tensors)


def _recurrent_role(tensor: Tensor, recurrent: Sequence[bool]) -> Tensor:
    """Linear attention uses the tensor names of attention; only the layer tells them apart."""
    layer = tensor.layer
    if tensor.role is Role.ATTENTION and layer is not None and layer < len(recurrent) and recurrent[layer]:
        return replace(tensor, role=Role.RECURRENT)
    return tensor


def _layers_in_names(tensors: Sequence[Tensor]) -> int:
    """Blocks that the tensors' names count, for files (adapters, projectors) that do not say how many."""
    return max((t.layer + 1 for t in tensors if t.layer is not None and t.layer < MAX_LAYERS), default=0)


def _text(source: str, metadata: dict[str, Any], key: str) -> str:
    value = metadata.get(key, "")
    if not isinstance(value, str):
        raise ModelFileError(f"{source}: {key!r} must be a string; the file is corrupt")
    return value


def _stem(source: str) -> str:
    return PurePosixPath(source.replace("\\", "/")).name.removesuffix(".gguf")


def _quantization(metadata: dict[str, Any], tensors: Sequence[Tensor]) -> str:
    label = metadata.get("general.file_type")
    if isinstance(label, int) and label & ~_GUESSED in FILE_TYPES:
        return FILE_TYPES[label & ~_GUESSED]
    held: Counter[str] = Counter()
    for t in tensors:
        held[t.qtype] += t.nbytes
    return held.most_common(1)[0][0] if held else "unknown"


def _vocabulary(keys: Keys, tensors: Sequence[Tensor]) -> int:
    """Tokens: the tokenizer's list, else the stated size, else the rows of the embedding."""
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and not isinstance(tokens, str | int | float):
        return len(tokens)
    if keys.has("vocab_size"):
        return keys.integer("vocab_size")
    return next((t.shape[1] for t in tensors if t.name == "token_embd.weight" and len(t.shape) > 1), 0)


def _shared_experts(keys: Keys, tensors: Sequence[Tensor]) -> int:
    """As stated; where shared experts exist without a count (Qwen2-MoE, Llama 4) they are one."""
    if keys.has("expert_shared_count"):
        return keys.integer("expert_shared_count")
    return int(any(t.role is Role.SHARED_EXPERT for t in tensors))


def _tied(tensors: Sequence[Tensor]) -> bool:
    names = {t.name for t in tensors}
    return "token_embd.weight" in names and not names & {"output.weight", "cls.weight", "cls.output.weight"}
