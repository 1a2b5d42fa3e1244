"""Writing GGUF files: a header through gguf-py, tensor data streamed behind it, published atomically."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor to be. ``shape`` is in ggml's order (contiguous dimension first), ``qtype`` ggml's name."""

    name: str
    shape: tuple[int, ...]
    qtype: str

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.qtype]]
        if self.shape[0] % block:
            raise ValueError(
                f"{self.name}: rows of {self.shape[0]} are no multiple of {self.qtype}'s {block}"
            )
        return prod(self.shape) // block * size


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A temporary name to write to; it becomes ``path`` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Copied:
    """A metadata value with the types it has in the file it comes from."""

    value: Any
    types: tuple[gguf.GGUFValueType, ...]


@cache
def fields(path: Path, prefix: str) -> Mapping[str, Copied]:
    """The metadata of a file whose keys start with ``prefix``, ready for :func:`write_header`."""
    found = gguf.GGUFReader(path).fields
    return {k: Copied(f.contents(), tuple(f.types)) for k, f in found.items() if k.startswith(prefix)}


def write_header(path: Path, arch: str, metadata: Mapping[str, Any], tensors: Sequence[Spec]) -> list[int]:
    """Write everything up to the tensor data; returns each tensor's offset from the start of the file.

    Values may be Python scalars, lists or what :func:`fields` returns. Integers become UINT32, floats
    FLOAT32, as llama.cpp's converter writes them.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        _add(writer, key, value)
    for t in tensors:
        # any dtype but uint8 makes gguf-py take the shape as elements and not as bytes
        kind = gguf.GGMLQuantizationType[t.qtype]
        writer.add_tensor_info(t.name, t.shape[::-1], np.dtype(np.float32), t.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    offset = gguf.GGUFWriter.ggml_pad(path.stat().st_size, ALIGNMENT)
    offsets = []
    for t in tensors:
        offsets.append(offset)
        offset += gguf.GGUFWriter.ggml_pad(t.nbytes, ALIGNMENT)
    os.truncate(path, offset)
    return offsets


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = gguf.GGUFValueType
    if isinstance(value, Copied):
        element = value.types[1] if len(value.types) > 1 else None
        writer.add_key_value(key, value.value, value.types[0], sub_type=element)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        element = {bool: kinds.BOOL, int: kinds.INT32, float: kinds.FLOAT32, str: kinds.STRING}[
            type(value[0])
        ]
        writer.add_key_value(key, value, kinds.ARRAY, sub_type=element)
    else:
        raise TypeError(f"{key}: no GGUF type for {type(value).__name__}")
