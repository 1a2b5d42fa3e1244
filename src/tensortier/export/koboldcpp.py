"""koboldcpp: a command line, and the same settings as a ``.kcpps`` file. Options as in koboldcpp.py, 2025."""

from __future__ import annotations

import json
import re
from typing import Any

from tensortier.errors import PlanError
from tensortier.export import common
from tensortier.placement import load_mode
from tensortier.types import Export, ModelInfo, Plan

_BATCHES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_CONTEXT = (256, 262144)
_QUANTKV = {"f16": 0, "q8_0": 1, "q4_0": 2}
_NEAREST_KV = {"f32": "f16", "bf16": "f16", "q5_0": "q8_0", "q5_1": "q8_0", "q4_1": "q4_0", "iq4_nl": "q4_0"}
_CARD = re.compile(r"(CUDA|ROCm|Vulkan)([0-9]+)")
_FILE = "tensortier.kcpps"


def export(plan: Plan, model: ModelInfo) -> Export:
    path, lost = common.model_file(model)
    backend, names, shares, told = _devices(plan)
    lost += told
    config: dict[str, Any] = {"model_param": path, **backend}
    config["gpulayers"] = common.offloaded_layers(plan, model) if names else 0
    if shares:
        config["tensor_split"] = shares
    if found := common.overrides(plan, model, lambda device: names.get(device, device)):
        known = {"CPU", *names.values()}
        for device in sorted({o.device for o in found} - known):
            lost.append(f"Tensors that the plan puts on {device} stay with their layers.")
        found = tuple(o for o in found if o.device in known)
        if found:
            config["overridetensors"] = common.joined(found, ",")
    lost += _settings(plan, model, config)
    argv = ("koboldcpp", *_arguments(config))
    return Export("koboldcpp", argv, {_FILE: json.dumps(config, indent=1) + "\n"}, tuple(lost))


def _devices(plan: Plan) -> tuple[dict[str, Any], dict[str, str], list[float], list[str]]:
    """The backend options, koboldcpp's name of each usable device, the tensor split, and what is lost."""
    place, lost = plan.placement, []
    cards = {d: m for d in place.devices if (m := _CARD.fullmatch(d))}
    families = sorted({m[1] for m in cards.values()})
    if len(families) > 1:
        raise PlanError(
            f"koboldcpp uses one GPU backend at a time, not {' and '.join(families)}; plan with one"
        )
    for device in place.devices:
        if device not in cards and not device.startswith(("Metal", "MTL")):
            lost.append(f"koboldcpp has no option for {device}: its layers go to the other devices.")
    metal = [d for d in place.devices if d.startswith(("Metal", "MTL"))]
    if metal:
        return {}, {d: d for d in metal}, [], lost  # the only GPU there, used without being asked for
    if not cards:
        return {"usecpu": True}, {}, [], lost
    indices = {d: int(m[2]) for d, m in cards.items()}
    if families == ["Vulkan"]:
        ids = sorted(indices.values())
        names = {d: f"Vulkan{ids.index(i)}" for d, i in indices.items()}  # the others are hidden from it
        backend: dict[str, Any] = {"usevulkan": ids}
        indices = {d: ids.index(i) for d, i in indices.items()}
    elif len(indices) == 1 and (only := next(iter(indices.values()))) <= 3:
        backend, names = {"usecuda": [str(only)]}, dict.fromkeys(indices, f"{families[0]}0")
        return backend, names, [], lost
    else:
        backend, names = {"usecuda": ["normal"]}, {d: d for d in indices}
        lost.append("koboldcpp numbers cards by their PCI bus; check that this is the plan's order.")
    if list(indices.values()) != sorted(indices.values()):
        lost.append(
            "koboldcpp gives the first layers to the card of the lowest number, not in the plan's order."
        )
    if place.tensor_split:
        given = dict(zip(place.devices, place.tensor_split, strict=False))
        shares = [0.0] * (max(indices.values()) + 1)
        for device, index in indices.items():
            shares[index] = given.get(device, 0.0)
    elif len(indices) == 1:
        shares = [0.0] * next(iter(indices.values())) + [1.0]
    else:
        lost.append(
            "The plan shares layers out by free memory; without a tensor split koboldcpp decides itself."
        )
        shares = []
    return backend, names, shares if len(shares) > 1 else [], lost


def _settings(plan: Plan, model: ModelInfo, config: dict[str, Any]) -> list[str]:
    """Adds everything but the placement to ``config`` and returns what is lost."""
    place, settings, lost = plan.placement, plan.settings, []
    n_ctx = common.context(plan, model)
    config["contextsize"] = min(max(n_ctx, _CONTEXT[0]), _CONTEXT[1])
    if config["contextsize"] != n_ctx:
        lost.append(f"koboldcpp takes a context of {_CONTEXT[0]} to {_CONTEXT[1]} tokens, not {n_ctx}.")
    batch = max(b for b in _BATCHES if b <= max(settings.n_ubatch, _BATCHES[0]))
    config["batchsize"] = batch
    if (batch, batch) != (settings.n_batch, settings.n_ubatch):
        lost.append(
            f"koboldcpp has one batch size, a power of two: {batch} in place of a batch of "
            f"{settings.n_batch} computed {settings.n_ubatch} at a time."
        )
    if settings.threads:
        config["threads"] = settings.threads
    if tb := common.threads_batch(plan):
        config["blasthreads"] = tb
    flash = settings.flash_attention != "off"
    config["flashattention"] = flash
    if not flash:
        config["noflashattention"] = True
        lost.append(
            "Newer versions have flash attention on unless --noflashattention is given; older ones lack it."
        )
    kind = _NEAREST_KV.get(settings.type_k, settings.type_k)
    if kind not in _QUANTKV:
        raise PlanError(f"unknown KV cache type {kind!r}")
    if (kind, kind) != (settings.type_k, settings.type_v):
        lost.append(
            f"koboldcpp has one type for K and V, of f16, q8_0 and q4_0: {kind} in place of "
            f"{settings.type_k} and {settings.type_v}."
        )
    if _QUANTKV[kind]:
        config["quantkv"] = _QUANTKV[kind]
        if not flash:
            lost.append("Without flash attention koboldcpp quantizes K only.")
    mode = load_mode(plan)
    config["usemmap"] = "mmap" in mode
    config["usemlock"] = "mlock" in mode
    if mode == "direct":
        lost.append("koboldcpp cannot bypass the page cache.")
    config["lowvram"] = not place.kv_on_device
    if any(model.swa_layers):
        config["useswa"] = not settings.swa_full
    if settings.n_seq_max > 1:
        lost.append(f"The plan has {settings.n_seq_max} sequences; this runs one, and others wait.")
    if not settings.repack:
        lost.append("koboldcpp has no option to keep the CPU from reordering weights.")
    if not settings.op_offload:
        lost.append("koboldcpp has no option to keep large batches from being computed on the GPU.")
    return lost


def _arguments(config: dict[str, Any]) -> list[str]:
    """The options that mean ``config``, less "noflashattention", which older versions would refuse."""
    spelled = {"model_param": "--model", "batchsize": "--blasbatchsize"}
    argv: list[str] = []
    for key, value in config.items():
        option = spelled.get(key, f"--{key}")
        if key == "noflashattention" or value is False:
            continue
        if value is True:
            argv.append(option)
        elif isinstance(value, list):
            argv += [option, *(v if isinstance(v, str) else common.number(v) for v in value)]
        else:
            argv += [option, str(value)]
    return argv
