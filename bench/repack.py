"""Would reordered weights pay in slots? What a product of experts gains by them, and what reordering costs.

    python -m bench.repack [--types Q4_K,Q4_0,Q8_0] [--threads 2] [--runs 9]

Shapes are those of bench.tier_moe: matrices of 2048 x 1024 of 64 experts, 8 used. Timed for one token and for 32:
MUL_MAT_ID on weights as they are in the file, and on weights that the CPU backend has reordered (CPU_REPACK); and how
long ggml takes to reorder them, by one thread, as it does when a model is loaded. A slot would have to be reordered
each time an expert was read, so it pays where reordering what was missed takes less than the products gain. Printed is
the hit rate from which it would; only the computing threads' time is counted, and the drive's is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time

import gguf as gguf_py
import numpy as np

from tensortier._llama import microbench
from tensortier._llama.libs import ggml_function

K, N, EXPERTS, USED = 2048, 1024, 64, 8
TYPES = {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12}
POINTER = ctypes.c_void_p


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool))


def reorder_seconds(type_id: int, nbytes: int, runs: int) -> list[float]:
    """Of each run of handing the weights of all experts to a buffer of the type CPU_REPACK."""
    by_name = ggml_function("ggml_backend_dev_by_name", POINTER, ctypes.c_char_p)
    registry = ggml_function("ggml_backend_dev_backend_reg", POINTER, POINTER)
    address = ggml_function("ggml_backend_reg_get_proc_address", POINTER, POINTER, ctypes.c_char_p)
    name = ggml_function("ggml_backend_buft_name", ctypes.c_char_p, POINTER)
    device = by_name(b"CPU")
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(
        address(registry(device), b"ggml_backend_dev_get_extra_bufts")
    )(device)
    found = None
    for i in range(16):
        if not extra[i]:
            break
        if b"REPACK" in name(extra[i]):
            found = extra[i]
    if found is None:
        return []
    init = ggml_function("ggml_init", POINTER, InitParams)
    context = init(InitParams(1 << 20, None, True))
    new = ggml_function(
        "ggml_new_tensor_3d", POINTER, POINTER, ctypes.c_int, *[ctypes.c_int64] * 3
    )  # fmt: skip
    tensor = new(context, type_id, K, N, EXPERTS)
    allocate = ggml_function("ggml_backend_alloc_ctx_tensors_from_buft", POINTER, POINTER, POINTER)
    buffer = allocate(context, found)
    put = ggml_function(
        "ggml_backend_tensor_set", None, POINTER, POINTER, ctypes.c_size_t, ctypes.c_size_t
    )  # fmt: skip
    data = np.random.default_rng(1).integers(0, 100, nbytes, dtype=np.uint8)
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        put(tensor, data.ctypes.data, 0, nbytes)
        seconds.append(time.perf_counter() - started)
    ggml_function("ggml_backend_buffer_free", None, POINTER)(buffer)
    ggml_function("ggml_free", None, POINTER)(context)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", default="Q4_K,Q4_0,Q8_0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    for name in args.types.split(","):
        block, size = gguf_py.GGML_QUANT_SIZES[gguf_py.GGMLQuantizationType[name]]
        one = K * N // block * size
        plain, reordered = {}, {}
        for tokens in (1, 32):
            for repack, found in ((False, plain), (True, reordered)):
                seconds = microbench.mul_mat(
                    "CPU", TYPES[name], k=K, n=N, count=2, batch=tokens, experts=EXPERTS, used=USED,
                    threads=args.threads, repack=repack, runs=args.runs,
                )  # fmt: skip
                found[tokens] = statistics.median(seconds) / 2 if seconds else float("nan")
        if np.isnan(reordered[1]):  # ggml would not take the weights
            print(f"{name}: one token: plain {plain[1] * 1e3:.3f} ms; no reordered kernels on this processor")
            continue
        reorder = reorder_seconds(TYPES[name], one * EXPERTS, 3)
        if not reorder:
            print(f"{name}: no reordered weights here")
            continue
        rate = one * EXPERTS / statistics.median(reorder)
        gain = plain[1] - reordered[1]
        each = one / rate
        hits = 1 - gain / (USED * each) if gain > 0 else 1.0
        print(
            f"{name}: 8 experts of {one / 1e6:.2f} MB, one token: plain {plain[1] * 1e3:.3f} ms, reordered "
            f"{reordered[1] * 1e3:.3f} ms; 32 tokens: {plain[32] * 1e3:.1f} and {reordered[32] * 1e3:.1f} ms; "
            f"reordering {rate / 1e9:.2f} GB/s, {each * 1e3:.2f} ms for one matrix: pays from a hit rate of {hits:.2f}"
        )


if __name__ == "__main__":
    main()
