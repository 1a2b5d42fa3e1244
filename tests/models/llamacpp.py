"""llama.cpp's plain C interface: loads without allocation, and logits with any graph node beside them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@contextmanager
def model(path: Path, **fields: Any) -> Iterator[Any]:
    """A loaded ``llama_model *``; ``fields`` are set on its parameters. RuntimeError if it is refused."""
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    for key, value in fields.items():
        setattr(params, key, value)
    handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not handle:
        raise RuntimeError(f"llama.cpp does not load {path}")
    try:
        yield handle
    finally:
        llama_cpp.llama_model_free(handle)


@contextmanager
def context(handle: Any, **fields: Any) -> Iterator[Any]:
    """A ``llama_context *`` of the model; ``fields`` are set on the ``llama_context_params``."""
    params = llama_cpp.llama_context_default_params()
    for key, value in fields.items():
        setattr(params, key, value)
    ctx = llama_cpp.llama_init_from_model(handle, params)
    if not ctx:
        raise RuntimeError("llama.cpp does not create the context")
    try:
        yield ctx
    finally:
        llama_cpp.llama_free(ctx)


@contextmanager
def no_alloc(path: Path, **context_fields: Any) -> Iterator[tuple[Any, Any]]:
    """Model and context of a file whose data is neither read nor given memory."""
    mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    with model(path, no_alloc=True, load_mode=mode) as handle, context(handle, **context_fields) as ctx:
        yield handle, ctx


def tokenize(path: Path, text: str) -> list[int]:
    """Tokens of ``text``, no special ones added."""
    with model(path, vocab_only=True) as handle:
        raw = text.encode()
        out = (llama_cpp.llama_token * (len(raw) + 8))()
        vocab = llama_cpp.llama_model_get_vocab(handle)
        n = llama_cpp.llama_tokenize(vocab, raw, len(raw), out, len(out), False, False)
        return list(out[:n])


def evaluate(
    path: Path, tokens: Sequence[int], nodes: Sequence[str] = (), threads: int = 2
) -> tuple[Floats, dict[str, Floats]]:
    """Logits ``[token, vocabulary]`` of a sequence, and the graph's f32 nodes of the given names.

    A node is returned as ``[token, width]``; where a graph has the name more than once, the last one wins.
    """
    wanted = frozenset(nodes)
    seen: dict[str, Floats] = {}
    base = _ggml_base()

    def observe(tensor: int, ask: bool, _: Any) -> bool:
        name = base.ggml_get_name(tensor).decode()
        if name not in wanted:
            return not ask  # "no need of it" when asked, "go on" afterwards
        if not ask:
            data = np.empty(base.ggml_nbytes(tensor) // 4, np.float32)
            base.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
            seen[name] = data.reshape(len(tokens), -1)
        return True

    callback = llama_cpp.ggml_backend_sched_eval_callback(observe)
    n = len(tokens)
    with (
        model(path) as handle,
        context(
            handle,
            n_ctx=n,
            n_batch=n,
            n_ubatch=n,
            n_threads=threads,
            n_threads_batch=threads,
            cb_eval=callback,
        ) as ctx,
    ):
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if status := llama_cpp.llama_decode(ctx, batch):
                raise RuntimeError(f"llama_decode returned {status}")
        finally:
            llama_cpp.llama_batch_free(batch)
        vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(handle))
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(ctx), (n, vocab)).copy()
    return logits, seen


def perplexity(logits: Floats, tokens: Sequence[int], first: int = 1) -> float:
    """exp of the mean negative log-likelihood of ``tokens[first:]``, each given all before it."""
    rows = logits[first - 1 : len(tokens) - 1].astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    likelihood = rows[np.arange(len(rows)), list(tokens[first:])] - np.log(np.exp(rows).sum(axis=1))
    return float(np.exp(-likelihood.mean()))


def _ggml_base() -> ctypes.CDLL:
    # the .so.0 name is the copy that libllama has loaded; any other would be a second library
    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so.0"))
    lib.ggml_get_name.argtypes, lib.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    lib.ggml_nbytes.argtypes, lib.ggml_nbytes.restype = [ctypes.c_void_p], ctypes.c_size_t
    get = lib.ggml_backend_tensor_get
    get.argtypes, get.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None
    return lib
