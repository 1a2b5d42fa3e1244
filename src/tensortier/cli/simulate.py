"""``tensortier simulate``: cache policies on a recorded routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensortier.cli.common import console, print_json
from tensortier.cli.options import split_list
from tensortier.errors import UsageError
from tensortier.explain import readable_size
from tensortier.types import ModelInfo, Settings

if TYPE_CHECKING:
    from tensortier.routing import Trace
    from tensortier.simulate import Outcome, Simulator
    from tensortier.slots import Layer

_SHARES = (0.25, 0.5, 0.75)
_CURVE = tuple(n / 20 for n in range(1, 21))  # of the plot
_FIGURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class _Size:
    """One column of the table."""

    places: int  # of experts that stay: the most that a policy has
    share: float  # of all experts
    nbytes: int | None  # of the experts in these places; None: the model was not given
    ram: int | None  # of the whole process; None: the size was a share
    outcomes: tuple[Outcome, ...]


def simulate(
    trace: Annotated[
        Path,
        typer.Argument(metavar="TRACE", show_default=False, help="A file that 'tensortier trace' wrote."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="The model that was recorded: sizes are told in bytes then.",
        ),
    ] = None,
    ram: Annotated[
        list[str] | None,
        typer.Option(
            "--ram",
            metavar="SIZE",
            help="Room for experts as 'tensortier trace' has it with this --ram and the default context. Repeat it, or "
            "join several by commas. Needs --model. Without it: 25, 50 and 75 % of the experts.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME",
            help="Only these: lru, global-lru, lfu, static, second-touch. Repeat it, or join several by commas.",
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            metavar="TRACE",
            help="Another trace of the model, whose frequencies 'static' goes by. Without it: those of TRACE itself, "
            "which nobody knows beforehand.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Also draw hit rates over sizes into this PNG, SVG or PDF file (needs matplotlib).",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything, each layer too, as JSON.")] = False,
) -> None:
    """Show how often each cache policy would have found experts in RAM, next to the most that any could have
    (Belady's optimum).

    The policies are the code that decides while a model runs. Several tokens computed at once, as of a prompt, count
    as one use of each expert they share.
    """
    from tensortier import routing
    from tensortier.simulate import BOUNDS, POLICIES, Simulator
    from tensortier.tier import frequencies

    chosen = split_list(policy) or POLICIES
    for name in chosen:
        if name not in POLICIES:
            raise UsageError(f"unknown policy {name!r}; one of: {', '.join(POLICIES)}")
    sizes = split_list(ram)
    if sizes and model is None:
        raise UsageError("--ram needs --model: a trace does not know how large the experts are")
    if plot is not None:
        _check_figure(plot)
    recorded = routing.read(trace)
    info = None if model is None else _model(model, recorded)
    weights = None
    if profile is not None:
        other = routing.read(profile)
        if other.model != recorded.model or other.shape != recorded.shape:
            raise UsageError(f"{profile} was recorded with another model than {trace}")
        weights = frequencies(other.records, *other.shape)
    simulator = Simulator(recorded, weights)
    wanted = (*dict.fromkeys(chosen), *BOUNDS)
    if info is not None and sizes:
        columns = _by_ram(simulator, info, sizes, wanted)
    else:
        columns = [_by_share(simulator, info, share, wanted) for share in _SHARES]
    if plot is not None:
        _draw(simulator, info, [_by_share(simulator, info, share, wanted) for share in _CURVE], plot)
    if json:
        print_json(_as_json(recorded, columns, hindsight=profile is None))
    else:
        _show(recorded, info, columns, hindsight=profile is None)


def _check_figure(path: Path) -> None:
    """Raises UsageError where no figure can be drawn to ``path``: said before the work."""
    import importlib.util

    if path.suffix.lower() not in _FIGURES:
        raise UsageError(f"--plot {path}: give a file name that ends with {', '.join(_FIGURES)}")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'tensortier[plot]'")


def _model(name: str, recorded: Trace) -> ModelInfo:
    from tensortier import gguf, library, routing

    info = gguf.read(library.find(name))
    routing.check_model(recorded, info)
    return info


def _expert_layers(info: ModelInfo) -> tuple[Layer, ...]:
    from tensortier import slots

    return slots.layers_of(info, [t for t in info.tensors if t.role.is_routed_expert])


def _by_share(simulator: Simulator, info: ModelInfo | None, share: float, wanted: Sequence[str]) -> _Size:
    from tensortier.simulate import evenly, same_room

    per_layer = evenly(simulator.trace, share)
    return _size(simulator, info, same_room(per_layer), None, wanted)


def _by_ram(
    simulator: Simulator, info: ModelInfo, sizes: Sequence[str], wanted: Sequence[str]
) -> list[_Size]:
    """At the room that processes of these sizes have for experts: policies keep more or fewer places for experts that
    only pass through, as in the store. The bounds have the places of the policy with the most."""
    from tensortier import slots, tier
    from tensortier.catalogue import parse_bytes
    from tensortier.cli.trace import experts_on_the_drive, rows_in_ram
    from tensortier.simulate import BOUNDS, POLICIES, SHARED

    asked = [parse_bytes(text) for text in sizes]
    settings = Settings()
    rows = rows_in_ram(info, settings)
    columns = []
    for ram in asked:
        plan = experts_on_the_drive(info, settings, rows, ram)
        assert plan.tier is not None
        layers = slots.layers_of(info, tier.paged_tensors(info, plan))
        room = {
            name: slots.capacities(layers, info.n_expert_used, name, plan.tier.expert_bytes)
            for name in POLICIES
        }
        room[BOUNDS[0]] = tuple(map(max, *(room[name] for name in POLICIES if name not in SHARED)))
        room[BOUNDS[1]] = (max(sum(places) for places in room.values()),)
        columns.append(_size(simulator, info, room, ram, wanted))
    return columns


def _size(
    simulator: Simulator,
    info: ModelInfo | None,
    room: dict[str, tuple[int, ...]],
    ram: int | None,
    wanted: Sequence[str],
) -> _Size:
    from tensortier.simulate import BOUNDS

    groups, experts = simulator.trace.shape
    places = sum(room[BOUNDS[1]])
    share = places / (groups * experts)
    nbytes = None if info is None else round(share * sum(layer.nbytes for layer in _expert_layers(info)))
    return _Size(places, share, nbytes, ram, simulator.run(room, wanted))


def _cycle(recorded: Trace, info: ModelInfo | None) -> str:
    """Where a plain LRU over all layers stops finding anything."""
    from tensortier.simulate import token_cycle

    places = token_cycle(recorded)
    share = recorded.used / recorded.experts
    room = (
        ""
        if info is None
        else f", {readable_size(round(share * sum(x.nbytes for x in _expert_layers(info))))}"
    )
    return (
        f"One token uses {places} experts over all layers ({share:.0%}{room}). With less room a plain LRU over all "
        "layers would find hardly any of them again; global-lru keeps what it has instead."
    )


def _show(recorded: Trace, info: ModelInfo | None, columns: Sequence[_Size], *, hindsight: bool) -> None:
    from rich.table import Table

    out = console()
    out.print(
        f"{recorded.tokens} tokens, {len(recorded.layers)} layers, {recorded.used} of {recorded.experts} experts each",
        markup=False,
    )
    table = Table(title="Experts found in RAM", title_justify="left")
    table.add_column("policy")
    for column in columns:
        table.add_column(_heading(column), justify="right", no_wrap=True)
    for i, outcome in enumerate(columns[0].outcomes):
        name = outcome.policy
        if name == "static" and hindsight:
            name += " (by this trace)"
        table.add_row(name, *(f"{column.outcomes[i].hit_rate:.1%}" for column in columns))
    out.print(table)
    out.print(_cycle(recorded, info), markup=False)


def _heading(column: _Size) -> str:
    lines = [f"{column.share:.0%} of experts" if column.ram is None else f"RAM {readable_size(column.ram)}"]
    lines.append(f"{column.places} places")
    if column.nbytes is not None:
        lines.append(readable_size(column.nbytes))
    return "\n".join(lines)


def _as_json(recorded: Trace, columns: Sequence[_Size], *, hindsight: bool) -> dict[str, Any]:
    from tensortier.simulate import token_cycle

    return {
        "tokens": recorded.tokens,
        "layers": list(recorded.layers),
        "experts": recorded.experts,
        "used": recorded.used,
        "token_cycle": token_cycle(recorded),
        "static_by_this_trace": hindsight,
        "sizes": [
            {
                "ram": column.ram,
                "places": column.places,
                "share": column.share,
                "expert_bytes": column.nbytes,
                "policies": {
                    o.policy: {
                        "hit_rate": o.hit_rate,
                        "capacity": list(o.capacity),
                        "hits": list(o.hits),
                        "uses": list(o.uses),
                    }
                    for o in column.outcomes
                },
            }
            for column in columns
        ],
    }


def _draw(simulator: Simulator, info: ModelInfo | None, points: Sequence[_Size], path: Path) -> None:
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    from tensortier.simulate import BOUNDS, token_cycle

    recorded = simulator.trace
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    shares = [100 * point.share for point in points]
    for i, outcome in enumerate(points[0].outcomes):
        rates = [100 * point.outcomes[i].hit_rate for point in points]
        (line,) = axes.plot(shares, rates, label=outcome.policy)
        if outcome.policy in BOUNDS:
            line.set(color="black", linestyle="--" if outcome.policy == BOUNDS[0] else "-")
    cycle = 100 * token_cycle(recorded) / (len(recorded.layers) * recorded.experts)
    axes.axvline(cycle, color="grey", linestyle=":", label="experts of one token")
    axes.set_xlabel("experts that stay in RAM, % of all")
    axes.set_ylabel("found there, % of uses")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    name = "" if info is None else f"{info.name}: "
    axes.set_title(
        f"{name}{recorded.tokens} tokens, {len(recorded.layers)} layers of {recorded.experts} experts"
    )
    axes.legend()
    figure.savefig(path, dpi=150)
