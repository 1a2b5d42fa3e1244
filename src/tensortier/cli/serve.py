"""``tensortier serve``: OpenAI's interface and the page, over HTTP."""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tensortier.cli import placing
from tensortier.cli.common import is_verbose, note, set_verbose
from tensortier.cli.deciding import measured, warn
from tensortier.cli.grouped import grouped
from tensortier.cli.options import INT_MAX, RpcOption, split_servers
from tensortier.cli.session import read_plan
from tensortier.deciding import Measure, Wish
from tensortier.errors import UsageError
from tensortier.types import Plan

if TYPE_CHECKING:
    from tensortier.library import LibraryModel
    from tensortier.server.limits import Settings as Limits

_SERVER = "Server"
_MODELS = "Models"
_PARALLEL, _QUEUE, _SECONDS = 4, 64, 30.0  # those of server.limits.Settings, which is not imported for --help
_MOST_PARALLEL = 256  # llama.cpp's limit


@grouped
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default="smollm2, or the first that 'tensortier models' lists",
            help="The model to begin with: a GGUF file (of a split one the first) or a name from 'tensortier models'. "
            "Requests may name any other that is listed there.",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            help="Address to listen on. Any but this machine's own (loopback) needs --api-key.",
            rich_help_panel=_SERVER,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            "--port",
            metavar="N",
            min=0,
            max=65535,
            help="Port to listen on; 0: any that is free.",
            rich_help_panel=_SERVER,
        ),
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="TENSORTIER_API_KEY",
            help="Requests have to carry this key. Others on this machine can see it on a command line, not in the "
            "environment.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            metavar="ORIGIN",
            help="Pages from there may use the server too, such as https://chat.example.org; '*': all. Repeatable.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    parallel: Annotated[
        int,
        typer.Option(
            "--parallel",
            "-np",
            metavar="N",
            min=1,
            max=_MOST_PARALLEL,
            help="Answers of one model that are computed at a time. They share its context.",
            rich_help_panel=_SERVER,
        ),
    ] = _PARALLEL,
    queue: Annotated[
        int,
        typer.Option(
            "--queue",
            metavar="N",
            min=0,
            max=INT_MAX,
            help="Answers that may wait for this; beyond, requests are refused with status 503.",
            rich_help_panel=_SERVER,
        ),
    ] = _QUEUE,
    request_timeout: Annotated[
        float,
        typer.Option(
            "--request-timeout",
            metavar="SECONDS",
            min=0.1,
            help="A request has to arrive within this time.",
            rich_help_panel=_SERVER,
        ),
    ] = _SECONDS,
    models_max: Annotated[
        int,
        typer.Option(
            "--models-max",
            metavar="N",
            min=1,
            max=INT_MAX,
            help="Models that may be loaded at a time, where they fit in memory together.",
            rich_help_panel=_MODELS,
        ),
    ] = 4,
    idle: Annotated[
        float,
        typer.Option(
            "--idle",
            metavar="MINUTES",
            min=0,
            help="A model that nobody has used for so long is unloaded; 0: none is.",
            rich_help_panel=_MODELS,
        ),
    ] = 30.0,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show llama.cpp's log on standard error.")
    ] = False,
    *,
    computation: placing.Computation,
    vram: placing.VramOption = None,
    ram: placing.RamOption = None,
    rpc: RpcOption = None,
    # where everything goes
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="Begin with this plan, which 'tensortier plan --json' wrote, and its model, or MODEL where that has "
            "moved; not together with other options of placement or computation.",
        ),
    ] = None,
    place: placing.Place,
) -> None:
    """Serve models to OpenAI's clients, and a page to choose, place and chat with them.

    Listens on this machine only, if not told otherwise. Without placement options each model goes where 'tensortier
    plan' shows it, beside those that are loaded already. Ends after SIGINT (Ctrl-C) or SIGTERM, once the answers under
    way are complete, or ten seconds later.
    """
    from tensortier.catalogue import parse_bytes

    set_verbose(verbose or is_verbose())
    settings, undecided = computation.settings()
    manual = place.manual()
    servers = split_servers(rpc)
    given = None if plan is None else read_plan(plan)
    if given is not None:
        stated = computation.given or (vram, ram) != (None, None)
        if manual.given or servers or stated:
            raise UsageError("--plan says the placement and the settings: give it alone, or with the model")
        model = given.model if model is None else model
    asked = computation.asked()
    wish = Wish(
        "",  # each model in turn
        settings,
        undecided,
        manual,
        servers,
        asked,
        Measure.NEVER if computation.no_calibrate else Measure.IF_IT_DECIDES,
        placing.sizes(vram),
        None if ram is None else parse_bytes(ram),
    )
    from tensortier.server.limits import Settings as Limits

    limits = Limits(
        parallel=parallel,
        queue=queue,
        api_key=_checked_key(api_key),
        origins=tuple(_checked_origin(origin) for origin in allow_origin or ()),
        request_seconds=request_timeout,
    )
    idle_seconds = idle * 60 if idle else None
    _serve(model, given, wish, limits, host, port, models_max, idle_seconds, verbose=verbose)


