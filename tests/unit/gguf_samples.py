"""GGUF files for the tests: well-formed ones by gguf-py, crafted ones byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
_FORMATS = {
    U8: "B",
    I8: "b",
    U16: "H",
    I16: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    BOOL: "?",
    U64: "Q",
    I64: "q",
    F64: "d",
}


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    """Type and content of a metadata value; arrays are given as (element kind, list)."""
    if kind == ARR:
        element, items = content
        return struct.pack("<IIQ", ARR, element, len(items)) + b"".join(value(element, i)[4:] for i in items)
    if kind == STR:
        return struct.pack("<I", STR) + text(content)
    return struct.pack("<I" + _FORMATS[kind], kind, content)


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def blob(
    keys: list[tuple[str, bytes]],
    tensors: list[bytes] = [],  # noqa: B006
    data: int = 0,
    *,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file from metadata (key, ``value(...)``), tensor lines and ``data`` zero bytes."""
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(keys) if n_keys is None else n_keys,
    )
    head += b"".join(text(k) + v for k, v in keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment if tensors else 0) + b"\0" * data


def small_model() -> bytes:
    """A two-layer model with all kinds of values, a few KB, none of it valid weights."""
    keys = [
        ("general.architecture", value(STR, "gemma3")),
        ("general.name", value(STR, "small")),
        ("general.file_type", value(U32, 15)),
        ("general.alignment", value(U32, 32)),
        ("gemma3.block_count", value(U32, 2)),
        ("gemma3.context_length", value(U32, 4096)),
        ("gemma3.embedding_length", value(U32, 256)),
        ("gemma3.feed_forward_length", value(ARR, (U32, [512, 768]))),
        ("gemma3.attention.head_count", value(U32, 4)),
        ("gemma3.attention.head_count_kv", value(ARR, (I32, [2, 1]))),
        ("gemma3.attention.sliding_window", value(U32, 512)),
        ("gemma3.rope.freq_base", value(F32, 1e6)),
        ("tokenizer.ggml.tokens", value(ARR, (STR, [f"token{i}" for i in range(64)]))),
        ("tokenizer.ggml.scores", value(ARR, (F32, [0.5] * 64))),
        ("tokenizer.ggml.add_bos_token", value(BOOL, True)),
        ("tokenizer.chat_template", value(STR, "{{ messages }}")),
    ]
    rows = []
    offset = 0
    for name, shape, kind, nbytes in [
        ("token_embd.weight", (256, 64), 12, 64 * 144),
        ("output_norm.weight", (256,), 0, 1024),
        ("blk.0.attn_q.weight", (256, 256), 2, 256 * 144),
        ("blk.0.ffn_up.weight", (256, 512), 12, 512 * 144),
        ("blk.1.ffn_up.weight", (256, 768), 14, 768 * 210),
    ]:
        rows.append(tensor(name, shape, kind, offset))
        offset += nbytes
    return blob(keys, rows, offset)


def write_all_types(path: Path) -> None:
    """Every metadata type, scalar and in arrays, every tensor type that gguf-py can store, alignment 64."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_custom_alignment(64)
    w.add_block_count(1)
    w.add_context_length(128)
    w.add_embedding_length(256)
    w.add_head_count(4)
    T = gguf.GGUFValueType
    extremes = {
        T.UINT8: [0, 255],
        T.INT8: [-128, 127],
        T.UINT16: [0, 65535],
        T.INT16: [-32768, 32767],
        T.UINT32: [0, 2**32 - 1],
        T.INT32: [-(2**31), 2**31 - 1],
        T.UINT64: [0, 2**64 - 1],
        T.INT64: [-(2**63), 2**63 - 1],
        T.FLOAT32: [-0.5, 3.0e38],
        T.FLOAT64: [-0.1, 1.0e308],
        T.BOOL: [True, False],
        T.STRING: ["", "größe ☃ 🦙"],
    }
    for kind, values in extremes.items():
        for i, v in enumerate(values):
            w.add_key_value(f"test.{kind.name.lower()}.{i}", v, kind)
        w.add_key_value(f"test.{kind.name.lower()}.array", values * 3, T.ARRAY, sub_type=kind)
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        if kind is gguf.GGMLQuantizationType.Q8_1:  # gguf-py has its size wrong: 40 bytes, ggml has 36
            continue
        raw = np.zeros((3, size * 2), dtype=np.uint8)
        plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(kind.name)
        if plain or (kind.name[0] == "I" and kind.name[1:].isdigit()):
            dtype = plain or {"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}[kind.name]
            w.add_tensor(f"blk.0.t_{kind.name.lower()}.weight", np.zeros((3, 5), dtype=dtype))
        else:
            w.add_tensor(f"blk.0.t_{kind.name.lower()}.weight", raw, raw_dtype=kind)
    _finish(w)


def write_moe(path: Path, n_expert: int = 4) -> None:
    """A mixture of experts with shared experts, latent attention and 3-dimensional tensors."""
    w = gguf.GGUFWriter(path, "deepseek2")
    w.add_name("tiny moe")
    w.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q4_0))
    w.add_block_count(2)
    w.add_context_length(4096)
    w.add_embedding_length(64)
    w.add_feed_forward_length(128)
    w.add_head_count(4)
    w.add_head_count_kv(1)
    w.add_key_length(48)
    w.add_value_length(32)
    w.add_key_length_mla(24)
    w.add_value_length_mla(16)
    w.add_kv_lora_rank(32)
    w.add_q_lora_rank(32)
    w.add_rope_dimension_count(16)
    w.add_expert_count(n_expert)
    w.add_expert_used_count(2)
    w.add_expert_shared_count(1)
    w.add_expert_feed_forward_length(32)
    w.add_leading_dense_block_count(1)
    w.add_token_list([f"t{i}" for i in range(100)])
    w.add_tensor("token_embd.weight", np.zeros((100, 64), np.float16))
    w.add_tensor("output.weight", np.zeros((100, 64), np.float32))
    w.add_tensor("blk.0.ffn_up.weight", np.zeros((128, 64), np.float32))
    for part, shape in {
        "gate": (n_expert, 32, 64),
        "up": (n_expert, 32, 64),
        "down": (n_expert, 64, 32),
    }.items():
        packed = np.zeros((*shape[:2], shape[2] // 32 * 18), np.uint8)
        w.add_tensor(f"blk.1.ffn_{part}_exps.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        w.add_tensor(f"blk.1.ffn_{part}_shexp.weight", np.zeros(shape[1:], np.float32))
    w.add_tensor("blk.1.ffn_gate_inp.weight", np.zeros((n_expert, 64), np.float32))
    w.add_tensor("blk.1.attn_kv_a_mqa.weight", np.zeros((48, 64), np.float32))
    _finish(w)


def write_split(path: Path) -> list[Path]:
    """Three parts beside ``path``; gguf-py numbers and names them."""
    w = gguf.GGUFWriter(path, "llama", split_max_tensors=2)
    w.add_block_count(4)
    w.add_embedding_length(32)
    w.add_head_count(2)
    for i in range(4):
        w.add_tensor(f"blk.{i}.attn_q.weight", np.zeros((32, 32), np.float32))
    w.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    _finish(w)
    return sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


def write_vocabulary(path: Path, n: int) -> None:
    """``n`` tokens with scores and types, and ``n`` merges."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(1)
    w.add_token_list([f"tok{i:06d}" for i in range(n)])
    w.add_token_scores([0.25] * n)
    w.add_token_types([1] * n)
    w.add_token_merges([f"to{i:06d} k{i}" for i in range(n)])
    _finish(w)


def _finish(w: gguf.GGUFWriter) -> None:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
