"""``tensortier run``: chat in the terminal, or one prompt and its answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensortier.cli import placing
from tensortier.cli.common import is_verbose, set_verbose
from tensortier.cli.grouped import grouped
from tensortier.cli.options import INT_MAX, RpcOption, split_servers
from tensortier.cli.options import sampling as checked_sampling
from tensortier.cli.session import (
    Request,
    argument_text,
    read_grammar,
    read_plan,
    read_prompt,
    run_session,
)
from tensortier.deciding import Measure, Wish
from tensortier.errors import UsageError
from tensortier.types import Sampling

DEFAULT_MODEL = "smollm2"
_SAMPLING = Sampling()
_PROMPT = "Prompt and output"
_CHOICE = "Sampling"


@grouped
def run(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default=DEFAULT_MODEL,
            help="A GGUF file (of a split one the first) or a name from 'tensortier models'.",
        ),
    ] = None,
    # what is asked, and how the answer is shown
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Answer this and leave. Data piped to standard input is read to its end and added after a "
            "blank line. Without it, piped data is the prompt, and a terminal starts a chat.",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            help="Read the prompt from this file instead of -p.",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", "-s", "-sys", metavar="TEXT", help="System prompt.", rich_help_panel=_PROMPT
        ),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            help="Continue the prompt as it is, without the model's chat template.",
            rich_help_panel=_PROMPT,
        ),
    ] = False,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print only one object at the end on standard output: text, speeds, bytes per device, what was read "
            "from the drive (with --verbose also of each layer).",
            rich_help_panel=_PROMPT,
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Show llama.cpp's log on standard error.", rich_help_panel=_PROMPT
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="Nothing on standard error but warnings and errors.",
            rich_help_panel=_PROMPT,
        ),
    ] = False,
    # how the next token is chosen
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens",
            "-n",
            metavar="N",
            min=-1,
            max=INT_MAX,
            help="Length of an answer in tokens; -1: until the model stops or the context is full.",
            rich_help_panel=_CHOICE,
        ),
    ] = _SAMPLING.max_tokens,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            "--temp",
            metavar="T",
            min=0.0,
            help="Randomness; 0 always takes the likeliest token.",
            rich_help_panel=_CHOICE,
        ),
    ] = _SAMPLING.temperature,
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k",
            metavar="N",
            min=0,
            max=INT_MAX,
            help="Choose among the N likeliest tokens; 0: all.",
            rich_help_panel=_CHOICE,
        ),
    ] = _SAMPLING.top_k,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            metavar="P",
            min=0.0,
            max=1.0,
            help="Choose among the likeliest tokens that together have probability P; 1: all.",
            rich_help_panel=_CHOICE,
        ),
    ] = _SAMPLING.top_p,
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p",
            metavar="P",
            min=0.0,
            max=1.0,
            help="Leave out tokens less likely than P times the likeliest; 0: none.",
            rich_help_panel=_CHOICE,
        ),
    ] = _SAMPLING.min_p,
    repeat_penalty: Annotated[
        float,
        typer.Option(
            "--repeat-penalty",
            metavar="X",
            help="Divide the score of tokens that came before by X; 1: off.",
            rich_help_panel=_CHOICE,
        ),
    ] = _SAMPLING.repeat_penalty,
    frequency_penalty: Annotated[
        float,
        typer.Option(
            "--frequency-penalty",
            metavar="X",
            min=-2.0,
            max=2.0,
            help="Subtract X from a token's score each time it came before.",
            rich_help_panel=_CHOICE,
        ),
    ] = _SAMPLING.frequency_penalty,
    presence_penalty: Annotated[
        float,
        typer.Option(
            "--presence-penalty",
            metavar="X",
            min=-2.0,
            max=2.0,
            help="Subtract X once from the score of a token that came before.",
            rich_help_panel=_CHOICE,
        ),
    ] = _SAMPLING.presence_penalty,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            max=2**32 - 2,  # 2**32 - 1 is llama.cpp's LLAMA_DEFAULT_SEED: take a random one
            help="Make sampling repeatable. Without it every run differs.",
            rich_help_panel=_CHOICE,
        ),
    ] = _SAMPLING.seed,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            metavar="TEXT",
            help="End the answer before this text. Repeatable.",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(
            "--grammar",
            metavar="FILE",
            help="Allow only text that this GBNF grammar describes.",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    *,
    computation: placing.Computation,
    vram: placing.VramOption = None,
    ram: placing.RamOption = None,
    trace: placing.TraceOption = None,
    rpc: RpcOption = None,
    # where everything goes
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="Run this plan, which 'tensortier plan --json' wrote, with its model, or with MODEL where that has "
            "moved; not together with other options of placement or computation.",
        ),
    ] = None,
    place: placing.Place,
) -> None:
    """Chat with a model in the terminal, or answer one prompt (-p, -f or piped data) and leave.

    Without placement options the fastest placement for the workload is looked for, as 'tensortier plan' shows it.
    The answer goes to standard output, everything else to standard error.
    """
    from tensortier.catalogue import parse_bytes

    set_verbose(verbose or is_verbose())
    if verbose and quiet:
        raise UsageError("--verbose and --quiet exclude each other")
    sampling = checked_sampling(
        Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            seed=seed,
            max_tokens=max_tokens,
            stop=tuple(argument_text(text, "--stop") for text in stop or ()),
            grammar=None if grammar is None else read_grammar(grammar),
        )
    )
    settings, undecided = computation.settings()
    manual = place.manual()
    servers = split_servers(rpc)
    given = None if plan is None else read_plan(plan)
    if given is not None:
        stated = computation.given or (vram, ram, trace) != (None, None, None)
        if manual.given or servers or stated:
            raise UsageError("--plan says the placement and the settings: give it alone, or with the model")
        model = given.model if model is None else model
    asked = computation.asked()
    question = read_prompt(None if prompt is None else argument_text(prompt, "--prompt"), file)
    if question is None and (json or raw):
        raise UsageError(f"{'--json' if json else '--raw'} needs a prompt: give -p, -f or pipe one in")
    if raw and system:
        raise UsageError("--raw has no place for a system prompt: put it at the start of the prompt")
    run_session(
        Request(
            wish=Wish(
                DEFAULT_MODEL if model is None else model,
                settings,
                undecided,
                manual,
                servers,
                asked,
                Measure.NEVER if computation.no_calibrate else Measure.IF_IT_DECIDES,
                placing.sizes(vram),
                None if ram is None else parse_bytes(ram),
                trace=trace,
            ),
            prompt=question,
            system=None if system is None else argument_text(system, "--system"),
            raw=raw,
            json=json,
            verbose=verbose,
            quiet=quiet,
            sampling=sampling,
            plan=given,
        )
    )
