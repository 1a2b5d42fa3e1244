"""Single operations of ggml, with the operands that models have."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

from tensortier.calibrate.records import Attention, Copy, Elementwise, Product
from tensortier.errors import LibraryError
from tensortier.gguf.ggml_types import GGML_TYPES

MIB = 1 << 20
STEADY = 0.12  # spread below which a figure is taken at once; above it, measured up to twice more
LONG, SHORT = 4096, 512  # columns of the matrices
WIDE = 256  # tokens of the wide products
SMALL_OPS = 60


def robust(seconds: Sequence[float]) -> tuple[float, float]:
    """(seconds, relative spread) of runs of which some were disturbed: the median of the faster half, and how
    far the slowest of that half is from it."""
    half = sorted(seconds)[: max(1, (len(seconds) + 1) // 2)]
    middle = statistics.median(half)
    return middle, half[-1] / middle - 1.0


_Row = TypeVar("_Row", Product, Attention)


def steadiest(measure: Callable[[], _Row | None], again: Callable[[], bool] = lambda: True) -> _Row | None:
    """A figure whose runs agree, or after three tries the fastest: a disturbance only ever slows. ``again`` is asked
    before each further try; where it says no, what there is has to do."""
    rows: list[_Row] = []
    while len(rows) < 3 and (not rows or again()):
        row = measure()
        if row is None or row.spread < STEADY:
            return row
        rows.append(row)
    return max(rows, key=lambda r: r.bytes_per_second if isinstance(r, Product) else r.elements_per_second)


def _type(name: str) -> tuple[int, float]:
    """(ggml's number, bytes per element) of a type."""
    for number, kind in GGML_TYPES.items():
        if kind.name == name:
            return number, kind.type_size / kind.block_size
    raise LibraryError(f"ggml has no type {name}")


def measure_product(
    device: str,
    name: str,
    *,
    threads: int,
    columns: int = LONG,
    batch: int = 1,
    experts: bool = False,
    repack: bool = False,
    operand_bytes: int = 384 * MIB,
) -> Product | None:
    """Matrices as feed-forward layers have them, each read once per run. With one column ``operand_bytes`` of them,
    so that no cache helps; with many, where arithmetic takes longer, two. ``experts``: a mixture of eight of which
    each token uses two. None where there is no such kernel."""
    from tensortier._llama import microbench

    number, per_element = _type(name)
    rows = 2048 if batch > 1 else 3072
    total, used = (8, 2) if experts else (0, 0)
    each = columns * rows * per_element
    count = max(2, round(operand_bytes / each)) if batch == 1 else 2
    seconds = microbench.mul_mat(
        device,
        number,
        k=columns,
        n=rows,
        count=count,
        batch=batch,
        experts=total,
        used=used,
        threads=threads,
        repack=repack,
        runs=7 if batch == 1 else 2,
    )
    if not seconds:
        return None
    middle, spread = robust(seconds)
    speed = max(1, used) * each * count / middle
    return Product(device, name, threads, columns, batch, experts, repack, speed, spread)


def measure_attention(
    device: str, name: str, *, threads: int, head_dim: int, cells: int, batch: int = 1
) -> Attention | None:
    """``batch`` tokens over caches of ``cells`` tokens with 4 KV heads and four times as many query heads; for a
    single token so many caches that they do not stay in the processor's."""
    from tensortier._llama import microbench

    number, per_element = _type(name)
    kv_heads, heads = 4, 16
    size = 2 * cells * kv_heads * head_dim * per_element
    room = 48 * MIB if name == "F16" else 8 * MIB  # quantized ones are arithmetic
    count = max(2, round(room / size)) if batch == 1 else 1
    seconds = microbench.attention(
        device,
        number,
        head_dim=head_dim,
        heads=heads,
        kv_heads=kv_heads,
        cells=cells,
        count=count,
        batch=batch,
        threads=threads,
        runs=5 if batch == 1 else 3,
    )
    if not seconds:
        return None
    middle, spread = robust(seconds)
    elements = heads * 2 * head_dim * cells * batch * count
    return Attention(device, name, threads, head_dim, cells, batch, elements / middle, spread)


def measure_elementwise(device: str, *, threads: int) -> Elementwise:
    """Norms, products and sums on a batch of 256 vectors of 2048 values."""
    from tensortier._llama import microbench

    width, rows = 2048, WIDE
    seconds = microbench.small_ops(device, count=SMALL_OPS, width=width, rows=rows, threads=threads, runs=5)
    middle, spread = robust(seconds)
    return Elementwise(device, threads, middle / (SMALL_OPS * width * rows), spread)


def measure_copy(device: str, *, to_device: bool, pinned: bool, nbytes: int = 64 * MIB) -> Copy | None:
    """One large copy; None where the device has no pinned memory to offer."""
    from tensortier._llama import microbench

    seconds = microbench.copy(device, nbytes, to_device=to_device, pinned=pinned)
    if not seconds:
        return None
    middle, spread = robust(seconds)
    return Copy(device, to_device, pinned, nbytes / middle, spread)
