"""Weights that stay on the drive: which they are, the native store that reads them, its statistics and traces."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensortier import gguf, placement, routing, warmstart
from tensortier._llama.tierlib import (
    STOP,
    GroupCounts,
    PolicySetup,
    TierConfig,
    TierCounts,
    TierEvent,
    TierTensor,
    tier_library,
)
from tensortier.errors import Cancelled, LoadError, OutOfMemory, PlanError, UsageError
from tensortier.pageable import DEVICE, EXPERT_WEIGHT, ORDER, can_page
from tensortier.types import ModelInfo, Plan, Role, Tensor, TierLayerStats, TierStats
from tensortier.types import Tier as Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POLICIES = ("lru", "global-lru", "lfu", "static", "second-touch")  # in the order of tt_tier_config.policy
READERS = ("auto", "io_uring", "threads")
EVENTS = ("read", "compute", "wait", "pass")  # in the order of tt_tier_event.what
MAX_PARTS = 4  # of an expert, in native/sharing.h
MAX_GUESSES = 4096

_DENSE, _EXPERTS, _SMALL = 0, 1, 2  # tt_tier_tensor.kind

# The order in which llama.cpp computes them (build_moe_ffn, build_ffn): what is needed first is read first.
_PARTS = (Role.EXPERT_GATE_UP, Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
_ATTENTION = ("attn_qkv", "attn_q", "attn_k", "attn_v")
_LAST = ("attn_output.weight", "ssm_out.weight")


def paged_tensors(model: ModelInfo, plan: Plan) -> tuple[Tensor, ...]:
    """The weights that a plan leaves on the drive, in the order in which they are used.

    Raises:
        PlanError: one of them cannot stay there.
    """
    where = placement.resolve(model, plan.placement, {})
    chosen = [tensor for tensor in model.tensors if where[tensor.name] == DEVICE]
    for tensor in chosen:
        if not can_page(tensor):
            raise PlanError(f"{tensor.name} cannot stay on the drive: an override sends it to {DEVICE}")

    def order(tensor: Tensor) -> tuple[int, int, int]:
        layer = tensor.layer if tensor.layer is not None else model.n_layers
        ranks = _PARTS if tensor.role.is_routed_expert else ORDER
        inner = next((i for i, part in enumerate(_ATTENTION) if part in tensor.name), len(_ATTENTION))
        last = tensor.name.endswith(_LAST)
        return layer, ranks.index(tensor.role), len(_ATTENTION) + 1 if last else inner

    return tuple(sorted(chosen, key=order))


def _experts_of(tensor: Tensor) -> tuple[int, str] | None:
    """(layer, kind of experts) of a weight of routed experts; None for any other tensor, biases too."""
    found = EXPERT_WEIGHT.fullmatch(tensor.name)
    if not found or found[2] != "weight" or tensor.layer is None:
        return None
    return tensor.layer, found[1]


def _native_rows(tensors: Sequence[Tensor]) -> tuple[Any, tuple[tuple[int, str], ...], int]:
    """The weights in the plug-in's terms, the groups of experts that they make up, and the most experts of one."""
    groups = tuple(dict.fromkeys(key for tensor in tensors if (key := _experts_of(tensor))))
    rows = (TierTensor * len(tensors))()
    parts = [0] * len(groups)
    for row, tensor in zip(rows, tensors, strict=True):
        row.name = tensor.name.encode()
        row.file, row.offset, row.nbytes = tensor.file, tensor.offset, tensor.nbytes
        key = _experts_of(tensor)
        if key is None:
            row.kind = _SMALL if tensor.role.is_routed_expert else _DENSE
            continue
        group = groups.index(key)
        row.kind, row.group, row.part = _EXPERTS, group, parts[group]
        row.experts = tensor.shape[2]
        parts[group] += 1
    assert max(parts, default=0) <= MAX_PARTS
    return rows, groups, max((t.shape[2] for t in tensors if _experts_of(t)), default=0)


