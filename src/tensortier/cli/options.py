"""Options that commands share, and the translation of their text. Spelled as llama.cpp spells them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import typer

from tensortier.errors import UsageError
from tensortier.types import Sampling, Settings

INT_MAX = 2**31 - 1  # llama.cpp keeps counts in C's int; more would arrive there as another number
MAX_CONTEXT = 2**24  # tokens; the longest that a model is trained for are 10 million
MAX_THREADS = 512  # GGML_MAX_N_THREADS; with more, ggml ends the process


class LoadMode(StrEnum):
    """How the weights come from the file into memory."""

    AUTO = "auto"
    MMAP = "mmap"
    NONE = "none"
    MLOCK = "mlock"
    MMAP_MLOCK = "mmap+mlock"
    DIRECT = "direct"


class FlashAttention(StrEnum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


class CacheType(StrEnum):
    """What llama.cpp allows for its KV cache (``kv_cache_types`` in its common/arg.cpp)."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"
    IQ4_NL = "iq4_nl"
    Q5_0 = "q5_0"
    Q5_1 = "q5_1"


RpcOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rpc",
        metavar="HOST:PORT",
        help="Use the devices of this ggml RPC server too. Repeat it, or join several by commas.",
    ),
]


def choices(options: type[StrEnum]) -> str:
    """The values of ``options`` for a help text."""
    return ", ".join(options)


def split_list(values: Sequence[str] | None) -> tuple[str, ...]:
    """The parts of repeated and comma-joined values, in order, empty parts dropped."""
    return tuple(part for value in values or () for part in (p.strip() for p in value.split(",")) if part)


def split_servers(values: Sequence[str] | None) -> tuple[str, ...]:
    """``host:port`` of each RPC server. Raises UsageError for anything else."""
    servers = split_list(values)
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise UsageError(f"--rpc {server!r} is not host:port, such as 127.0.0.1:50052")
    return servers


def gpu_layers(text: str | None) -> int | None:
    """``-ngl``: a count, "all" (-1 here), or "auto" and nothing (None: the planner decides)."""
    if text is None or text == "auto":
        return None
    if text == "all":
        return -1
    if text.isascii() and text.isdigit() and len(text) < 10:  # less than INT_MAX
        return int(text)
    raise UsageError(f"-ngl {text!r} is not a number of layers: give 0 or more, 'all' or 'auto'")


def tensor_split(text: str | None) -> tuple[float, ...] | None:
    """``-ts``: shares joined by commas or slashes; not negative, not all zero. Raises UsageError."""
    if text is None:
        return None
    try:
        shares = tuple(float(part) for part in text.replace("/", ",").split(","))
    except ValueError:
        shares = ()
    if not shares or not all(math.isfinite(s) and s >= 0 for s in shares) or not 0 < sum(shares) < math.inf:
        raise UsageError(f"-ts {text!r} is not a list of shares, such as 3,1")
    return shares


def device_list(values: Sequence[str] | None) -> tuple[str, ...] | None:
    """``--device``: names joined by commas, or ("none",); None where nothing is given. Raises UsageError."""
    if values is None:
        return None
    names = split_list(values)
    if not names:
        raise UsageError(
            "--device needs a name; 'tensortier hardware' lists them, 'none' keeps all on the CPU"
        )
    return names


def sampling(values: Sampling) -> Sampling:
    """``values``, if llama.cpp can sample with them. Raises UsageError."""
    for name, value in (
        ("--temperature", values.temperature),
        ("--top-p", values.top_p),
        ("--min-p", values.min_p),
        ("--repeat-penalty", values.repeat_penalty),
        ("--frequency-penalty", values.frequency_penalty),
        ("--presence-penalty", values.presence_penalty),
    ):
        if not math.isfinite(value):  # not a number passes every comparison with a bound
            raise UsageError(f"{name} {value} is not a number that can be used")
    if values.repeat_penalty <= 0:
        raise UsageError(
            f"--repeat-penalty {values.repeat_penalty:g} is not positive: 1 is off, 1.1 is usual"
        )
    if values.max_tokens == 0:
        raise UsageError("-n 0 leaves no room for an answer: give at least 1, or -1 for no limit")
    if "" in values.stop:
        raise UsageError("--stop needs a text that is not empty")
    return values


def settings(values: Settings, *, batch: int | None, ubatch: int | None) -> Settings:
    """``values`` with the batch sizes that were given. A micro-batch can not exceed the batch: UsageError
    where both are given so; a default follows the batch down."""
    n_batch = values.n_batch if batch is None else batch
    n_ubatch = min(values.n_ubatch, n_batch) if ubatch is None else ubatch
    if n_ubatch > n_batch:
        raise UsageError(f"-ub {n_ubatch} is more than -b {n_batch}: a micro-batch is a part of the batch")
    return replace(values, n_batch=n_batch, n_ubatch=n_ubatch)