def _serve(
    name: str | None,
    given: Plan | None,
    wish: Wish,
    limits: Limits,
    address: str,
    port: int,
    models_max: int,
    idle_seconds: float | None,
    *,
    verbose: bool,
) -> None:
    from dataclasses import replace

    from tensortier import deciding, downloads, hardware
    from tensortier.server import guard, listen
    from tensortier.server.app import make_app
    from tensortier.server.host import ModelHost
    from tensortier.server.loading import make_engine
    from tensortier.server.planning import Planner
    from tensortier.turn import Turn

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="tensortier: warning: %(message)s")
    with listen.bind(address, port) as bound:
        if listen.is_loopback(bound):
            limits = replace(limits, hosts=guard.hosts_of(address, limits.origins))
        elif limits.api_key is None:
            raise UsageError(
                f"--host {address} lets other machines in: give an --api-key that they have to know"
            )
        served = _served(name)
        if given is not None and served is not None:
            given = deciding.given_plan(given, served.path)
            given = replace(given, settings=replace(given.settings, n_seq_max=limits.parallel))
        machine = hardware.probe(None if served is None else served.path, rpc=wish.rpc)
        wish = replace(wish, settings=replace(wish.settings, n_seq_max=limits.parallel))
        models = ModelHost(
            Planner(wish, machine, functools.partial(measured, bar=False), warn),
            served,
            given=given,
            parallel=limits.parallel,
            models_max=models_max,
            idle_seconds=idle_seconds,
            engine=functools.partial(make_engine, verbose=verbose),
            turn=Turn,
        )
        app = make_app(models, limits, wish, machine, downloads.Manager())
        what = "no model yet" if served is None else served.name
        url = listen.url_of(bound)
        listen.serve(
            app, models, limits, bound, lambda: note(f"tensortier: serving {what} at {url} (Ctrl-C ends it)")
        )


def _served(name: str | None) -> LibraryModel | None:
    """The model to begin with; None where none was asked for and there is none. Raises ModelNotFound."""
    from tensortier import library
    from tensortier.server.names import served_model

    if name is not None:
        return served_model(name)
    found = [model for model in library.list_models() if not model.error]
    return next((model for model in found if model.name == library.EMBEDDED), found[0] if found else None)


def _checked_key(key: str | None) -> str | None:
    if key is None:
        return None
    if not key.strip() or not key.isascii() or not key.isprintable():
        raise UsageError("an API key is some printable ASCII characters")
    return key.strip()


def _checked_origin(text: str) -> str:
    """As browsers write it: scheme, host and port, nothing after."""
    from urllib.parse import urlsplit

    if text == "*":
        return text
    parts = urlsplit(text)
    if not parts.scheme or not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise UsageError(f"--allow-origin {text!r} is no origin: it looks like https://chat.example.org")
    return f"{parts.scheme}://{parts.netloc}".lower()
