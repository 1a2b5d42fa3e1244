"""The plug-in's interface to weights on the drive (native/tensortier.h) in ctypes."""

from __future__ import annotations

import ctypes

from tensortier._llama.libs import native


class TierTensor(ctypes.Structure):
    """``tt_tier_tensor`` of native/tensortier.h"""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("kind", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("part", ctypes.c_int32),
        ("experts", ctypes.c_int32),
        ("file", ctypes.c_int32),
        ("offset", ctypes.c_uint64),
        ("nbytes", ctypes.c_uint64),
    )


class TierConfig(ctypes.Structure):
    """``tt_tier_config``"""

    _fields_ = (
        ("files", ctypes.POINTER(ctypes.c_char_p)),
        ("file_sizes", ctypes.POINTER(ctypes.c_uint64)),
        ("n_files", ctypes.c_int32),
        ("tensors", ctypes.POINTER(TierTensor)),
        ("n_tensors", ctypes.c_int32),
        ("n_groups", ctypes.c_int32),
        ("used", ctypes.c_int32),
        ("policy", ctypes.c_int32),
        ("expert_bytes", ctypes.c_uint64),
        ("dense_bytes", ctypes.c_uint64),
        ("frequency", ctypes.POINTER(ctypes.c_double)),
        ("reader", ctypes.c_int32),
        ("queue_depth", ctypes.c_int32),
        ("read_bytes", ctypes.c_uint64),
        ("guesses", ctypes.c_int32),
    )


class TierCounts(ctypes.Structure):
    """``tt_tier_stats``"""

    _fields_ = (
        ("memory_bytes", ctypes.c_uint64),
        ("scratch_bytes", ctypes.c_uint64),
        ("expert_slots", ctypes.c_uint64),
        ("passing_slots", ctypes.c_uint64),
        ("resident_bytes", ctypes.c_uint64),
        ("ring_bytes", ctypes.c_uint64),
        ("dense_uses", ctypes.c_uint64),
        ("dense_hits", ctypes.c_uint64),
        ("dense_bytes", ctypes.c_uint64),
        ("dense_stall_seconds", ctypes.c_double),
        ("drive_bytes", ctypes.c_uint64),
        ("drive_reads", ctypes.c_uint64),
        ("drive_busy_seconds", ctypes.c_double),
        ("direct", ctypes.c_int32),
        ("locked", ctypes.c_int32),
        ("guessing", ctypes.c_int32),
        ("reader", ctypes.c_char * 16),
    )


class GroupCounts(ctypes.Structure):
    """``tt_tier_group_stats``"""

    _fields_ = (
        ("passes", ctypes.c_uint64),
        ("uses", ctypes.c_uint64),
        ("hits", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("guess_uses", ctypes.c_uint64),
        ("guess_named", ctypes.c_uint64),
        ("guess_reads", ctypes.c_uint64),
        ("guess_found", ctypes.c_uint64),
        ("stall_seconds", ctypes.c_double),
        ("capacity", ctypes.c_int32),
    )


class TierEvent(ctypes.Structure):
    """``tt_tier_event``"""

    _fields_ = (
        ("begin", ctypes.c_double),
        ("end", ctypes.c_double),
        ("what", ctypes.c_int32),
        ("group", ctypes.c_int32),
    )


class PolicySetup(ctypes.Structure):
    """``tt_policy``"""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("experts", ctypes.c_int32),
        ("capacity", ctypes.POINTER(ctypes.c_int32)),
        ("frequency", ctypes.POINTER(ctypes.c_double)),
    )


STOP = ctypes.CFUNCTYPE(ctypes.c_int32)  # ``tt_tier_stop``


def tier_library() -> ctypes.CDLL:
    """The plug-in, with the types of its functions for tiers."""
    library = native()
    error = (ctypes.c_char_p, ctypes.c_size_t)
    handle = ctypes.c_void_p
    library.tt_tier_open.argtypes = [ctypes.POINTER(TierConfig), *error]
    library.tt_tier_open.restype = handle
    library.tt_tier_buffer_type.argtypes = [handle]
    library.tt_tier_buffer_type.restype = handle
    library.tt_tier_loaded.argtypes = [handle, STOP, *error]
    library.tt_tier_error.argtypes = [handle, *error]
    library.tt_tier_error.restype = None
    library.tt_tier_stats_get.argtypes = [handle, ctypes.POINTER(TierCounts)]
    library.tt_tier_stats_get.restype = None
    library.tt_tier_group_stats_get.argtypes = [handle, ctypes.POINTER(GroupCounts), ctypes.c_int]
    library.tt_tier_trace.argtypes = [handle, ctypes.c_char_p, *error]
    pairs = ctypes.POINTER(ctypes.c_int32)
    library.tt_tier_warm.argtypes = [handle, pairs, ctypes.c_int64, STOP, *error]
    library.tt_tier_warm.restype = ctypes.c_int64
    library.tt_tier_residents.argtypes = [handle, pairs, ctypes.c_int64]
    library.tt_tier_residents.restype = ctypes.c_int64
    library.tt_tier_capacities.argtypes = [
        ctypes.POINTER(TierConfig),
        ctypes.c_uint64,
        pairs,
        ctypes.c_int32,
        *error,
    ]
    library.tt_tier_timeline.argtypes = [handle, ctypes.c_int64]
    library.tt_tier_timeline.restype = None
    library.tt_tier_timeline_get.argtypes = [handle, ctypes.POINTER(TierEvent), ctypes.c_int64]
    library.tt_tier_timeline_get.restype = ctypes.c_int64
    library.tt_tier_inject.argtypes = [handle, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    library.tt_tier_inject.restype = None
    library.tt_tier_close.argtypes = [handle]
    library.tt_tier_close.restype = None
    library.tt_policy_replay.argtypes = [
        ctypes.POINTER(PolicySetup),
        ctypes.POINTER(ctypes.c_int32),
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint64),
        *error,
    ]
    library.tt_policy_replay.restype = ctypes.c_int64
    library.tt_bench_reads.argtypes = [
        ctypes.c_char_p,
        ctypes.c_uint64,
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_uint64,
        ctypes.c_double,
        *error,
    ]
    library.tt_bench_reads.restype = ctypes.c_double
    return library
