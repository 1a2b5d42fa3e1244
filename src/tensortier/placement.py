"""Which device each tensor lands on: llama.cpp's own rules, and the command line's way of saying it."""

from __future__ import annotations

import bisect
import os
import struct
from collections.abc import Iterable, Mapping, Sequence

from tensortier.errors import PatternError, PlanError, UsageError
from tensortier.patterns import compile_pattern
from tensortier.types import Device, Hardware, ModelInfo, Override, Placement, Plan, Role, Tensor

# The patterns behind llama.cpp's --cpu-moe, --n-cpu-moe and --n-cpu-ffn (common/common.h).
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
DENSE_FFN = r"\.ffn_(up|down|gate)\."


def threads_for(asked: int) -> int:
    """``asked``, or where that is 0 the number of physical cores this process may use: a second thread on a
    core adds nothing to work that waits for memory."""
    if asked > 0:
        return asked
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


def load_mode(plan: Plan) -> str:
    """The plan's, or what "auto" means. Map the file where all of it stays in RAM: that starts at once and other
    processes share the pages. Read it where some goes to another device, because host buffers can then be pinned
    and no page of the file stays behind for what was copied away."""
    mode = plan.settings.load_mode
    if mode != "auto":
        return mode
    place = plan.placement
    elsewhere = any(o.device not in ("CPU", "TIER") for o in place.overrides)
    return "none" if place.devices and (place.n_gpu_layers != 0 or elsewhere) else "mmap"


def gpus(hardware: Hardware) -> tuple[Device, ...]:
    """The devices llama.cpp offloads to by default, in its order: remote servers, then cards, and integrated
    graphics only where there is no card. One device that two backends show counts once, for the first: a card
    by its address, integrated graphics by the backend (llama_prepare_model_devices)."""
    remote = [d for d in hardware.devices if d.kind == "gpu" and d.backend == "RPC"]
    cards: list[Device] = []
    for device in hardware.devices:
        known = {card.device_id for card in cards if card.device_id}
        if device.kind == "gpu" and device.backend != "RPC" and device.device_id not in known:
            cards.append(device)
    integrated = [d for d in hardware.devices if d.kind == "igpu"]
    integrated = [d for d in integrated if d.backend == integrated[0].backend]
    return (*remote, *(cards or integrated))


def layer_devices(model: ModelInfo, placement: Placement, free: Mapping[str, int]) -> tuple[str, ...]:
    """The device of every layer and, last, of the output: ``n_layers + 1`` names.

    The last ``n_gpu_layers`` of them are offloaded, shared out over the devices in proportion to
    ``tensor_split``, or to ``free`` bytes where that is empty (llama_model_base::load_tensors).
    """
    total = model.n_layers + 1
    offloaded = total if placement.n_gpu_layers < 0 else min(placement.n_gpu_layers, total)
    if not placement.devices:
        offloaded = 0
    shares = list(placement.tensor_split)
    shares += [0.0] * (len(placement.devices) - len(shares))
    if not any(shares):
        shares = [float(free.get(d, 0)) for d in placement.devices]
    if not any(shares):
        shares = [1.0] * len(placement.devices)
    # in single precision, as llama.cpp computes: a layer on the border goes where rounding sends it
    ends = [0.0, *shares]
    for i in range(1, len(ends)):
        ends[i] = _single(ends[i - 1] + _single(ends[i]))
    ends = [_single(end / ends[-1]) for end in ends[1:]]
    first = total - offloaded
    return tuple(
        "CPU" if i < first else placement.devices[bisect.bisect_right(ends, _single((i - first) / offloaded))]
        for i in range(total)
    )