class PagedWeights:
    """The store of one model's weights on the drive. ``loaded`` must be called once llama.cpp has loaded the
    model, before a context is made; ``close`` after the model was freed.

    Raises:
        PlanError: the plan names what cannot stay on the drive, or settings that do not exist.
        OutOfMemory: there is too little RAM for what is to be kept there.
        LoadError: a file cannot be read, or the room is too small for one layer's experts.
    """

    def __init__(self, plan: Plan) -> None:
        if plan.tier is None:
            raise PlanError(f'overrides send weights to {DEVICE}, but the plan has no section "tier"')
        self._handle: int | None = None
        self._using = threading.Lock()  # of the handle: it is not closed while another thread asks something
        self._last: TierStats | None = None  # once it is closed
        self._warm_experts = 0
        self._library = tier_library()
        settings = plan.tier
        if settings.policy not in POLICIES:
            raise PlanError(f"unknown policy {settings.policy!r}; one of: {', '.join(POLICIES)}")
        if not -1 <= settings.guesses <= MAX_GUESSES or (
            settings.guesses > 0 and settings.policy == "global-lru"
        ):
            raise PlanError(
                f"{settings.guesses} guesses with policy {settings.policy!r}: from -1 to {MAX_GUESSES}, and none where "
                "all layers share their room"
            )
        if settings.reader not in READERS:
            raise PlanError(f"unknown reader {settings.reader!r}; one of: {', '.join(READERS)}")
        model = gguf.read(Path(plan.model))
        tensors = paged_tensors(model, plan)
        if not tensors:
            raise PlanError(f'the plan has a section "tier", but no override sends a weight to {DEVICE}')
        rows, self._groups, experts = _native_rows(tensors)
        self.shape = (len(self._groups), experts)  # of the routing: layers with experts, experts of each
        self._model = model
        self._reader = settings.reader
        self._warm_start = settings.warm_start
        self._open(self._config(settings, rows))

    def _config(self, settings: Settings, rows: Any) -> TierConfig:
        model = self._model
        groups, _ = self.shape
        frequency = None
        if settings.policy == "static" and groups:
            if settings.profile is None:
                raise PlanError('policy "static" needs a profile: a routing trace')
            counts = self._recorded(model, settings.profile)
            frequency = (ctypes.c_double * counts.size)(*counts.ravel().tolist())
        return TierConfig(
            files=(ctypes.c_char_p * len(model.files))(*map(os.fsencode, model.files)),
            file_sizes=(ctypes.c_uint64 * len(model.files))(*model.file_sizes),
            n_files=len(model.files),
            tensors=rows,
            n_tensors=len(rows),
            n_groups=groups,
            used=model.n_expert_used,
            policy=POLICIES.index(settings.policy),
            expert_bytes=settings.expert_bytes,
            dense_bytes=settings.dense_bytes,
            frequency=frequency,
            reader=READERS.index(settings.reader),
            queue_depth=settings.queue_depth,
            read_bytes=settings.read_bytes,
            guesses=settings.guesses,
        )

    def _open(self, config: TierConfig) -> None:
        error = ctypes.create_string_buffer(1024)
        self._handle = self._library.tt_tier_open(ctypes.byref(config), error, len(error))
        if not self._handle:
            text = error.value.decode(errors="replace")
            raise (OutOfMemory if text.startswith("not enough memory") else LoadError)(text)

    def _recorded(self, model: ModelInfo, profile: str) -> NDArray[np.float64]:
        """How often a routing trace chose each expert of the layers that are on the drive, which may be some of the
        model's: ``[group, expert]``. Raises UsageError where the trace is none, or of another model."""
        trace = routing.read(profile)
        routing.check_model(trace, model)
        numbers = [layer for layer, _ in self._groups]
        if missing := set(numbers) - set(trace.layers):
            raise UsageError(f"{profile} has no experts of layer {min(missing)}")
        if trace.experts != self.shape[1]:
            raise UsageError(f"{profile} is of layers with {trace.experts} experts, not {self.shape[1]}")
        counts = frequencies(trace.records, *trace.shape)
        return counts[[trace.layers.index(number) for number in numbers]]

    @property
    def buffer_type(self) -> int:
        """The ``ggml_backend_buffer_type`` that overrides to "TIER" mean."""
        handle: int = self._library.tt_tier_buffer_type(self._open_handle())
        return handle

    def _open_handle(self) -> int:
        if self._handle is None:
            raise UsageError("the weights on the drive are closed")
        return self._handle

    def loaded(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Gives the model its weights on the drive, and reads what always stays in RAM; then the experts that stayed
        the last time. ``cancelled`` is asked meanwhile.

        Raises:
            LoadError: that could not be read.
            Cancelled: nobody wants it any more.
        """
        error = ctypes.create_string_buffer(1024)
        stop = STOP(cancelled)

        def fail() -> None:
            if cancelled():
                raise Cancelled("loading was cancelled")
            raise LoadError(error.value.decode(errors="replace"))

        if self._library.tt_tier_loaded(self._open_handle(), stop, error, len(error)):
            fail()
        if not self._warm_start or not self._groups:
            return
        experts = warmstart.read(self._model, self.shape)
        pairs = (ctypes.c_int32 * (2 * len(experts)))(*(number for pair in experts for number in pair))
        count = self._library.tt_tier_warm(self._open_handle(), pairs, len(experts), stop, error, len(error))
        if count < 0:
            fail()
        self._warm_experts = count

    def take_error(self) -> str:
        """Why a computation failed since the last call; empty where none has."""
        error = ctypes.create_string_buffer(1024)
        with self._using:
            self._library.tt_tier_error(self._open_handle(), error, len(error))
        return error.value.decode(errors="replace")

    def warnings(self) -> tuple[str, ...]:
        """What this system does not allow, and what that means: one line each."""
        stats = self.stats()
        lines = []
        if stats.reader == "threads" and self._reader == "auto" and sys.platform == "linux":
            lines.append("this system does not allow io_uring: weights are read by threads")
        if not stats.direct:
            lines.append(
                f"the file system of {self._model.path} does not allow direct reads: weights are read through the "
                "system's cache of files, which takes memory beside the budget"
            )
        return tuple(lines)

    def stats(self) -> TierStats:
        """Since the model was loaded, until it was closed. Any thread may ask."""
        with self._using:
            if self._handle is None and self._last is not None:
                return self._last
            return self._stats()

    def _stats(self) -> TierStats:
        raw = TierCounts()
        rows = (GroupCounts * max(len(self._groups), 1))()
        self._library.tt_tier_stats_get(self._open_handle(), ctypes.byref(raw))
        count = self._library.tt_tier_group_stats_get(self._open_handle(), rows, len(rows))
        layers = tuple(
            TierLayerStats(
                layer,
                row.capacity,
                row.passes,
                row.uses,
                row.hits,
                row.bytes,
                row.stall_seconds,
                row.guess_uses,
                row.guess_named,
                row.guess_reads,
                row.guess_found,
            )
            for (layer, _), row in zip(self._groups, rows[:count], strict=True)
        )
        return TierStats(
            layers,
            raw.memory_bytes,
            raw.scratch_bytes,
            raw.expert_slots,
            raw.passing_slots,
            raw.resident_bytes,
            raw.ring_bytes,
            raw.dense_uses,
            raw.dense_hits,
            raw.dense_bytes,
            raw.dense_stall_seconds,
            raw.drive_bytes,
            raw.drive_reads,
            raw.drive_busy_seconds,
            raw.reader.decode(),
            bool(raw.direct),
            bool(raw.locked),
            bool(raw.guessing),
            self._warm_experts,
        )

    def residents(self) -> list[tuple[int, int]]:
        """(layer's number among those with experts, expert) of all experts that stay, of each layer the longest
        unused first."""
        groups, experts = self.shape
        pairs = (ctypes.c_int32 * (2 * groups * experts))()
        count = self._library.tt_tier_residents(self._open_handle(), pairs, groups * experts)
        return [(pairs[2 * i], pairs[2 * i + 1]) for i in range(count)]

    def trace(self, path: Path | None) -> None:
        """Routing is written to ``path`` from now on (see ``read_trace``); None ends that and closes the file.

        Raises:
            UsageError: the file cannot be written.
        """
        error = ctypes.create_string_buffer(1024)
        name = None if path is None else os.fsencode(path)
        if self._library.tt_tier_trace(self._open_handle(), name, error, len(error)):
            raise UsageError(error.value.decode(errors="replace"))

    def start_timeline(self, events: int) -> None:
        """The first so many events are kept from now on, see ``timeline``."""
        self._library.tt_tier_timeline(self._open_handle(), events)

    def timeline(self) -> list[tuple[str, float, float, int]]:
        """What happened since ``start_timeline``, in the order in which it ended: "read" (one read of the drive; it
        ends when it is noticed), "compute" (with weights from the drive), "wait" (for the drive, with nothing to
        compute) or "pass" (a layer's experts are known); begin and end in seconds of a clock; of a pass, the layer's
        number among those with experts, else -1."""
        count = self._library.tt_tier_timeline_get(self._open_handle(), None, 0)
        events = (TierEvent * max(count, 1))()
        self._library.tt_tier_timeline_get(self._open_handle(), events, count)
        return [(EVENTS[e.what], e.begin, e.end, e.group) for e in events[:count]]

    def inject_fault(self, result: int, after: int = 0, count: int = 1) -> None:
        """For tests: after so many more reads, the next ``count`` end with ``result``, a negative errno or fewer
        bytes than were asked for."""
        self._library.tt_tier_inject(self._open_handle(), result, after, count)

    def close(self) -> None:
        """Closes the files and frees the memory, once the model is freed too. Closing twice is fine."""
        with self._using:
            if self._handle is None:
                return
            self._last = self._stats()
            if self._warm_start and any(layer.uses for layer in self._last.layers):
                warmstart.write(self._model, self.shape, self.residents())
            self._library.tt_tier_close(self._handle)
            self._handle = None


def capacities(model: ModelInfo, tensors: Sequence[Tensor], settings: Settings, sector: int) -> list[int]:
    """How many experts would stay of each layer (for "global-lru": of all, one number), as the store itself counts on
    a drive that reads ``sector`` bytes at least. Nothing is opened.

    Args:
        tensors: the weights on the drive, in the order of use.

    Raises:
        LoadError: the room is too small for one layer's experts.
    """
    rows, groups, _ = _native_rows(tensors)
    config = TierConfig(
        n_files=len(model.files),
        tensors=rows,
        n_tensors=len(rows),
        n_groups=len(groups),
        used=model.n_expert_used,
        policy=POLICIES.index(settings.policy),
        expert_bytes=settings.expert_bytes,
    )
    found = (ctypes.c_int32 * max(len(groups), 1))()
    error = ctypes.create_string_buffer(1024)
    count = tier_library().tt_tier_capacities(
        ctypes.byref(config), sector, found, len(found), error, len(error)
    )
    if count < 0:
        raise LoadError(error.value.decode(errors="replace"))
    return list(found[:count])


def drive_bandwidth(
    path: Path, *, block: int = 1 << 20, depth: int = 32, reader: str = "auto", seconds: float = 0.5
) -> float:
    """Bytes/s of random reads of a file past the page cache, by the reader that a model's weights come through.

    Raises:
        UsageError: the file cannot be read so.
    """
    error = ctypes.create_string_buffer(1024)
    library = tier_library()
    rate: float = library.tt_bench_reads(
        os.fsencode(path),
        path.stat().st_size,
        READERS.index(reader),
        depth,
        block,
        seconds,
        error,
        len(error),
    )
    if rate < 0:
        raise UsageError(error.value.decode(errors="replace"))
    return rate


# --- traces and replay


def read_trace(path: str | Path) -> NDArray[np.int32]:
    """A routing trace as one array: for each pass the layer's number among those with experts, the tokens, the
    experts each token uses, and then their ids, token after token.

    Raises:
        UsageError: the file is not there, or is no such trace.
    """
    import numpy as np

    try:
        data: NDArray[np.int32] = np.fromfile(path, dtype="<i4")
    except OSError as exc:
        raise UsageError(f"cannot read the trace {path}: {exc.strerror}") from exc
    at = 0
    while at + 3 <= data.size and data[at + 1] >= 0 and data[at + 2] >= 0:
        at += 3 + int(data[at + 1]) * int(data[at + 2])
    if at != data.size or Path(path).stat().st_size % 4:
        raise UsageError(f"{path} is not a routing trace, or was cut off")
    return data


def frequencies(trace: NDArray[np.int32], groups: int, experts: int) -> NDArray[np.float64]:
    """How often each expert was chosen: ``[group, expert]``.

    Raises:
        UsageError: the trace is of another model.
    """
    import numpy as np

    counts = np.zeros((groups, experts))
    at = 0
    while at < trace.size:
        group, n = int(trace[at]), int(trace[at + 1]) * int(trace[at + 2])
        ids = trace[at + 3 : at + 3 + n]
        if not 0 <= group < groups or (n and not 0 <= ids.min() <= ids.max() < experts):
            raise UsageError("the trace is of another model")
        counts[group] += np.bincount(ids, minlength=experts)
        at += 3 + n
    return counts


def replay(
    trace: NDArray[np.int32],
    policy: str,
    capacity: Sequence[int],
    shape: tuple[int, int],
    frequency: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """(hits, uses) of each group when a policy had decided on the routing of a trace, by the code that decides
    while a model runs.

    Args:
        capacity: experts that stay, of each group; one number for "global-lru".
        shape: groups, and experts of each.
        frequency: for "static": ``[group, expert]``.

    Raises:
        UsageError: the trace does not fit the shape, or the policy lacks something.
    """
    import numpy as np

    groups, experts = shape
    if policy not in POLICIES:
        raise UsageError(f"unknown policy {policy!r}; one of: {', '.join(POLICIES)}")
    if len(capacity) != (1 if policy == "global-lru" else groups):
        raise UsageError(f"policy {policy!r} takes {1 if policy == 'global-lru' else groups} capacities")
    room = (ctypes.c_int32 * len(capacity))(*capacity)
    weights = None
    if frequency is not None:
        if frequency.shape != shape:
            raise UsageError(f"frequencies of shape {frequency.shape} for a model of {shape}")
        weights = (ctypes.c_double * frequency.size)(*frequency.ravel().tolist())
    setup = PolicySetup(POLICIES.index(policy), groups, experts, room, weights)
    numbers = np.ascontiguousarray(trace, dtype=np.int32)
    hits, uses = np.zeros(groups, np.uint64), np.zeros(groups, np.uint64)
    error = ctypes.create_string_buffer(1024)
    unsigned = ctypes.POINTER(ctypes.c_uint64)
    passes = tier_library().tt_policy_replay(
        ctypes.byref(setup),
        numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
        numbers.size,
        hits.ctypes.data_as(unsigned),
        uses.ctypes.data_as(unsigned),
        error,
        len(error),
    )
    if passes < 0:
        raise UsageError(error.value.decode(errors="replace"))
    return hits, uses
