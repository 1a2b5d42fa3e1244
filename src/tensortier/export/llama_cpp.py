"""llama.cpp's own programs. Options as in common/arg.cpp and tools/llama-bench/llama-bench.cpp."""

from __future__ import annotations

from tensortier.errors import PlanError
from tensortier.export import common
from tensortier.placement import load_mode
from tensortier.types import Export, ModelInfo, Plan

# Our names of the load modes -> those of --load-mode
_LOAD_MODES = {"mmap": "mmap", "none": "none", "mlock": "mlock", "mmap+mlock": "mmap+mlock", "direct": "dio"}
_BENCH_KV_TYPES = ("f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")


def server(plan: Plan, model: ModelInfo) -> Export:
    return _program("llama-server", plan, model)


def cli(plan: Plan, model: ModelInfo) -> Export:
    return _program("llama-cli", plan, model)


def _program(name: str, plan: Plan, model: ModelInfo) -> Export:
    path, lost = common.model_file(model)
    place, settings = plan.placement, plan.settings
    # Without "-fit off" it would still shrink what it thinks does not fit.
    argv = [name, "-m", path, "-fit", "off"]
    # The options are read in order, and the names behind -dev and -ot exist once the servers are registered.
    if plan.rpc:
        argv += ["--rpc", ",".join(plan.rpc)]
    argv += ["-dev", ",".join(place.devices) or "none"]
    argv += ["-ngl", "all" if place.devices and place.n_gpu_layers < 0 else str(_layers(plan))]
    if place.tensor_split:
        argv += ["-ts", ",".join(map(common.number, place.tensor_split))]
    if found := common.overrides(plan, model, lambda device: common.buffer_type(plan, device)):
        argv += ["-ot", common.joined(found, ",")]
    argv += ["-c", str(settings.n_ctx), "-np", str(settings.n_seq_max)]
    argv += ["-b", str(settings.n_batch), "-ub", str(settings.n_ubatch)]
    argv += ["-ctk", settings.type_k, "-ctv", settings.type_v, "-fa", settings.flash_attention]
    if settings.threads:
        argv += ["-t", str(settings.threads)]
    if tb := common.threads_batch(plan):
        argv += ["-tb", str(tb)]
    argv += ["-lm", _load_mode(plan)]
    if not place.kv_on_device:
        argv.append("-nkvo")
    if not settings.repack:
        argv.append("--no-repack")
    if not settings.op_offload:
        argv.append("--no-op-offload")
    if settings.swa_full:
        argv.append("--swa-full")
    lost.append(
        f"{name} keeps up to 8 GiB of earlier prompts in RAM beside what the plan counts; --cache-ram 0 ends that."
    )
    return Export(name, tuple(argv), {}, tuple(lost))


def bench(plan: Plan, model: ModelInfo) -> Export:
    path, lost = common.model_file(model)
    place, settings = plan.placement, plan.settings
    argv = ["llama-bench", "-m", path]
    if plan.rpc:
        argv += ["-rpc", ",".join(plan.rpc)]
    argv += ["-dev", "/".join(place.devices) or "none"]
    argv += ["-ngl", str(common.ALL_LAYERS if place.devices and place.n_gpu_layers < 0 else _layers(plan))]
    if place.tensor_split:
        argv += ["-ts", "/".join(map(common.number, place.tensor_split))]
    if found := common.overrides(plan, model, lambda device: common.buffer_type(plan, device)):
        argv += ["-ot", common.joined(found, ";")]  # a comma would start another configuration to measure
    argv += ["-b", str(settings.n_batch), "-ub", str(settings.n_ubatch)]
    for option, value in (("-ctk", settings.type_k), ("-ctv", settings.type_v)):
        if value in _BENCH_KV_TYPES:
            argv += [option, value]
        else:
            lost.append(f"llama-bench has no KV cache of type {value}: {option} stays at f16.")
    argv += ["-fa", settings.flash_attention]
    if settings.threads:
        argv += ["-t", str(settings.threads)]
    if common.threads_batch(plan) != settings.threads:
        lost.append(
            f"llama-bench has one number of threads: {common.threads_batch(plan)} for prompts are left out."
        )
    argv += ["-lm", _load_mode(plan)]
    argv += ["-nkvo", "0" if place.kv_on_device else "1"]
    argv += ["--repack", "1" if settings.repack else "0"]
    argv += ["-nopo", "0" if settings.op_offload else "1"]
    lost.append(
        f"llama-bench makes the context as large as its test (-p, -n, -d), not {settings.n_ctx} tokens; "
        "give -d for the depth you want to measure."
        if settings.n_ctx
        else "llama-bench makes the context as large as its test (-p, -n, -d), not as the model allows."
    )
    if settings.n_seq_max > 1:
        lost.append(f"llama-bench runs one sequence, not {settings.n_seq_max}.")
    if settings.swa_full and any(model.swa_layers):
        lost.append("llama-bench always uses the small cache for sliding-window layers.")
    return Export("llama-bench", tuple(argv), {}, tuple(lost))


def _layers(plan: Plan) -> int:
    return plan.placement.n_gpu_layers if plan.placement.devices else 0


def _load_mode(plan: Plan) -> str:
    mode = load_mode(plan)
    if mode not in _LOAD_MODES:
        raise PlanError(f"unknown load mode {mode!r}; one of: auto, {', '.join(_LOAD_MODES)}")
    return _LOAD_MODES[mode]
