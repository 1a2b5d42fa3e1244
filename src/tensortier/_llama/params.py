"""A ``Plan`` in llama.cpp's parameter structures."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from tensortier._llama import devices
from tensortier._llama.libs import llama, native
from tensortier.errors import LibraryError, PatternError, PlanError
from tensortier.placement import check, load_mode, threads_for
from tensortier.types import Plan, Settings

# ggml's numbers of the types a KV cache may have; they are part of the GGUF format.
KV_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q4_0": 2,
    "q4_1": 3,
    "iq4_nl": 20,
    "q5_0": 6,
    "q5_1": 7,
}
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}  # enum llama_flash_attn_type
LOAD_MODES = {"none": 0, "mmap": 1, "mlock": 2, "mmap+mlock": 3, "direct": 4}  # enum llama_load_mode
PAGED = "TIER"  # the device of weights that stay on the drive
MAX_OVERRIDES = 4096  # llama_max_tensor_buft_overrides


class _BufferTypeOverride(ctypes.Structure):
    """``llama_model_tensor_buft_override``"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


# A hand-written plan may hold anything: (field, least, most). The most are llama.cpp's own where it has one.
_RANGES = (
    ("n_ctx", 0, 1 << 30),
    ("n_batch", 1, 1 << 30),
    ("n_ubatch", 1, 1 << 30),
    ("n_seq_max", 1, 256),
    ("threads", 0, 512),
    ("threads_batch", 0, 512),
)


def _check_ranges(settings: Settings) -> None:
    for field, least, most in _RANGES:
        value = getattr(settings, field)
        if not least <= value <= most:
            raise PlanError(f"settings.{field} must be from {least} to {most}, not {value}")
    if settings.n_seq_max > settings.n_batch or settings.n_seq_max > (settings.n_ctx or settings.n_seq_max):
        # llama.cpp makes room for one output per sequence in a batch, and asserts that it fits
        raise PlanError("settings.n_seq_max must not be larger than settings.n_batch and settings.n_ctx")


def _paged_type(paged: int | None) -> int:
    if paged is not None:
        return paged
    planned = native().tt_tier_planned_buffer_type
    planned.argtypes, planned.restype = [ctypes.c_char_p, ctypes.c_size_t], ctypes.c_void_p
    error = ctypes.create_string_buffer(512)
    handle: int | None = planned(error, len(error))
    if not handle:
        raise LibraryError(f"weights cannot stay on the drive: {error.value.decode(errors='replace')}")
    return handle


def _choice(table: dict[str, int], value: str, what: str) -> int:
    if value not in table:
        raise PlanError(f"unknown {what} {value!r}; one of: {', '.join(table)}")
    return table[value]


class Parameters:
    """What a plan says, ready to be written into llama.cpp's structures. Owns the memory those point to, so
    it must live as long as the model does.

    ``paged``: the buffer type of weights that stay on the drive. Without one, overrides to "TIER" make a plan
    that can be laid out, but not loaded.

    Raises:
        PlanError: a setting that llama.cpp does not know, a number out of range.
        PatternError, BackendError: an override is no regular expression; it or the placement names a device that is
            not here.
    """

    def __init__(self, plan: Plan, paged: int | None = None) -> None:
        self.plan = plan
        _check_ranges(plan.settings)
        placement = plan.placement
        check(placement)
        if len(placement.overrides) >= MAX_OVERRIDES:
            raise PatternError(
                f"{len(placement.overrides)} tensor overrides; llama.cpp takes fewer than 4096"
            )
        handles = devices.device_handles(placement.devices)
        self._devices = (ctypes.c_void_p * (len(handles) + 1))(*handles, None)
        self._overrides = (_BufferTypeOverride * (len(placement.overrides) + 1))()
        for slot, override in zip(self._overrides, placement.overrides, strict=False):
            slot.pattern = override.pattern.encode()
            slot.buft = (
                _paged_type(paged) if override.device == PAGED else devices.buffer_type(override.device)
            )
        self._split = (ctypes.c_float * llama().llama_max_devices())(*placement.tensor_split)
        self._type_k = _choice(KV_TYPES, plan.settings.type_k, "KV cache type")
        self._type_v = _choice(KV_TYPES, plan.settings.type_v, "KV cache type")
        self._flash = _choice(FLASH_ATTENTION, plan.settings.flash_attention, "flash attention setting")
        mode = load_mode(plan)
        if plan.tier is not None and plan.settings.load_mode == "auto":
            mode = "none"  # what stays in RAM is read into it: pages of a mapped file could be taken away
        self._mode = _choice(LOAD_MODES, mode, "load mode")
        self._flag = ctypes.c_int32(0)
        self._should_abort = ctypes.cast(native().tt_should_abort, ctypes.c_void_p)
        self._progress: Any = None

    def edit_model(self, params: Any) -> None:
        """Writes into a ``llama_model_params``."""
        placement, settings = self.plan.placement, self.plan.settings
        params.devices = ctypes.cast(self._devices, ctypes.c_void_p)
        params.n_gpu_layers = placement.n_gpu_layers
        params.tensor_split = self._split
        params.load_mode = self._mode
        params.use_extra_bufts = settings.repack
        if placement.overrides:
            params.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)

    def edit_context(self, params: Any) -> None:
        """Writes into a ``llama_context_params`` whose ``n_ctx`` is set."""
        settings = self.plan.settings
        params.n_batch = min(params.n_ctx, settings.n_batch)
        params.n_ubatch = min(params.n_batch, settings.n_ubatch)
        params.n_seq_max = settings.n_seq_max
        params.kv_unified = settings.n_seq_max > 1  # all sequences share the cells; each may use all of them
        params.n_threads = threads_for(settings.threads)
        params.n_threads_batch = threads_for(settings.threads_batch or settings.threads)
        params.type_k, params.type_v = self._type_k, self._type_v
        params.flash_attn_type = self._flash
        params.offload_kqv = self.plan.placement.kv_on_device
        params.op_offload = settings.op_offload
        params.swa_full = settings.swa_full
        params.abort_callback = ctypes.cast(self._should_abort, type(params.abort_callback))
        params.abort_callback_data = ctypes.addressof(self._flag)

    def on_progress(self, params: Any, callback: Callable[[float], bool]) -> None:
        """Has llama.cpp report how much of the model is loaded (0 to 1) until ``callback`` returns False."""
        self._progress = llama().llama_progress_callback(lambda fraction, _data: callback(fraction))
        params.progress_callback = self._progress

    def abort(self, on: bool) -> None:
        """Makes llama.cpp give up the computation under way and refuse further ones, until called with False."""
        native().tt_set_flag(ctypes.addressof(self._flag), 1 if on else 0)
