"""What the exporters share: a plan's placement in the words of llama.cpp's command line and its kin."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from urllib.parse import urlparse

from tensortier import placement
from tensortier.errors import PlanError
from tensortier.overrides import compact
from tensortier.pageable import DEVICE as DRIVE
from tensortier.patterns import compile_pattern
from tensortier.types import ModelInfo, Override, Plan, Tensor

GIB = 1 << 30
MAX_OVERRIDES = 4096  # llama_max_tensor_buft_overrides, the end marker included
ALL_LAYERS = 999  # for engines that take a number only; llama.cpp's LLAMA_MAX_LAYERS is 512

_REMOTE = re.compile(r"RPC([0-9]+)")


def model_file(model: ModelInfo) -> tuple[str, list[str]]:
    """The file to load, and what to say of it. A remote model is named as if it lay in the current folder."""
    if "://" not in model.path:
        return model.path, []
    name = urlparse(model.path).path.rpartition("/")[2]
    return name, [f"The model is remote: download {model.path} first."]


def without_drive(plan: Plan, model: ModelInfo) -> tuple[Plan, list[str]]:
    """The plan with the weights that it leaves on the drive in RAM, mapped from the file, and what that loses: no
    other engine has the device that reads them."""
    moved = overridden(plan, model)
    drive = moved.pop(DRIVE, [])
    if not drive:
        return plan, []
    place = plan.placement
    layers = placement.resolve(model, dataclasses.replace(place, overrides=()), {})
    names = {device: [t.name for t in tensors] for device, tensors in moved.items()}
    if offloaded := [t.name for t in drive if layers[t.name] != "CPU"]:
        names.setdefault("CPU", []).extend(offloaded)
    place = dataclasses.replace(place, overrides=compact(names, (t.name for t in model.tensors)))
    # reordered weights are copies, which cannot be dropped and read again
    settings = dataclasses.replace(plan.settings, load_mode="mmap", repack=False)
    told = (
        f"The plan reads {sum(t.nbytes for t in drive) / GIB:.2f} GiB of weights from the drive as they are needed, "
        "with tensortier's own backend. Here the file is mapped and the operating system pages them, which is slower: "
        "the plan's speed and memory do not hold."
    )
    return dataclasses.replace(plan, placement=place, settings=settings, tier=None), [told]


def context(plan: Plan, model: ModelInfo) -> int:
    """Tokens of context, for engines that cannot be told to take what the model was trained for.

    Raises:
        PlanError: the plan leaves it to the model, and the file does not say.
    """
    n_ctx = plan.settings.n_ctx or model.context_length
    if not n_ctx:
        raise PlanError("the plan leaves the context to the model, whose file gives none; set --ctx-size")
    return n_ctx


def threads_batch(plan: Plan) -> int:
    """Threads for prompts; 0 where the plan leaves them open."""
    return plan.settings.threads_batch or plan.settings.threads


def number(value: float) -> str:
    """A share of a tensor split with the precision of the float it is read into."""
    return f"{value:.9g}"


def buffer_type(plan: Plan, device: str) -> str:
    """What llama.cpp's ``-ot`` calls a device of the plan.

    All backends name the buffer type after the device but RPC, whose name is the device's index on its server
    with the server's address (ggml_backend_rpc_buffer_type). Servers are taken to have one device each,
    unless there is only one server.

    Raises:
        PlanError: the plan names a remote device of no server in it.
    """
    if not _REMOTE.fullmatch(device):
        return device
    index, endpoint = _remote(plan, device)
    return f"RPC{index}[{endpoint}]"


def remote_endpoint(plan: Plan, device: str) -> str | None:
    """``host:port`` of a remote device of the plan, named as device or as buffer type; None for others."""
    if _REMOTE.fullmatch(device):
        return _remote(plan, device)[1]
    named = re.fullmatch(r"RPC[0-9]*\[(.+)\]", device)
    return named[1] if named else None


def _remote(plan: Plan, device: str) -> tuple[int, str]:
    index = int(device.removeprefix("RPC"))
    if len(plan.rpc) == 1:
        return index, plan.rpc[0]
    if index >= len(plan.rpc):
        raise PlanError(f"the plan uses {device} but names {len(plan.rpc)} RPC servers; give --rpc for each")
    return 0, plan.rpc[index]


def overridden(plan: Plan, model: ModelInfo) -> dict[str, list[Tensor]]:
    """Tensors that an override of the plan places, by device; the first pattern that finds a name decides."""
    compiled = [(compile_pattern(o.pattern), o.device) for o in plan.placement.overrides]
    found: dict[str, list[Tensor]] = {}
    for tensor in model.tensors:
        device = next((d for pattern, d in compiled if pattern.search(tensor.name)), None)
        if device is not None:
            found.setdefault(device, []).append(tensor)
    return found


def overrides(plan: Plan, model: ModelInfo, rename: Callable[[str], str]) -> tuple[Override, ...]:
    """The plan's overrides as few anchored patterns, to ``rename(device)``.

    Raises:
        PlanError: llama.cpp has no room for so many.
    """
    names: dict[str, list[str]] = {}
    for device, tensors in overridden(plan, model).items():
        names.setdefault(rename(device), []).extend(t.name for t in tensors)
    found = compact(names, (t.name for t in model.tensors))
    if len(found) >= MAX_OVERRIDES:
        raise PlanError(
            f"the plan needs {len(found)} tensor overrides; llama.cpp takes fewer than {MAX_OVERRIDES}"
        )
    return found


def joined(overrides: Sequence[Override], separator: str) -> str:
    """One value for ``-ot``. The patterns hold neither separators nor "="."""
    return separator.join(f"{o.pattern}={o.device}" for o in overrides)


def whole_layers(plan: Plan, model: ModelInfo) -> int:
    """For engines that know only a number of layers: the most whole layers, from the back and the output
    included, that take no more bytes of weights on GPUs than the plan does."""
    place = plan.placement
    where = placement.resolve(model, place, {})
    room = sum(t.nbytes for t in model.tensors if where[t.name] != "CPU")
    limit = offloaded_layers(plan, model)
    sizes = [0] * (model.n_layers + 1)
    for tensor in model.tensors:
        if tensor.layer is not None:
            sizes[min(tensor.layer, model.n_layers)] += tensor.nbytes
        elif tensor.name.startswith("output"):
            sizes[-1] += tensor.nbytes
    count = 0
    while count < limit and (room := room - sizes[-1 - count]) >= 0:
        count += 1
    return count


def offloaded_layers(plan: Plan, model: ModelInfo) -> int:
    """Layers the plan offloads, the output layer included: 0 to ``n_layers + 1``."""
    place = plan.placement
    if not place.devices:
        return 0
    total = model.n_layers + 1
    return total if place.n_gpu_layers < 0 else min(place.n_gpu_layers, total)


def unusual(plan: Plan, model: ModelInfo) -> list[str]:
    """Settings away from llama.cpp's defaults that most engines built on it have no option for, in words."""
    settings = plan.settings
    return [
        words
        for words, differs in (
            ("leaving weights in the file's order (no repack)", not settings.repack),
            ("computing large batches on the CPU (no op offload)", not settings.op_offload),
            ("the full cache for sliding-window layers", settings.swa_full and any(model.swa_layers)),
        )
        if differs
    ]


def moved(plan: Plan, model: ModelInfo) -> str:
    """What the overrides move, in words: "90 tensors (4.20 GiB) to CPU and 3 (0.10 GiB) to CUDA1"."""
    rows = [
        f"{len(tensors)} tensors ({sum(t.nbytes for t in tensors) / GIB:.2f} GiB) to {device}"
        for device, tensors in sorted(overridden(plan, model).items())
    ]
    return " and ".join(rows)
