"""``tensortier trace``: which experts a mixture uses, recorded while it runs."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tensortier.cli import options, placing
from tensortier.cli.answer import stream_answer
from tensortier.cli.common import note, print_json, progress_bar
from tensortier.cli.turn import loading_turn
from tensortier.cli.worker import EXIT_INTERRUPTED, EngineThread
from tensortier.errors import Cancelled, UsageError
from tensortier.explain import readable_size
from tensortier.types import DeviceMemory, ModelInfo, Plan, Sampling, Settings

if TYPE_CHECKING:
    from tensortier.engine import Engine, Request
    from tensortier.routing import Trace

_SETTINGS = Settings()
_TOKENS = 256
_SEED = 1  # the same command records the same routing


@dataclass(frozen=True)
class _Recorded:
    """What the command tells of its work."""

    file: str
    file_bytes: int
    tokens: int
    layers: int  # with experts
    experts: int
    used: int
    prompt_tokens: int
    answer_tokens: int


def trace(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="A mixture of experts: a GGUF file (of a split one the first) or a name from 'tensortier models'.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="TRACE", show_default=False, help="The file to write."),
    ],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="What the model is asked."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="Read the prompt from this file instead of -p."),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Continue the prompt as it is, without the model's chat template."),
    ] = False,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens",
            "-n",
            metavar="TOKENS",
            min=1,
            max=options.INT_MAX,
            help="Tokens to generate, unless the model stops before.",
        ),
    ] = _TOKENS,
    ram: placing.RamOption = None,
    context: Annotated[
        int,
        typer.Option(
            "--context",
            "-c",
            metavar="N",
            min=0,
            max=options.MAX_CONTEXT,
            help="Tokens that the model can see, answer included; 0: what it was trained for.",
        ),
    ] = _SETTINGS.n_ctx,
    ubatch: Annotated[
        int,
        typer.Option(
            "--ubatch",
            "-ub",
            metavar="N",
            min=1,
            max=options.MAX_CONTEXT,
            help="Prompt tokens computed at once, which share the experts that are read for them. With 1 a prompt is "
            "recorded as if it had been generated.",
        ),
    ] = _SETTINGS.n_ubatch,
    threads: placing.ThreadsOption = _SETTINGS.threads,
    force: Annotated[bool, typer.Option("--force", help="Replace TRACE if it is there.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Nothing on standard error but warnings and errors.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was recorded as JSON.")] = False,
) -> None:
    """Run a mixture of experts and record which experts each token uses, for 'tensortier simulate'.

    The experts are read from the drive and stay in RAM, all of them where they fit. What the model answers is not
    shown.
    """
    from tensortier import gguf, library
    from tensortier.cli.session import argument_text, read_prompt

    question = read_prompt(None if prompt is None else argument_text(prompt, "--prompt"), file)
    if question is None:
        raise UsageError("nothing to record: give a prompt with -p or -f, or pipe one in")
    _check_target(output, force)
    info = gguf.read(library.find(model))
    if not any(t.role.is_routed_expert for t in info.tensors):
        raise UsageError(f"{model} has no routed experts: there is no routing to record")
    settings = options.settings(replace(_SETTINGS, n_ctx=context, threads=threads), batch=None, ubatch=ubatch)
    sampling = Sampling(max_tokens=max_tokens, seed=_SEED)
    worker = EngineThread()
    try:
        with ExitStack() as stack:
            with loading_turn(quiet=quiet):
                plan = _plan(info, settings, ram)
                engine = stack.enter_context(_loaded(plan, worker, quiet=quiet))
            records = stack.enter_context(_records_beside(output))
            if not quiet:
                note("recording ...")
            prompt_tokens, answer_tokens = _record(
                engine, worker, _request(engine, question, sampling, raw=raw), records
            )
            found = _published(engine, info, records, output, force=force)
    finally:
        worker.close()
    recorded = _Recorded(
        str(output),
        output.stat().st_size,
        found.tokens,
        len(found.layers),
        found.experts,
        found.used,
        prompt_tokens,
        answer_tokens,
    )
    if json:
        print_json(asdict(recorded))
    else:
        print(
            f"{recorded.tokens} tokens ({prompt_tokens} of the prompt), {recorded.layers} layers, {recorded.used} of "
            f"{recorded.experts} experts each: {readable_size(recorded.file_bytes)} in {recorded.file}"
        )


def _check_target(output: Path, force: bool) -> None:
    """Raises UsageError where the trace cannot go there: said before the model is loaded."""
    if output.is_dir():
        raise UsageError(f"{output} is a folder: give a file")
    if output.exists() and not force:
        raise UsageError(f"{output} is there already: --force replaces it")
    if not output.parent.is_dir():
        raise UsageError(f"there is no folder {output.parent}")


def _plan(model: ModelInfo, settings: Settings, ram: str | None) -> Plan:
    from tensortier import hardware
    from tensortier.catalogue import parse_bytes
    from tensortier.deciding import within_budget

    machine = hardware.probe(model.path)
    settings = replace(
        settings, threads=settings.threads or max(1, min(machine.performance_cores, machine.usable_cpus))
    )
    available = within_budget(machine, (), None if ram is None else parse_bytes(ram)).ram_available
    return experts_on_the_drive(model, settings, rows_in_ram(model, settings), available)


def rows_in_ram(model: ModelInfo, settings: Settings) -> tuple[DeviceMemory, ...]:
    """What the whole model takes in RAM. Raises as ``memory.predict``."""
    from tensortier import memory

    return memory.predict(Plan(model.path, settings=settings))


def experts_on_the_drive(
    model: ModelInfo, settings: Settings, rows: Sequence[DeviceMemory], ram: int
) -> Plan:
    """The plan that leaves all experts on the drive, with as much room for them as a process of ``ram`` bytes has.

    Raises:
        UsageError: that is too little for what is not on the drive.
    """
    from tensortier import budget, paging

    start = Plan(model.path, settings=replace(settings, load_mode="none"))
    process = budget.process_bytes(model, settings)
    spread = paging.OnDrive(model, start, rows, {})
    plan = spread.within(ram - process)
    if plan is None or plan.tier is None:
        told = (
            f"{readable_size(ram)} of RAM are too little for this model, even with its experts on the drive"
        )
        if spread.least is not None:
            told += (
                f": it takes {readable_size(spread.least + process)} with a context of "
                f"{settings.n_ctx or model.context_length} tokens and micro-batches of {settings.n_ubatch}"
            )
        raise UsageError(told)
    return plan


@contextmanager
def _loaded(plan: Plan, worker: EngineThread, *, quiet: bool) -> Iterator[Engine]:
    cancel = threading.Event()

    def make() -> Engine:
        from tensortier.engine import Engine

        return Engine(plan, progress=progress, cancel=cancel)

    with progress_bar(sys.stderr.isatty() and not quiet, "loading") as progress:
        engine = worker.call(make, cancel.set)
    try:
        if cancel.is_set():  # too late for the engine to see
            raise Cancelled("loading was cancelled")
        yield engine
    finally:
        worker.call(engine.close, lambda: None)


@contextmanager
def _records_beside(output: Path) -> Iterator[Path]:
    """Where the routing is recorded: on the drive of ``output``, as RAM is full on purpose, and in a file without a
    name, of which nothing stays however this process ends. On systems without such files it is in a hidden folder,
    which stays where the process is killed."""
    with tempfile.TemporaryFile(dir=output.parent) as file:
        path = Path(f"/dev/fd/{file.fileno()}")
        if path.exists():
            try:
                yield path
            except UsageError as exc:  # such as a drive that is full
                told = str(exc).replace(str(path), f"what is recorded beside {output}")
                raise UsageError(told) from exc
            return
    with tempfile.TemporaryDirectory(prefix=".tensortier-trace-", dir=output.parent) as folder:
        yield Path(folder) / "records"


def _request(engine: Engine, question: str, sampling: Sampling, *, raw: bool) -> Callable[[], Request]:
    if raw:
        return lambda: engine.complete(question, sampling)
    return lambda: engine.chat([{"role": "user", "content": question}], sampling)


def _record(
    engine: Engine, worker: EngineThread, request: Callable[[], Request], records: Path
) -> tuple[int, int]:
    """Tokens of the prompt and of the answer; their routing is in ``records`` then."""
    paged = engine.paged
    assert paged is not None  # the plan has experts on the drive
    worker.call(lambda: paged.trace(records), lambda: None)
    try:
        answer = stream_answer(worker, request, show=False)
    finally:
        worker.call(lambda: paged.trace(None), lambda: None)
    if answer.cancelled:
        note("tensortier: interrupted")
        raise typer.Exit(EXIT_INTERRUPTED)
    return answer.stats.prompt_tokens, answer.stats.completion_tokens


def _published(engine: Engine, model: ModelInfo, records: Path, output: Path, *, force: bool) -> Trace:
    from tensortier import routing, slots, tier

    layers = slots.layers_of(model, tier.paged_tensors(model, engine.plan))
    _check_target(output, force)  # again: the model ran for a while
    experts = max(layer.experts for layer in layers)
    return routing.publish(
        records, output, model, tuple(layer.number for layer in layers), experts, model.n_expert_used
    )
