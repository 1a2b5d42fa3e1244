"""The byte parser: a GGUF header in any buffer to plain Python values.

The format is described by ggml's ``docs/gguf.md`` and, where that is silent, by what
``gguf_init_from_reader`` in ``ggml/src/gguf.cpp`` accepts: a file that this parser takes and that one
refuses would be planned for and then fail to load. So nested arrays, gaps between tensors and duplicate keys
are errors here too.

Every count and length is checked against the bytes that are left before anything is allocated, and fixed
budgets (far above any real model) bound the time and memory that a crafted file can cost.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Any, overload

from tensortier.errors import ModelFileError
from tensortier.gguf.ggml_types import GGML_TYPES

Buffer = bytes | bytearray | mmap

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_ARRAY_STRINGS = 1 << 24  # in all string arrays of one file together
MAX_TEXT_BYTES = 1 << 25  # of all names and scalar strings of one file together
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less its terminator
MAX_DIMS = 4
INT64_MAX = (1 << 63) - 1

_STRING = 8
_ARRAY = 9
_SCALARS: dict[int, tuple[str, struct.Struct]] = {
    0: ("uint8", struct.Struct("<B")),
    1: ("int8", struct.Struct("<b")),
    2: ("uint16", struct.Struct("<H")),
    3: ("int16", struct.Struct("<h")),
    4: ("uint32", struct.Struct("<I")),
    5: ("int32", struct.Struct("<i")),
    6: ("float32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<B")),  # any byte but 0 is true, as ggml reads it
    10: ("uint64", struct.Struct("<Q")),
    11: ("int64", struct.Struct("<q")),
    12: ("float64", struct.Struct("<d")),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class NeedMore(Exception):
    """The buffer is only the beginning of the file, and the header goes on at least to byte ``end``."""

    def __init__(self, end: int) -> None:
        super().__init__(f"need {end} bytes")
        self.end = end


class LazyArray(Sequence[Any]):
    """An array of the metadata that is decoded when it is looked at. Its length is known without that.

    Elements are ``int``, ``float``, ``bool`` or ``str``. Tokens of a vocabulary need not be valid UTF-8:
    bytes that are not come out as ``\\xNN``.
    """

    __slots__ = ("_buffer", "_cache", "_count", "_start", "_type")

    def __init__(self, buffer: Buffer, type_id: int, start: int, count: int) -> None:
        self._buffer = buffer
        self._type = type_id
        self._start = start
        self._count = count
        self._cache: tuple[Any, ...] | None = None

    @property
    def element_type(self) -> str:
        """ "string", "uint32", "float32", ..."""
        return "string" if self._type == _STRING else _SCALARS[self._type][0]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._values()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self._count} x {self.element_type}>"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickled and copied as a tuple: the file stays behind."""
        return tuple, (list(self),)

    def _values(self) -> tuple[Any, ...]:
        if self._cache is None:
            self._cache = self._strings() if self._type == _STRING else self._numbers()
        return self._cache

    def _numbers(self) -> tuple[Any, ...]:
        name, one = _SCALARS[self._type]
        values = struct.unpack_from(f"<{self._count}{one.format[1:]}", self._buffer, self._start)
        return tuple(v != 0 for v in values) if name == "bool" else values

    def _strings(self) -> tuple[str, ...]:
        unpack, buffer, pos = _U64.unpack_from, self._buffer, self._start
        values = []
        for _ in range(self._count):
            (n,) = unpack(buffer, pos)
            values.append(buffer[pos + 8 : pos + 8 + n].decode("utf-8", "backslashreplace"))
            pos += 8 + n
        return tuple(values)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One line of the tensor table."""

    name: str
    shape: tuple[int, ...]  # ggml's order, as in the file
    qtype: str
    nbytes: int
    offset: int  # of the data, from the start of the file


@dataclass(frozen=True)
class Header:
    """A GGUF header as it is in the file."""

    source: str  # path or URL
    version: int
    metadata: dict[str, Any]  # int, float, bool, str or LazyArray
    value_types: dict[str, str]  # "uint32", "string", "array[string]"
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_offset: int  # where tensor data begins
    file_size: int


class _Cursor:
    """Reads numbers and strings from a buffer that may be only the first part of ``size`` bytes."""

    __slots__ = ("array_strings", "available", "buffer", "pos", "size", "source", "text_bytes")

    def __init__(self, buffer: Buffer, source: str, size: int) -> None:
        self.buffer = buffer
        self.source = source
        self.size = size
        self.available = min(len(buffer), size)
        self.pos = 0
        self.array_strings = 0
        self.text_bytes = 0

    def fail(self, problem: str) -> ModelFileError:
        if len(problem) > 400:  # names in a corrupt file can be long
            problem = f"{problem[:200]} ... {problem[-150:]}"
        return ModelFileError(f"{self.source}: {problem}")

    def need(self, n: int, what: str) -> int:
        """Position of the next ``n`` bytes, which are then consumed."""
        pos = self.pos
        end = pos + n
        if end > self.available:
            if end > self.size:
                raise self.fail(
                    f"cut short or corrupt: {what} at byte {pos} needs {n} bytes, the file has "
                    f"{max(0, self.size - pos)} left; download it again"
                )
            raise NeedMore(end)
        self.pos = end
        return pos

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.buffer, self.need(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.buffer, self.need(8, what))[0]
        return value

    def text(self, what: str, limit: int) -> str:
        n = self.u64(what)
        limit = min(limit, MAX_TEXT_BYTES - self.text_bytes)
        if n > limit:
            raise self.fail(
                f"{what} has a length of {n} bytes, more than the {limit} allowed; the file is corrupt"
            )
        pos = self.need(n, what)
        self.text_bytes += n
        try:
            return self.buffer[pos : pos + n].decode("utf-8")
        except UnicodeDecodeError as exc:
            raise self.fail(f"{what} at byte {pos} is not valid UTF-8; the file is corrupt") from exc

    def skip_strings(self, count: int, what: str) -> None:
        """Step over ``count`` strings. The loop is bare: vocabularies have a quarter million of them."""
        self.array_strings += count
        if self.array_strings > MAX_ARRAY_STRINGS:
            raise self.fail(f"{what} has {count} strings, more than any model; the file is corrupt")
        unpack, buffer, pos = _U64.unpack_from, self.buffer, self.pos
        try:
            for _ in range(count):
                pos += 8 + unpack(buffer, pos)[0]
        except (struct.error, OverflowError, IndexError):
            self.pos = pos
            self.need(8, what)
            raise self.fail(f"{what} is corrupt at byte {pos}") from None
        self.pos = pos
        self.need(0, what)


def parse(buffer: Buffer, source: str, file_size: int | None = None) -> Header:
    """Parse the header at the start of ``buffer``.

    ``buffer`` may be the beginning of a larger file of ``file_size`` bytes; then ``NeedMore`` is raised when
    the header does not end in it. Lazy arrays keep a reference to ``buffer``. Raises ``ModelFileError``.
    """
    cur = _Cursor(buffer, source, len(buffer) if file_size is None else file_size)
    version = _preamble(cur)
    n_tensors = _count(cur, "the number of tensors", MAX_TENSORS, smallest=8 + 4 + 4 + 8)
    n_keys = _count(cur, "the number of metadata keys", MAX_KEYS, smallest=8 + 1 + 4 + 1)
    metadata, value_types = _metadata(cur, n_keys)
    alignment = _alignment(cur, metadata, value_types)
    rows = _tensor_rows(cur, n_tensors)
    data_offset = -(-cur.pos // alignment) * alignment if n_tensors else cur.pos
    tensors = _place(cur, rows, data_offset, alignment)
    return Header(source, version, metadata, value_types, tensors, alignment, data_offset, cur.size)


def _preamble(cur: _Cursor) -> int:
    if cur.size == 0:
        raise cur.fail("the file is empty")
    if cur.size < 4:
        raise cur.fail("not a GGUF file: it has fewer than 4 bytes")
    pos = cur.need(4, "the magic number")
    magic = bytes(cur.buffer[pos : pos + 4])
    if magic != b"GGUF":
        raise cur.fail(f"not a GGUF file: it begins with {magic!r} instead of b'GGUF'")
    version = cur.u32("the version")
    if version & 0xFFFF == 0 and version:
        raise cur.fail("a big-endian GGUF file; llama.cpp reads only little-endian ones here, convert it")
    if version == 1:
        raise cur.fail("GGUF version 1 is no longer supported; convert the model again")
    if version not in (2, 3):
        raise cur.fail(f"GGUF version {version} is unknown (2 and 3 are supported)")
    return version


def _count(cur: _Cursor, what: str, limit: int, smallest: int) -> int:
    """A number of things of which each takes at least ``smallest`` bytes of the rest of the file."""
    n = cur.u64(what)
    if n > limit or n * smallest > cur.size - cur.pos:
        raise cur.fail(f"{what} is given as {n}, which does not fit; the file is corrupt")
    return n


def _metadata(cur: _Cursor, n_keys: int) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {}
    types: dict[str, str] = {}
    for i in range(n_keys):
        key = cur.text(f"metadata key {i}", 0xFFFF)
        if not key:
            raise cur.fail(f"metadata key {i} is empty; the file is corrupt")
        if key in values:
            raise cur.fail(f"metadata key {key!r} is there twice; the file is corrupt")
        values[key], types[key] = _value(cur, key)
    return values, types


def _value(cur: _Cursor, key: str) -> tuple[Any, str]:
    what = f"the value of {key!r}"
    type_id = cur.u32(what)
    scalar = _SCALARS.get(type_id)
    if scalar is not None:
        name, packed = scalar
        (value,) = packed.unpack_from(cur.buffer, cur.need(packed.size, what))
        return (value != 0 if name == "bool" else value), name
    if type_id == _STRING:
        return cur.text(what, MAX_TEXT_BYTES), "string"
    if type_id == _ARRAY:
        array = _array(cur, what)
        return array, f"array[{array.element_type}]"
    raise cur.fail(f"{what} has the unknown type {type_id}; the file is corrupt")


def _array(cur: _Cursor, what: str) -> LazyArray:
    element = cur.u32(what)
    if element == _ARRAY:
        raise cur.fail(f"{what} is an array of arrays, which llama.cpp does not support")
    if element != _STRING and element not in _SCALARS:
        raise cur.fail(f"{what} is an array of the unknown type {element}; the file is corrupt")
    count = cur.u64(what)
    size = 8 if element == _STRING else _SCALARS[element][1].size
    if count * size > cur.size - cur.pos:
        raise cur.fail(
            f"{what} claims {count} elements, more than the file has bytes for; it is cut short or corrupt"
        )
    start = cur.pos
    if element == _STRING:
        cur.skip_strings(count, what)
    else:
        cur.need(count * size, what)
    return LazyArray(cur.buffer, element, start, count)


def _alignment(cur: _Cursor, metadata: dict[str, Any], types: dict[str, str]) -> int:
    value = metadata.get("general.alignment", 32)
    kind = types.get("general.alignment", "uint32")
    if kind != "uint32" or value == 0 or value & (value - 1):
        shown = f"{value} ({kind})" if kind != "uint32" else value
        raise cur.fail(f"general.alignment is {shown}, it must be a uint32 power of two; the file is corrupt")
    return int(value)


def _tensor_rows(cur: _Cursor, n_tensors: int) -> list[tuple[str, tuple[int, ...], str, int, int]]:
    """Name, shape, type, bytes and offset (from the start of the data) of every tensor."""
    rows = []
    seen: set[str] = set()
    for i in range(n_tensors):
        name = cur.text(f"the name of tensor {i}", MAX_NAME_BYTES)
        if name in seen:
            raise cur.fail(f"tensor {name!r} is there twice; the file is corrupt")
        seen.add(name)
        what = f"the description of tensor {name!r}"
        n_dims = cur.u32(what)
        if n_dims > MAX_DIMS:
            raise cur.fail(
                f"tensor {name!r} has {n_dims} dimensions, more than {MAX_DIMS}; the file is corrupt"
            )
        pos = cur.need(8 * n_dims, what)
        shape: tuple[int, ...] = struct.unpack_from(f"<{n_dims}Q", cur.buffer, pos)
        type_id = cur.u32(what)
        offset = cur.u64(what)
        traits = GGML_TYPES.get(type_id)
        if traits is None:
            raise cur.fail(f"tensor {name!r} has type {type_id}, which this llama.cpp does not know")
        row = shape[0] if shape else 1
        if row % traits.block_size:
            raise cur.fail(
                f"tensor {name!r} has rows of {row} elements, not a multiple of the {traits.block_size} "
                f"that a block of {traits.name} holds; the file is corrupt"
            )
        elements = 1
        for d in shape:
            elements *= d
        nbytes = elements // traits.block_size * traits.type_size
        # A zero among the dimensions hides an overflow of the others from the product.
        if max(shape, default=0) > INT64_MAX or elements > INT64_MAX or nbytes > INT64_MAX:
            raise cur.fail(f"tensor {name!r} has the impossible shape {list(shape)}; the file is corrupt")
        rows.append((name, shape, traits.name, nbytes, offset))
    return rows


def _place(
    cur: _Cursor, rows: list[tuple[str, tuple[int, ...], str, int, int]], start: int, alignment: int
) -> tuple[TensorInfo, ...]:
    """As ggml demands, tensors follow one another without gap or overlap, each padded to the alignment."""
    tensors = []
    expected = 0
    for name, shape, qtype, nbytes, offset in rows:
        if offset != expected:
            how = "overlaps its predecessor" if offset < expected else "leaves a gap"
            raise cur.fail(
                f"the data of tensor {name!r} is at offset {offset} and {how} (expected {expected}); "
                "the file is corrupt"
            )
        beyond = start + offset + nbytes - cur.size
        if beyond > 0:
            raise cur.fail(
                f"the data of tensor {name!r} goes {beyond} bytes past the end of the file; "
                "the download is incomplete"
            )
        tensors.append(TensorInfo(name, shape, qtype, nbytes, start + offset))
        expected += -(-nbytes // alignment) * alignment
    return tuple(tensors)
