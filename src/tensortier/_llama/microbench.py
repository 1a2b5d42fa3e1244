"""Times single operations on a device with the plug-in: matrix products and attention, as a model computes them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from tensortier._llama.libs import native
from tensortier.errors import LibraryError


class _MulMat(ctypes.Structure):
    """``tt_mul_mat_bench`` of native/tensortier.h"""

    _fields_ = (
        ("device", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("experts", ctypes.c_int32),
        ("used", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("repack", ctypes.c_int32),
    )


class _Attention(ctypes.Structure):
    """``tt_attention_bench`` of native/tensortier.h"""

    _fields_ = (
        ("device", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("head_dim", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("cells", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    )


class _SmallOps(ctypes.Structure):
    """``tt_small_ops_bench`` of native/tensortier.h"""

    _fields_ = (
        ("device", ctypes.c_char_p),
        ("count", ctypes.c_int32),
        ("width", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    )


class _Copy(ctypes.Structure):
    """``tt_copy_bench`` of native/tensortier.h"""

    _fields_ = (
        ("device", ctypes.c_char_p),
        ("bytes", ctypes.c_int64),
        ("pinned", ctypes.c_int32),
        ("to_device", ctypes.c_int32),
    )


def small_ops(
    device: str, *, count: int, width: int, rows: int = 1, threads: int = 1, runs: int = 5
) -> list[float]:
    """Seconds of each run of ``count`` norms, products and sums in turn on ``rows`` vectors. Otherwise as
    ``mul_mat``."""
    return _run(native().tt_bench_small_ops, _SmallOps(device.encode(), count, width, rows, threads), runs)


def copy(device: str, nbytes: int, *, to_device: bool, pinned: bool = False, runs: int = 5) -> list[float]:
    """Seconds of each copy of ``nbytes`` between main memory and the device's. Empty where ``pinned`` memory is
    asked for and the device offers none. Otherwise as ``mul_mat``."""
    bench = _Copy(device.encode(), nbytes, 1 if pinned else 0, 1 if to_device else 0)
    return _run(native().tt_bench_copy, bench, runs)


def mul_mat(
    device: str,
    type_id: int,
    *,
    k: int,
    n: int,
    count: int,
    batch: int = 1,
    experts: int = 0,
    used: int = 0,
    threads: int = 1,
    repack: bool = False,
    runs: int = 5,
) -> list[float]:
    """Seconds of each run of ``count`` products of a [k, n] weight with ``batch`` columns; with ``experts``, of
    as many experts per weight, ``used`` of them per token. Empty where the device has no kernel for it.

    Raises:
        LibraryError: no such device, or not enough memory.
    """
    bench = _MulMat(device.encode(), type_id, count, k, n, batch, experts, used, threads, 1 if repack else 0)
    return _run(native().tt_bench_mul_mat, bench, runs)


def attention(
    device: str,
    type_id: int,
    *,
    head_dim: int,
    heads: int,
    kv_heads: int,
    cells: int,
    count: int,
    batch: int = 1,
    threads: int = 1,
    runs: int = 5,
) -> list[float]:
    """Seconds of each run of ``count`` flash attentions over ``cells`` cached tokens. Otherwise as ``mul_mat``."""
    bench = _Attention(device.encode(), type_id, count, head_dim, heads, kv_heads, cells, batch, threads)
    return _run(native().tt_bench_attention, bench, runs)


def _run(function: Callable[..., int], bench: Any, runs: int) -> list[float]:
    seconds = (ctypes.c_double * runs)()
    error = ctypes.create_string_buffer(256)
    done = function(ctypes.byref(bench), seconds, runs, error, ctypes.c_size_t(len(error)))
    if done < 0:
        raise LibraryError(f"microbenchmark: {error.value.decode(errors='replace')}")
    return list(seconds[:done])
