"""LM Studio: the load settings as its SDK takes them (LLMLoadModelConfig of lmstudio-js)."""

from __future__ import annotations

import json
from typing import Any

from tensortier.export import common
from tensortier.placement import load_mode
from tensortier.types import Export, ModelInfo, Plan

_KV_TYPES = ("f32", "f16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


def export(plan: Plan, model: ModelInfo) -> Export:
    _, lost = common.model_file(model)
    place, settings = plan.placement, plan.settings
    gpu, told = _gpu(plan, model)
    lost += told
    if len(place.devices) > 1:
        lost.append("How layers are shared out over several GPUs is set in LM Studio's hardware settings.")
    if plan.rpc:
        lost.append(f"LM Studio has no remote devices: {', '.join(plan.rpc)} cannot be used.")
    config: dict[str, Any] = {
        "gpu": gpu,
        "contextLength": common.context(plan, model),
        "evalBatchSize": settings.n_batch,
        "flashAttention": settings.flash_attention != "off",
        "offloadKVCacheToGpu": place.kv_on_device,
        "tryMmap": "mmap" in load_mode(plan),
        "keepModelInMemory": "mlock" in load_mode(plan),
    }
    for key, kind in (
        ("llamaKCacheQuantizationType", settings.type_k),
        ("llamaVCacheQuantizationType", settings.type_v),
    ):
        if kind not in _KV_TYPES:
            lost.append(f"LM Studio has no KV cache of type {kind}: f16 in its place.")
            kind = "f16"
        config[key] = kind
    if settings.threads:
        lost.append(
            f"CPU threads are no setting of the SDK: set the CPU thread pool size to {settings.threads}."
        )
    if common.threads_batch(plan) != settings.threads:
        lost.append(f"The {common.threads_batch(plan)} threads for prompts are left out.")
    if settings.n_ubatch != 512:
        lost.append(f"A micro-batch of {settings.n_ubatch} is not exported.")
    if load_mode(plan) == "direct":
        lost.append("LM Studio cannot bypass the page cache.")
    if settings.n_seq_max > 1:
        lost.append(f"{settings.n_seq_max} parallel sequences are not exported.")
    lost += (f"Not exported: {words}." for words in common.unusual(plan, model))
    return Export("lm-studio", (), {"lm-studio.json": json.dumps(config, indent=1) + "\n"}, tuple(lost))


def _gpu(plan: Plan, model: ModelInfo) -> tuple[dict[str, Any], list[str]]:
    moved = common.overridden(plan, model)
    if not moved or not plan.placement.devices:
        return _ratio(common.offloaded_layers(plan, model), model), []
    tensors = [t for found in moved.values() for t in found]
    if set(moved) == {"CPU"} and all(t.role.is_routed_expert for t in tensors):
        return _experts(plan, model, {t.name for t in tensors})
    layers = common.whole_layers(plan, model)
    told = (
        f"LM Studio places whole layers only. The plan moves {common.moved(plan, model)}; {layers} layers "
        "take no more of the GPU, but leave attention of the others in RAM."
    )
    return _ratio(layers, model), [told]


def _experts(plan: Plan, model: ModelInfo, on_cpu: set[str]) -> tuple[dict[str, Any], list[str]]:
    """Experts of the first layers on the CPU: the fewest layers with at least the bytes that the plan moves."""
    offloaded = _ratio(common.offloaded_layers(plan, model), model)
    experts = [t for t in model.tensors if t.role.is_routed_expert]
    room = sum(t.nbytes for t in experts if t.name in on_cpu)
    count, first = 0, set[str]()
    while room > 0:
        layer = [t for t in experts if t.layer == count]
        first |= {t.name for t in layer}
        room -= sum(t.nbytes for t in layer)
        count += 1
    told = []
    if first != on_cpu:
        told.append(
            f"LM Studio keeps the experts of the first layers in RAM: {count} layers in place of the "
            f"{len(on_cpu)} expert tensors the plan chose."
        )
    return {**offloaded, "numCpuExpertLayersRatio": round(count / model.n_layers, 6)}, told


def _ratio(layers: int, model: ModelInfo) -> dict[str, Any]:
    """GPU offload: 0 to 1 of the layers, or the words for none and all."""
    if layers == 0:
        return {"ratio": "off"}
    return {"ratio": "max" if layers >= model.n_layers + 1 else round(min(1.0, layers / model.n_layers), 6)}
