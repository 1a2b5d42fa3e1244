"""``tensortier plan``: where everything would go, and the same for other engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tensortier.cli import placing
from tensortier.cli.common import console, note, print_json, readable_size
from tensortier.cli.options import RpcOption, device_list, gpu_layers, split_list, split_servers, tensor_split
from tensortier.cli.options import settings as checked_settings
from tensortier.cli.placing import Manual, Planned
from tensortier.errors import UsageError
from tensortier.types import Settings

if TYPE_CHECKING:
    from rich.console import Console

_SETTINGS = Settings()
_BUDGET = "Budget"


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="A GGUF file (of a split one the first), a name from 'tensortier models', or a file that is not "
            "here: hf://owner/repo/file.gguf or https://..., of which only the header is read.",
        ),
    ],
    vram: Annotated[
        str | None,
        typer.Option(
            "--vram",
            metavar="SIZE",
            help="Use no more than this of each GPU, such as 8GiB; several sizes joined by commas: one per GPU.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(
            "--ram", metavar="SIZE", help="Use no more than this of main memory.", rich_help_panel=_BUDGET
        ),
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="Plan for a machine that is not here, with this card, such as 'RTX 4060 8GB'. Repeat it for "
            "several; needs --ram, and --memory or --cpu-bandwidth.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    cpu_bandwidth: Annotated[
        float | None,
        typer.Option(
            "--cpu-bandwidth",
            metavar="GB/S",
            min=0.1,
            help="Of that machine's main memory.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    main_memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="NAME",
            help="That machine's main memory, such as 'DDR5-5600 x2'.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="ENGINE",
            help="Print it as another engine takes it: llama-server, llama-cli, llama-bench, ik_llama.cpp, "
            "koboldcpp, llama-cpp-python, ollama, lm-studio.",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the plan file, which 'tensortier run --plan' takes.")
    ] = False,
    context: placing.ContextOption = _SETTINGS.n_ctx,
    batch: placing.BatchOption = None,
    ubatch: placing.UbatchOption = None,
    cache_type_k: placing.CacheTypeKOption = placing.TYPE_K,
    cache_type_v: placing.CacheTypeVOption = placing.TYPE_V,
    flash_attention: placing.FlashOption = placing.FLASH,
    threads: placing.ThreadsOption = _SETTINGS.threads,
    threads_batch: placing.ThreadsBatchOption = _SETTINGS.threads_batch,
    load_mode: placing.LoadModeOption = placing.LOAD_MODE,
    no_repack: placing.NoRepackOption = not _SETTINGS.repack,
    no_op_offload: placing.NoOpOffloadOption = not _SETTINGS.op_offload,
    rpc: RpcOption = None,
    n_gpu_layers: placing.GpuLayersOption = None,
    override_tensor: placing.OverrideOption = None,
    cpu_moe: placing.CpuMoeOption = False,
    n_cpu_moe: placing.NCpuMoeOption = None,
    n_cpu_ffn: placing.NCpuFfnOption = None,
    split: placing.SplitOption = None,
    device: placing.DeviceOption = None,
    no_kv_offload: placing.NoKvOffloadOption = False,
) -> None:
    """Show where every tensor and the KV cache would go, with the exact bytes per device, without loading.

    Without placement options everything goes on the GPU if it fits, else attention and the KV cache first.
    """
    if json and target is not None:
        raise UsageError("--json and --for are two ways to print the plan: use one of them")
    settings = checked_settings(
        placing.settings_of(
            context=context,
            cache_type_k=cache_type_k,
            cache_type_v=cache_type_v,
            flash_attention=flash_attention,
            threads=threads,
            threads_batch=threads_batch,
            load_mode=load_mode,
            no_repack=no_repack,
            no_op_offload=no_op_offload,
        ),
        batch=batch,
        ubatch=ubatch,
    )
    manual = Manual(
        n_gpu_layers=gpu_layers(n_gpu_layers),
        override_tensors=tuple(override_tensor or ()),
        cpu_moe=cpu_moe,
        n_cpu_moe=n_cpu_moe,
        n_cpu_ffn=n_cpu_ffn,
        tensor_split=tensor_split(split),
        devices=device_list(device),
        kv_on_device=not no_kv_offload,
    )
    from tensortier import export, planfile
    from tensortier.catalogue import hypothetical, parse_bytes

    elsewhere = None
    if gpu:
        if ram is None:
            raise UsageError("--gpu describes another machine: say its main memory too, such as --ram 32GiB")
        if rpc:
            raise UsageError("--gpu describes another machine: --rpc cannot be asked from here")
        elsewhere = hypothetical(gpu, parse_bytes(ram), cpu_bandwidth=cpu_bandwidth, memory=main_memory)
    elif cpu_bandwidth is not None or main_memory is not None:
        raise UsageError("--cpu-bandwidth and --memory describe another machine: give its --gpu too")

    if target is not None and target not in export.TARGETS:
        raise export.unknown(target)
    planned = placing.make_plan(
        model,
        settings,
        manual,
        split_servers(rpc),
        vram=tuple(parse_bytes(size) for size in split_list([vram])) if vram is not None else (),
        ram=None if ram is None or elsewhere is not None else parse_bytes(ram),
        elsewhere=elsewhere,
        remote=True,
    )
    if json:
        print_json(planfile.to_dict(planned.plan))
    elif target is not None:
        print(export.render(export.export(planned.plan, planned.model, target)), end="")
    else:
        _show(planned, console())
        return
    for warning in (*planned.hardware.warnings, *planned.plan.warnings):
        note(f"warning: {warning}")


def _show(planned: Planned, out: Console) -> None:
    from rich.table import Table

    plan, free = planned.plan, {d.name: d.memory_free for d in planned.hardware.devices}
    free["CPU"] = planned.hardware.ram_available
    settings, name = plan.settings, planned.model.name or plan.model
    context = settings.n_ctx or planned.model.context_length
    out.print(f"{name}: {readable_size(planned.model.nbytes)} of weights", markup=False)
    out.print(f"context {context}, KV cache {settings.type_k} and {settings.type_v}", markup=False)
    table = Table()
    for name in ("device", "weights", "KV cache", "compute", "total", "free"):
        table.add_column(name, justify="left" if name == "device" else "right")
    for row in plan.memory:
        sizes = (row.weights_bytes, row.kv_bytes, row.compute_bytes, row.total_bytes)
        here = readable_size(free[row.device]) if row.device in free else "unknown"
        table.add_row(row.device, *(readable_size(size) for size in sizes), here)
    out.print(table)
    for reason in plan.reasons:
        out.print(reason, markup=False)
    for override in plan.placement.overrides:
        out.print(f"  {override.pattern} -> {override.device}", markup=False)
    out.print(
        f"threads {plan.settings.threads}, load mode {plan.settings.load_mode}, "
        f"micro-batch {plan.settings.n_ubatch}",
        markup=False,
    )
    for warning in (*planned.hardware.warnings, *plan.warnings):
        out.print(f"warning: {warning}", markup=False)
