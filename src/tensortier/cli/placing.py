"""Options of context, computation and placement that ``run`` and ``plan`` share, and what they mean together."""

from __future__ import annotations

from dataclasses import dataclass
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
    device_list,
    gpu_layers,
    split_list,
    tensor_split,
)
from tensortier.cli.options import settings as batches
from tensortier.deciding import Manual, Undecided
from tensortier.errors import UsageError
from tensortier.types import Settings

if TYPE_CHECKING:
    from tensortier.types import Workload

_SETTINGS = Settings()
_FLASH = FlashAttention(_SETTINGS.flash_attention)
_LOAD_MODE = LoadMode(_SETTINGS.load_mode)
_PLAIN = (CacheType.F32, CacheType.F16, CacheType.BF16)
_CONTEXT = "Context and computation"
BUDGET = "Budget"
_PLACE = "Manual placement (any of these replaces the automatic plan)"

WorkloadOption = Annotated[
    str | None,
    typer.Option(
        "--workload",
        "-w",
        metavar="NAME|P:G:D",
        help="What the model is asked to do, which decides what is fastest: chat, code, long-document, agent, or "
        "tokens of prompt, of answer, and in the context before, such as 512:256:4096. Without it: chat.",
        rich_help_panel=_CONTEXT,
    ),
]
NoCalibrateOption = Annotated[
    bool,
    typer.Option(
        "--no-calibrate",
        help="Do not measure this machine where no measurement is kept: no speeds are predicted then.",
        rich_help_panel=_CONTEXT,
    ),
]
VramOption = Annotated[
    str | None,
    typer.Option(
        "--vram",
        metavar="SIZE",
        help="Use no more than this of each GPU, such as 8GiB; several sizes joined by commas: one per GPU.",
        rich_help_panel=BUDGET,
    ),
]
RamOption = Annotated[
    str | None,
    typer.Option(
        "--ram",
        metavar="SIZE",
        help="Use no more than this of main memory; weights beyond it are read from the drive as they are needed.",
        rich_help_panel=BUDGET,
    ),
]
TraceOption = Annotated[
    str | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="What 'tensortier trace' recorded of this model: how often experts will be found in RAM, and which policy "
        "is best, is taken from it where they are on the drive. Without it: even use, the worst case.",
        rich_help_panel=BUDGET,
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        "-c",
        metavar="N",
        min=0,
        max=MAX_CONTEXT,
        help="Tokens that the model can see, answer included; 0: what it was trained for. Without it: what the "
        f"workload needs, at least {_SETTINGS.n_ctx} where the model was trained for as many.",
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
        help=f"Prompt tokens computed at once. Without it: {_SETTINGS.n_ubatch}, at most --batch, or more where that "
        "is faster.",
        rich_help_panel=_CONTEXT,
    ),
]
CacheTypeKOption = Annotated[
    CacheType | None,
    typer.Option(
        "--cache-type-k",
        "-ctk",
        metavar="TYPE",
        help=f"Type of the K cache: {choices(CacheType)}. Without this and the next: {_SETTINGS.type_k}, or q8_0 "
        "where that is clearly faster.",
        rich_help_panel=_CONTEXT,
    ),
]
CacheTypeVOption = Annotated[
    CacheType | None,
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
        help="Leave weights on the CPU in the file's order. Without it: reordered for other kernels, unless those are "
        "slower for the workload.",
        rich_help_panel=_CONTEXT,
    ),
]
NoOpOffloadOption = Annotated[
    bool,
    typer.Option(
        "--no-op-offload",
        help="Do not send large batches to the GPU for weights that are in RAM. Without it: where that is faster.",
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


@dataclass(frozen=True)
class Computation:
    """Options of the context and how it is computed."""

    workload: WorkloadOption = None
    no_calibrate: NoCalibrateOption = False
    context: ContextOption = None
    batch: BatchOption = None
    ubatch: UbatchOption = None
    cache_type_k: CacheTypeKOption = None
    cache_type_v: CacheTypeVOption = None
    flash_attention: FlashOption = _FLASH
    threads: ThreadsOption = _SETTINGS.threads
    threads_batch: ThreadsBatchOption = _SETTINGS.threads_batch
    load_mode: LoadModeOption = _LOAD_MODE
    no_repack: NoRepackOption = not _SETTINGS.repack
    no_op_offload: NoOpOffloadOption = not _SETTINGS.op_offload

    @property
    def given(self) -> bool:
        return self != Computation()

    def asked(self) -> Workload | None:
        """What the model is asked to do, None where that is not said. Raises UsageError."""
        from tensortier import workloads

        return None if self.workload is None else workloads.parse(self.workload)

    def settings(self) -> tuple[Settings, Undecided]:
        """The options as settings, with the defaults for what was not given, and what that was.

        Raises:
            UsageError: batch sizes that contradict each other, or a V cache that llama.cpp would refuse.
        """
        type_k, type_v, flash = self.cache_type_k, self.cache_type_v, self.flash_attention
        if flash is FlashAttention.OFF and type_v not in (None, *_PLAIN):
            raise UsageError(f"-ctv {type_v} needs flash attention, which -fa off switches off")
        settings = Settings(
            n_ctx=_SETTINGS.n_ctx if self.context is None else self.context,
            type_k=_SETTINGS.type_k if type_k is None else type_k.value,
            type_v=_SETTINGS.type_v if type_v is None else type_v.value,
            flash_attention=flash.value,
            threads=self.threads,
            threads_batch=self.threads_batch,
            load_mode=self.load_mode.value,
            repack=not self.no_repack,
            op_offload=not self.no_op_offload,
        )
        undecided = Undecided(
            context=self.context is None,
            # without flash attention llama.cpp takes no quantized V cache
            kv_type=type_k is None and type_v is None and flash is not FlashAttention.OFF,
            ubatch=self.batch is None and self.ubatch is None,
            op_offload=not self.no_op_offload,
            repack=not self.no_repack,
        )
        return batches(settings, batch=self.batch, ubatch=self.ubatch), undecided


@dataclass(frozen=True)
class Place:
    """Options of manual placement."""

    n_gpu_layers: GpuLayersOption = None
    override_tensor: OverrideOption = None
    cpu_moe: CpuMoeOption = False
    n_cpu_moe: NCpuMoeOption = None
    n_cpu_ffn: NCpuFfnOption = None
    split: SplitOption = None
    device: DeviceOption = None
    no_kv_offload: NoKvOffloadOption = False

    def manual(self) -> Manual:
        """Raises UsageError where a value is none."""
        return Manual(
            n_gpu_layers=gpu_layers(self.n_gpu_layers),
            override_tensors=tuple(self.override_tensor or ()),
            cpu_moe=self.cpu_moe,
            n_cpu_moe=self.n_cpu_moe,
            n_cpu_ffn=self.n_cpu_ffn,
            tensor_split=tensor_split(self.split),
            devices=device_list(self.device),
            kv_on_device=not self.no_kv_offload,
        )


def sizes(vram: str | None) -> tuple[int, ...]:
    """Bytes of ``--vram``. Raises UsageError."""
    from tensortier.catalogue import parse_bytes

    if vram is None:
        return ()
    found = tuple(parse_bytes(size) for size in split_list([vram]))
    if not found:
        raise UsageError("--vram needs a size, such as 8GiB")
    return found
