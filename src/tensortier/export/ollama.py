"""Ollama: a Modelfile, and the server's settings as environment variables (its FAQ)."""

from __future__ import annotations

import re

from tensortier.export import common
from tensortier.placement import load_mode
from tensortier.types import Export, ModelInfo, Plan

_KV_TYPES = ("f16", "q8_0", "q4_0")
_NEAREST_KV = {"f32": "f16", "bf16": "f16", "q5_0": "q8_0", "q5_1": "q8_0", "q4_1": "q4_0", "iq4_nl": "q4_0"}


def export(plan: Plan, model: ModelInfo) -> Export:
    path, lost = common.model_file(model)
    place, settings = plan.placement, plan.settings
    if len(model.files) > 1:
        lost.append(
            f"The model is split into {len(model.files)} files; merge them first (llama-gguf-split --merge)."
        )
    layers = common.whole_layers(plan, model)
    if moved := common.moved(plan, model):
        lost.append(
            f"Ollama places whole layers only. The plan moves {moved}; {layers} layers take no more of the "
            "GPU, but leave attention and KV cache of the others in RAM."
        )
    if len(place.devices) > 1:
        lost.append("Ollama shares layers out over several GPUs by itself.")
    if plan.rpc:
        lost.append(f"Ollama has no remote devices: {', '.join(plan.rpc)} cannot be used.")
    per_request = max(1, common.context(plan, model) // settings.n_seq_max)
    lines = [f"FROM {path}", f"PARAMETER num_ctx {per_request}", f"PARAMETER num_gpu {layers}"]
    lines.append(f"PARAMETER num_batch {settings.n_ubatch}")
    if settings.n_batch != settings.n_ubatch:
        lost.append(f"Ollama has one batch size: {settings.n_ubatch} in place of {settings.n_batch} as well.")
    if settings.threads:
        lines.append(f"PARAMETER num_thread {settings.threads}")
    if common.threads_batch(plan) != settings.threads:
        lost.append(
            f"Ollama has one number of threads: the {common.threads_batch(plan)} for prompts are left out."
        )
    mode = load_mode(plan)
    lines.append(f"PARAMETER use_mmap {'true' if 'mmap' in mode else 'false'}")
    if "mlock" in mode:
        lost.append("Ollama does not lock the model in RAM.")
    if mode == "direct":
        lost.append("Ollama cannot bypass the page cache.")
    if not place.kv_on_device and layers:
        lost.append("Ollama keeps the KV cache of offloaded layers on the GPU.")
    lost += (f"Ollama has no option for {words}." for words in common.unusual(plan, model))
    environment, told = _environment(plan)
    name = re.sub(r"[^a-z0-9._-]+", "-", (model.name or "model").lower()).strip("-._") or "model"
    files = {"Modelfile": "\n".join(lines) + "\n", "ollama.env": "".join(f"{line}\n" for line in environment)}
    lost.append("The settings in ollama.env are the server's: they hold for every model it runs.")
    return Export("ollama", ("ollama", "create", name, "-f", "Modelfile"), files, (*lost, *told))


def _environment(plan: Plan) -> tuple[list[str], list[str]]:
    settings, lost = plan.settings, []
    lines = [f"OLLAMA_NUM_PARALLEL={settings.n_seq_max}"]
    if settings.flash_attention != "auto":
        lines.append(f"OLLAMA_FLASH_ATTENTION={int(settings.flash_attention == 'on')}")
    kind = _NEAREST_KV.get(settings.type_k, settings.type_k)
    lines.append(f"OLLAMA_KV_CACHE_TYPE={kind}")
    if (kind, kind) != (settings.type_k, settings.type_v):
        lost.append(
            f"Ollama has one type for K and V, of {', '.join(_KV_TYPES)}: {kind} in place of "
            f"{settings.type_k} and {settings.type_v}."
        )
    return lines, lost
