"""ik_llama.cpp's llama-server. Options as in its common/common.cpp."""

from __future__ import annotations

from tensortier.export import common
from tensortier.placement import load_mode
from tensortier.types import Export, ModelInfo, Plan


def export(plan: Plan, model: ModelInfo) -> Export:
    path, lost = common.model_file(model)
    place, settings = plan.placement, plan.settings

    def device_name(device: str) -> str:
        endpoint = common.remote_endpoint(plan, device)
        return f"RPC[{endpoint}]" if endpoint else device

    argv = ["llama-server", "-m", path]
    if plan.rpc:
        argv += ["--rpc", ",".join(plan.rpc)]
        lost.append(
            "Remote devices are named RPC[host:port] here; a build that names them otherwise lists its names "
            "when it refuses these."
        )
    argv += ["-dev", ",".join(map(device_name, place.devices)) or "none"]
    layers = common.ALL_LAYERS if place.n_gpu_layers < 0 else place.n_gpu_layers
    argv += ["-ngl", str(layers if place.devices else 0)]
    if len(place.devices) > 1:
        argv += ["-sm", "layer"]
    if place.tensor_split:
        argv += ["-ts", ",".join(map(common.number, place.tensor_split))]
    if found := common.overrides(plan, model, device_name):
        argv += ["-ot", common.joined(found, ",")]
    argv += ["-c", str(settings.n_ctx), "-np", str(settings.n_seq_max)]
    argv += ["-b", str(settings.n_batch), "-ub", str(settings.n_ubatch)]
    # "auto" means "on" to it
    argv += ["-ctk", settings.type_k, "-ctv", settings.type_v, "-fa", settings.flash_attention]
    if settings.threads:
        argv += ["-t", str(settings.threads)]
    if tb := common.threads_batch(plan):
        argv += ["-tb", str(tb)]
    mode = load_mode(plan)
    if "mmap" not in mode:
        argv.append("--no-mmap")
    if "mlock" in mode:
        argv.append("--mlock")
    if mode == "direct":
        lost.append("Direct reading of the file is not exported: it is read through the page cache.")
    if not place.kv_on_device:
        argv.append("-nkvo")
    if settings.repack:
        lost.append(
            "Reordering weights for the CPU is asked for with -rtr here, which does more than the plan "
            "assumes; it is left off."
        )
    if not settings.op_offload:
        lost.append("Keeping large batches from being computed on the GPU is not exported.")
    if settings.swa_full and any(model.swa_layers):
        lost.append("The full-size cache for sliding-window layers is not exported.")
    lost.append("The plan's memory and speed are predicted for llama.cpp; ik_llama.cpp computes differently.")
    return Export("ik_llama.cpp", tuple(argv), {}, tuple(lost))
