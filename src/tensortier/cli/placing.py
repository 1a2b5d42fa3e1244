"""Options of context, computation and placement that ``run`` and ``plan`` share, and what they mean together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from tensortier.cli.options import (
    INT_MAX,
    MAX_CONTEXT,
    MAX_THREADS,
    CacheType,
    FlashAttention,
    LoadMode,
    choices,
)
from tensortier.errors import UsageError
from tensortier.types import Settings

if TYPE_CHECKING:
    from tensortier.types import Hardware, ModelInfo, Plan

_SETTINGS = Settings()
TYPE_K = CacheType(_SETTINGS.type_k)
TYPE_V = CacheType(_SETTINGS.type_v)
FLASH = FlashAttention(_SETTINGS.flash_attention)
LOAD_MODE = LoadMode(_SETTINGS.load_mode)
_CONTEXT = "Context and computation"
_PLACE = "Manual placement (any of these replaces the automatic plan)"

ContextOption = Annotated[
    int,
    typer.Option(
        "--context",
        "-c",
        metavar="N",
        min=0,
        max=MAX_CONTEXT,
        help="Tokens that the model can see, answer included; 0: what it was trained for.",
        rich_help_panel=_CONTEXT,
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch",
        "-b",
        metavar="N",
        min=1,
        max=MAX_CONTEXT,
        help=f"Prompt tokens handed over at once. Without it: {_SETTINGS.n_batch}.",
        rich_help_panel=_CONTEXT,
    ),
]
UbatchOption = Annotated[
    int | None,
    typer.Option(
        "--ubatch",
        "-ub",
        metavar="N",
        min=1,
        max=MAX_CONTEXT,
        help=f"Prompt tokens computed at once. Without it: {_SETTINGS.n_ubatch}, at most --batch.",
        rich_help_panel=_CONTEXT,
    ),
]
CacheTypeKOption = Annotated[
    CacheType,
    typer.Option(
        "--cache-type-k",
        "-ctk",
        metavar="TYPE",
        help=f"Type of the K cache: {choices(CacheType)}.",
        rich_help_panel=_CONTEXT,
    ),
]
CacheTypeVOption = Annotated[
    CacheType,
    typer.Option(
        "--cache-type-v",
        "-ctv",
        metavar="TYPE",
        help="Type of the V cache, one of the same.",
        rich_help_panel=_CONTEXT,
    ),
]
FlashOption = Annotated[
    FlashAttention,
    typer.Option(
        "--flash-attention",
        "-fa",
        metavar="WHEN",
        help=f"Flash attention: {choices(FlashAttention)}.",
        rich_help_panel=_CONTEXT,
    ),
]
ThreadsOption = Annotated[
    int,
    typer.Option(
        "--threads",
        "-t",
        metavar="N",
        min=0,
        max=MAX_THREADS,
        help="Threads; 0: one per performance core.",
        rich_help_panel=_CONTEXT,
    ),
]
ThreadsBatchOption = Annotated[
    int,
    typer.Option(
        "--threads-batch",
        "-tb",
        metavar="N",
        min=0,
        max=MAX_THREADS,
        help="Threads while the prompt is computed; 0: as --threads.",
        rich_help_panel=_CONTEXT,
    ),
]
LoadModeOption = Annotated[
    LoadMode,
    typer.Option(
        "--load-mode",
        metavar="MODE",
        help=f"How weights get from the file into memory: {choices(LoadMode)}.",
        rich_help_panel=_CONTEXT,
    ),
]
NoRepackOption = Annotated[
    bool,
    typer.Option(
        "--no-repack",
        help="Leave weights on the CPU in the file's order instead of the faster one.",
        rich_help_panel=_CONTEXT,
    ),
]
NoOpOffloadOption = Annotated[
    bool,
    typer.Option(
        "--no-op-offload",
        help="Do not send large batches to the GPU for weights that are in RAM.",
        rich_help_panel=_CONTEXT,
    ),
]
GpuLayersOption = Annotated[
    str | None,
    typer.Option(
        "--gpu-layers",
        "-ngl",
        "--n-gpu-layers",
        metavar="N",
        help="Layers on the GPU, counted from the last: a number, 'all' (so too when only other "
        "placement options are given), or 'auto' for the automatic plan.",
        rich_help_panel=_PLACE,
    ),
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option(
        "--override-tensor",
        "-ot",
        metavar="REGEX=DEVICE",
        help="Put the weights whose name the pattern finds on a device; the first match wins. "
        "Repeat it, or join several by commas.",
        rich_help_panel=_PLACE,
    ),
]
CpuMoeOption = Annotated[
    bool,
    typer.Option("--cpu-moe", "-cmoe", help="Keep all expert weights on the CPU.", rich_help_panel=_PLACE),
]
NCpuMoeOption = Annotated[
    int | None,
    typer.Option(
        "--n-cpu-moe",
        "-ncmoe",
        metavar="N",
        min=0,
        max=INT_MAX,
        help="Keep the expert weights of the first N layers on the CPU.",
        rich_help_panel=_PLACE,
    ),
]
NCpuFfnOption = Annotated[
    int | None,
    typer.Option(
        "--n-cpu-ffn",
        "-ncffn",
        metavar="N",
        min=0,
        max=INT_MAX,
        help="Keep the dense feed-forward weights of the first N layers on the CPU.",
        rich_help_panel=_PLACE,
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--tensor-split",
        "-ts",
        metavar="N,N...",
        help="Shares of the offloaded layers per device, such as 3,1.",
        rich_help_panel=_PLACE,
    ),
]
DeviceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        "-dev",
        metavar="LIST",
        help="Devices to offload to, in order, joined by commas; 'none': the CPU only.",
        rich_help_panel=_PLACE,
    ),
]
NoKvOffloadOption = Annotated[
    bool,
    typer.Option("--no-kv-offload", "-nkvo", help="Keep the KV cache in RAM.", rich_help_panel=_PLACE),
]


def settings_of(
    *,
    context: int,
    cache_type_k: CacheType,
    cache_type_v: CacheType,
    flash_attention: FlashAttention,
    threads: int,
    threads_batch: int,
    load_mode: LoadMode,
    no_repack: bool,
    no_op_offload: bool,
) -> Settings:
    """The options as settings; batch sizes are added by ``options.settings``, which checks them all."""
    return Settings(
        n_ctx=context,
        type_k=cache_type_k.value,
        type_v=cache_type_v.value,
        flash_attention=flash_attention.value,
        threads=threads,
        threads_batch=threads_batch,
        load_mode=load_mode.value,
        repack=not no_repack,
        op_offload=not no_op_offload,
    )


@dataclass(frozen=True)
class Manual:
    """Placement as llama.cpp's users give it: the arguments of ``placement.from_flags``. The defaults are
    what nothing given means."""

    n_gpu_layers: int | None = None
    override_tensors: Sequence[str] = ()
    cpu_moe: bool = False
    n_cpu_moe: int | None = None
    n_cpu_ffn: int | None = None
    tensor_split: Sequence[float] | None = None
    devices: Sequence[str] | None = None
    kv_on_device: bool = True

    @property
    def given(self) -> bool:
        return self != Manual()


@dataclass(frozen=True)
class Planned:
    """A plan with what it was made for."""

    plan: Plan
    model: ModelInfo
    hardware: Hardware


def make_plan(
    name: str,
    settings: Settings,
    manual: Manual,
    rpc: Sequence[str],
    *,
    vram: Sequence[int] = (),
    ram: int | None = None,
    elsewhere: Hardware | None = None,
    remote: bool = False,
) -> Planned:
    """Read the model's header and the machine, and place everything. Raises the exceptions of those parts.

    ``vram``: bytes that may be used of each GPU, or of all of them alike where it is one number; ``ram``: bytes
    of main memory. Both only ever lower what is there. ``elsewhere``: a machine to plan for instead of this one.
    ``remote``: the model may be a file behind ``hf://`` or ``https://``, of which only the header is read. For
    either, bytes come from formulas, not from llama.cpp.
    """
    from tensortier import gguf, hardware, library, memory, placement, planner

    away = gguf.is_remote(name)
    if away and not remote:
        raise UsageError(f"{name} is a remote file: it has to be on this machine, download it first")
    source = name if away else library.find(name)
    model = gguf.read(source)
    machine = elsewhere or hardware.probe(None if away else source, rpc=rpc)
    if vram or ram is not None:
        machine = _limited(machine, vram, ram)
    answers = None
    if away or elsewhere is not None:
        answers = memory.Formulas(model, {d.name: d.memory_free for d in machine.devices})
    if not manual.given:
        plan = planner.simple_plan(model, machine, settings, rpc=rpc, answers=answers)
    else:
        placed, warnings = placement.from_flags(model, machine, **vars(manual))
        plan = planner.manual_plan(
            model, machine, settings, placed, rpc=rpc, warnings=warnings, answers=answers
        )
    return Planned(plan, model, machine)


def _limited(machine: Hardware, vram: Sequence[int], ram: int | None) -> Hardware:
    from tensortier import placement

    cards = [d.name for d in placement.gpus(machine)]
    if vram and not cards:
        raise UsageError("--vram has nothing to limit: there is no GPU here")
    if len(vram) > 1 and len(vram) != len(cards):
        raise UsageError(f"--vram has {len(vram)} sizes for {len(cards)} GPUs ({', '.join(cards)})")
    limits = dict(zip(cards, vram if len(vram) > 1 else list(vram) * len(cards), strict=False))
    devices = tuple(
        replace(d, memory_free=min(d.memory_free, limits[d.name])) if d.name in limits else d
        for d in machine.devices
    )
    available = machine.ram_available if ram is None else min(machine.ram_available, ram)
    return replace(machine, devices=devices, ram_available=available)