def _single(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


def resolve(model: ModelInfo, placement: Placement, free: Mapping[str, int]) -> dict[str, str]:
    """Where each tensor goes: {tensor name: device name}. ``free``: free bytes per device.

    A tied embedding is read as the output as well; where the output is offloaded llama.cpp keeps a second copy
    there, which has no name of its own and is not in the answer.
    """
    layers = layer_devices(model, placement, free)
    patterns = [(compile_pattern(o.pattern), o.device) for o in placement.overrides]
    answer = {}
    for tensor in model.tensors:
        device = _home(tensor, layers)
        for pattern, target in patterns:
            if pattern.search(tensor.name):
                device = target
                break
        answer[tensor.name] = device
    return answer


def _home(tensor: Tensor, layers: Sequence[str]) -> str:
    if tensor.layer is not None:
        return layers[min(tensor.layer, len(layers) - 1)]
    # The input layer stays on the CPU always.
    return layers[-1] if tensor.role in (Role.OUTPUT, Role.NORM) else "CPU"


def bytes_per_device(model: ModelInfo, where: Mapping[str, str]) -> dict[str, int]:
    """Bytes of weights per device, of a resolved placement."""
    totals: dict[str, int] = {}
    for tensor in model.tensors:
        totals[where[tensor.name]] = totals.get(where[tensor.name], 0) + tensor.nbytes
    return totals


def check(placement: Placement) -> None:
    """What llama.cpp would take for something else, or not at all, in a placement that was written by hand.

    Raises:
        PlanError: a number out of range.
        PatternError: an override that is no regular expression.
    """
    layers, split = placement.n_gpu_layers, placement.tensor_split
    if not -1 <= layers < 1 << 31:
        raise PlanError(f"placement.n_gpu_layers must be -1 (all) or a number of layers, not {layers}")
    if any(share < 0 for share in split) or (split and not any(split)):
        raise PlanError("placement.tensor_split takes shares of 0 or more, not all 0")
    if len(split) > max(len(placement.devices), 1):
        raise PlanError(
            f"placement.tensor_split has {len(split)} shares for {len(placement.devices)} devices"
        )
    for override in placement.overrides:
        compile_pattern(override.pattern)


def check_devices(placement: Placement, hardware: Hardware) -> None:
    """Raises PlanError where ``placement`` names a device that ``hardware`` does not have."""
    known = {name for d in hardware.devices for name in (d.name, d.buffer_type) if name}
    named = (*placement.devices, *(o.device for o in placement.overrides))
    for name in named:
        if name not in known and name not in ("CPU", "TIER"):
            there = ", ".join(d.name for d in hardware.devices)
            raise PlanError(f"the plan puts something on {name!r}, which is not here; there are: {there}")


def from_flags(
    model: ModelInfo,
    hardware: Hardware,
    *,
    n_gpu_layers: int | None = None,
    override_tensors: Sequence[str] = (),
    cpu_moe: bool = False,
    n_cpu_moe: int | None = None,
    n_cpu_ffn: int | None = None,
    tensor_split: Sequence[float] | None = None,
    devices: Sequence[str] | None = None,
    kv_on_device: bool = True,
) -> tuple[Placement, tuple[str, ...]]:
    """The placement that llama.cpp's options of these names mean, and a warning for each that does nothing.

    ``override_tensors``: each ``PATTERN=DEVICE``, several in one text separated by commas, first match wins.
    ``n_gpu_layers``: None means all, as in llama.cpp. ``devices``: None means all GPUs; ``["none"]`` none.

    Raises:
        UsageError: a number out of range, or a device that is not here (the message lists them).
        PatternError: a pattern that is no regular expression, or has no device behind it.
    """
    chosen = _devices(hardware, devices)
    if n_gpu_layers is not None and n_gpu_layers < -1:
        raise UsageError(f"--gpu-layers must be -1 (all) or more, not {n_gpu_layers}")
    # what each option asked for, so that one that does nothing can be named
    asked = [
        (f"the pattern {o.pattern!r} matches no tensor of this model", [o])
        for text in override_tensors
        for o in _parse_overrides(text, hardware)
    ]
    if cpu_moe:
        asked.append(("--cpu-moe does nothing: this model has no experts", [Override(EXPERTS, "CPU")]))
    for option, count, pattern, what in (
        ("--n-cpu-moe", n_cpu_moe, EXPERTS, "experts"),
        ("--n-cpu-ffn", n_cpu_ffn, DENSE_FFN, "dense feed-forward tensors"),
    ):
        if count is None:
            continue
        if count < 0:
            raise UsageError(f"{option} must be 0 or more, not {count}")
        layers = [Override(rf"blk\.{i}{pattern}", "CPU") for i in range(min(count, model.n_layers))]
        asked.append((f"{option} {count} does nothing: no {what} in the first {count} layers", layers))
    split = tuple(tensor_split or ())
    if any(share < 0 for share in split) or (split and not any(split)):
        raise UsageError("--tensor-split takes shares of 0 or more, not all 0")
    if len(split) > len(chosen):
        raise UsageError(f"--tensor-split has {len(split)} shares, but there are {len(chosen)} devices")
    placement = Placement(
        devices=chosen,
        n_gpu_layers=-1 if n_gpu_layers is None else n_gpu_layers,
        tensor_split=split,
        overrides=tuple(o for _, overrides in asked for o in overrides),
        kv_on_device=kv_on_device,
    )
    warnings = [
        message
        for message, overrides in asked
        if not any(compile_pattern(o.pattern).search(t.name) for o in overrides for t in model.tensors)
    ]
    if not chosen and n_gpu_layers:
        warnings.append(f"--gpu-layers {n_gpu_layers} does nothing: there is no GPU here")
    return placement, tuple(warnings)


def _devices(hardware: Hardware, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return tuple(d.name for d in gpus(hardware))
    if list(names) == ["none"]:
        return ()
    chosen = tuple(device_name(hardware, name, "--device") for name in names)
    for device in hardware.devices:
        if device.name in chosen and device.kind not in ("gpu", "igpu"):
            raise UsageError(
                f"--device {device.name}: layers are not offloaded to it; 'none' keeps all on the CPU"
            )
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"--device names a device twice: {', '.join(chosen)}")
    return chosen


def device_name(hardware: Hardware, name: str, option: str) -> str:
    """ggml's name of a device that the user named in any case, or by its buffer type as llama.cpp's ``-ot`` does.

    Raises:
        UsageError: there is none; the message lists those there are.
    """
    for device in hardware.devices:
        if name.lower() in (device.name.lower(), device.buffer_type.lower()):
            return device.name
    known = ", ".join(d.name for d in hardware.devices)
    raise UsageError(f"{option}: there is no device {name!r} here; there are: {known}")


def _parse_overrides(text: str, hardware: Hardware) -> Iterable[Override]:
    for part in text.split(","):
        pattern, equals, device = part.partition("=")
        if not equals or not pattern:
            raise PatternError(f"--override-tensor takes PATTERN=DEVICE, not {part!r}")
        compile_pattern(pattern)
        yield Override(pattern, device_name(hardware, device, "--override-tensor"))
