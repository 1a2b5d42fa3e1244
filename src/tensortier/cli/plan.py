"""``tensortier plan``: where everything would go, and the same for other engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tensortier.cli import placing
from tensortier.cli.common import console, note, print_json
from tensortier.cli.deciding import make_plan
from tensortier.cli.grouped import grouped
from tensortier.cli.options import INT_MAX, RpcOption, split_servers
from tensortier.deciding import Measure, Wish
from tensortier.errors import UsageError

if TYPE_CHECKING:
    from tensortier.types import Hardware

_ELSEWHERE = "A machine that is not here"
_OUTPUT = "Output"


@grouped
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
    vram: placing.VramOption = None,
    ram: placing.RamOption = None,
    trace: placing.TraceOption = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="Plan for a machine that is not here, with this card, such as 'RTX 4060 8GB', or with 'none'. "
            "Repeat it for several; needs --ram, and --memory or --cpu-bandwidth.",
            rich_help_panel=_ELSEWHERE,
        ),
    ] = None,
    cpu_bandwidth: Annotated[
        float | None,
        typer.Option(
            "--cpu-bandwidth",
            metavar="GB/S",
            min=0.1,
            help="Of that machine's main memory.",
            rich_help_panel=_ELSEWHERE,
        ),
    ] = None,
    main_memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="NAME",
            help="That machine's main memory, such as 'DDR5-5600 x2'.",
            rich_help_panel=_ELSEWHERE,
        ),
    ] = None,
    drive: Annotated[
        str | None,
        typer.Option(
            "--drive",
            metavar="NAME",
            help="That machine's drive, such as 'NVMe PCIe 4.0 x4' or 'SATA SSD'.",
            rich_help_panel=_ELSEWHERE,
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            "--link",
            metavar="NAME",
            help="What its cards are plugged into, such as 'PCIe 4.0 x8' or 'Thunderbolt 4'.",
            rich_help_panel=_ELSEWHERE,
        ),
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(
            "--cores",
            metavar="N",
            min=1,
            max=INT_MAX,
            help="Its performance cores.",
            rich_help_panel=_ELSEWHERE,
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Also show where the time goes, the plans that lost, what would help, and what was assumed.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    levels: Annotated[
        bool,
        typer.Option(
            "--levels",
            help="Show 0, 10 ... 100 % of the model on the GPU instead: whole layers beside single tensors, with "
            "the memory and the speed of each. Without a GPU: in RAM, with the rest on the drive.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="ENGINE",
            help="Print it as another engine takes it: llama-server, llama-cli, llama-bench, ik_llama.cpp, "
            "koboldcpp, llama-cpp-python, ollama, lm-studio.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print the plan file, which 'tensortier run --plan' takes.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    *,
    computation: placing.Computation,
    rpc: RpcOption = None,
    place: placing.Place,
) -> None:
    """Show where every tensor and the KV cache would go, with the exact bytes per device and the speed, without
    loading.

    Without placement options the fastest placement for the workload is looked for. The first time, this machine
    is measured for it.
    """
    _check_outputs(json=json, target=target, explain=explain, levels=levels)
    settings, undecided = computation.settings()
    manual = place.manual()
    if levels and manual.given:
        raise UsageError(
            "--levels goes through the placements itself: leave the options of manual placement out"
        )
    from tensortier import export, planfile
    from tensortier.catalogue import parse_bytes

    if target is not None and target not in export.TARGETS:
        raise export.unknown(target)
    elsewhere = _described(
        gpu,
        ram,
        cpu_bandwidth=cpu_bandwidth,
        memory=main_memory,
        drive=drive,
        cores=cores,
        link=link,
        rpc=bool(rpc),
        no_calibrate=computation.no_calibrate,
    )
    planned = make_plan(
        Wish(
            model,
            settings,
            undecided,
            manual,
            split_servers(rpc),
            computation.asked(),
            Measure.NEVER if computation.no_calibrate else Measure.ALWAYS,
            vram=placing.sizes(vram),
            ram=None if ram is None or elsewhere is not None else parse_bytes(ram),
            elsewhere=elsewhere,
            trace=trace,
            remote=True,
        )
    )
    from tensortier.cli import show

    if levels:
        found = show.levels_of(planned)
        if not json:
            show.levels(planned, found, console())
            return
        print_json(show.levels_json(planned, found))
    elif json:
        print_json(planfile.to_dict(planned.plan))
    elif target is not None:
        print(export.render(export.export(planned.plan, planned.model, target)), end="")
    else:
        show.plan(planned, console(), explain=explain)
        return
    for warning in show.warnings(planned):
        note(f"warning: {warning}")


def _check_outputs(*, json: bool, target: str | None, explain: bool, levels: bool) -> None:
    if json and target is not None:
        raise UsageError("--json and --for are two ways to print the plan: use one of them")
    if explain and (json or target is not None):
        other = "--json holds all of that already" if json else "--for prints another engine's command"
        raise UsageError(f"--explain is for a reader, and {other}: use one of them")
    if levels and (explain or target is not None):
        raise UsageError(
            f"--levels prints a table of its own: it goes without {'--explain' if explain else '--for'}"
        )


def _described(
    gpus: Sequence[str] | None,
    ram: str | None,
    *,
    cpu_bandwidth: float | None,
    memory: str | None,
    drive: str | None,
    cores: int | None,
    link: str | None,
    rpc: bool,
    no_calibrate: bool,
) -> Hardware | None:
    """The machine that the options describe; None where they describe none."""
    from tensortier.catalogue import hypothetical, parse_bytes

    if not gpus:
        given = {"--cpu-bandwidth": cpu_bandwidth, "--memory": memory, "--drive": drive}
        given |= {"--cores": cores, "--link": link}
        lone = [option for option, value in given.items() if value is not None]
        if lone:
            raise UsageError(
                f"{' and '.join(lone)} describe{'s' if len(lone) == 1 else ''} another machine: give its --gpu too "
                "('none' if it has none)"
            )
        return None
    if ram is None:
        raise UsageError("--gpu describes another machine: say its main memory too, such as --ram 32GiB")
    if rpc:
        raise UsageError("--gpu describes another machine: --rpc cannot be asked from here")
    if no_calibrate:
        raise UsageError(
            "--gpu describes another machine, and its speeds come from the catalogue: leave --no-calibrate out"
        )
    cards = [name for name in gpus if name.strip().lower() != "none"]
    if len(cards) < len(gpus) and len(gpus) > 1:
        raise UsageError("--gpu none is for a machine without a card: give it alone")
    return hypothetical(
        cards,
        parse_bytes(ram),
        cpu_bandwidth=cpu_bandwidth,
        memory=memory,
        drive=drive,
        cores=cores,
        link=link,
    )
