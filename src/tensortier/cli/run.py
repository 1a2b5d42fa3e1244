"""``tensortier run``: chat in the terminal, or one prompt and its answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensortier.cli.common import is_verbose, set_verbose
from tensortier.cli.options import (
    INT_MAX,
    MAX_CONTEXT,
    MAX_THREADS,
    CacheType,
    FlashAttention,
    LoadMode,
    RpcOption,
    choices,
    device_list,
    gpu_layers,
    split_servers,
    tensor_split,
)
from tensortier.cli.options import sampling as checked_sampling
from tensortier.cli.options import settings as checked_settings
from tensortier.cli.session import Manual, Request, argument_text, read_grammar, read_prompt, run_session
from tensortier.errors import UsageError
from tensortier.types import Sampling, Settings

DEFAULT_MODEL = "smollm2"
_SAMPLING = Sampling()
_SETTINGS = Settings()
_TYPE_K = CacheType(_SETTINGS.type_k)
_TYPE_V = CacheType(_SETTINGS.type_v)
_FLASH = FlashAttention(_SETTINGS.flash_attention)
_LOAD_MODE = LoadMode(_SETTINGS.load_mode)
_PROMPT = "Prompt and output"
_CHOICE = "Sampling"
_CONTEXT = "Context and computation"
_PLACE = "Manual placement (any of these replaces the automatic plan)"


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF file (of a split one the first) or a name from 'tensortier models'.",
        ),
    ] = DEFAULT_MODEL,
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
            help="Print only one object at the end on standard output: text, speeds, bytes per device.",
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
    # how the context is made and computed
    context: Annotated[
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
    ] = _SETTINGS.n_ctx,
    batch: Annotated[
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
    ] = None,
    ubatch: Annotated[
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
    ] = None,
    cache_type_k: Annotated[
        CacheType,
        typer.Option(
            "--cache-type-k",
            "-ctk",
            metavar="TYPE",
            help=f"Type of the K cache: {choices(CacheType)}.",
            rich_help_panel=_CONTEXT,
        ),
    ] = _TYPE_K,
    cache_type_v: Annotated[
        CacheType,
        typer.Option(
            "--cache-type-v",
            "-ctv",
            metavar="TYPE",
            help="Type of the V cache, one of the same.",
            rich_help_panel=_CONTEXT,
        ),
    ] = _TYPE_V,
    flash_attention: Annotated[
        FlashAttention,
        typer.Option(
            "--flash-attention",
            "-fa",
            metavar="WHEN",
            help=f"Flash attention: {choices(FlashAttention)}.",
            rich_help_panel=_CONTEXT,
        ),
    ] = _FLASH,
    threads: Annotated[
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
    ] = _SETTINGS.threads,
    threads_batch: Annotated[
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
    ] = _SETTINGS.threads_batch,
    load_mode: Annotated[
        LoadMode,
        typer.Option(
            "--load-mode",
            metavar="MODE",
            help=f"How weights get from the file into memory: {choices(LoadMode)}.",
            rich_help_panel=_CONTEXT,
        ),
    ] = _LOAD_MODE,
    no_repack: Annotated[
        bool,
        typer.Option(
            "--no-repack",
            help="Leave weights on the CPU in the file's order instead of the faster one.",
            rich_help_panel=_CONTEXT,
        ),
    ] = not _SETTINGS.repack,
    no_op_offload: Annotated[
        bool,
        typer.Option(
            "--no-op-offload",
            help="Do not send large batches to the GPU for weights that are in RAM.",
            rich_help_panel=_CONTEXT,
        ),
    ] = not _SETTINGS.op_offload,
    rpc: RpcOption = None,
    # where everything goes
    n_gpu_layers: Annotated[
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
    ] = None,
    override_tensor: Annotated[
        list[str] | None,
        typer.Option(
            "--override-tensor",
            "-ot",
            metavar="REGEX=DEVICE",
            help="Put the weights whose name the pattern finds on a device; the first match wins. "
            "Repeat it, or join several by commas.",
            rich_help_panel=_PLACE,
        ),
    ] = None,
    cpu_moe: Annotated[
        bool,
        typer.Option(
            "--cpu-moe", "-cmoe", help="Keep all expert weights on the CPU.", rich_help_panel=_PLACE
        ),
    ] = False,
    n_cpu_moe: Annotated[
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
    ] = None,
    n_cpu_ffn: Annotated[
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
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--tensor-split",
            "-ts",
            metavar="N,N...",
            help="Shares of the offloaded layers per device, such as 3,1.",
            rich_help_panel=_PLACE,
        ),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            "-dev",
            metavar="LIST",
            help="Devices to offload to, in order, joined by commas; 'none': the CPU only.",
            rich_help_panel=_PLACE,
        ),
    ] = None,
    no_kv_offload: Annotated[
        bool,
        typer.Option("--no-kv-offload", "-nkvo", help="Keep the KV cache in RAM.", rich_help_panel=_PLACE),
    ] = False,
) -> None:
    """Chat with a model in the terminal, or answer one prompt (-p, -f or piped data) and leave.

    Without placement options everything goes on the GPU if it fits, else attention and the KV cache first.
    The answer goes to standard output, everything else to standard error.
    """
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
    settings = checked_settings(
        Settings(
            n_ctx=context,
            type_k=cache_type_k.value,
            type_v=cache_type_v.value,
            flash_attention=flash_attention.value,
            threads=threads,
            threads_batch=threads_batch,
            load_mode=load_mode.value,
            repack=not no_repack,
            op_offload=not no_op_offload,
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
    servers = split_servers(rpc)
    question = read_prompt(None if prompt is None else argument_text(prompt, "--prompt"), file)
    if question is None and (json or raw):
        raise UsageError(f"{'--json' if json else '--raw'} needs a prompt: give -p, -f or pipe one in")
    if raw and system:
        raise UsageError("--raw has no place for a system prompt: put it at the start of the prompt")
    run_session(
        Request(
            model=model,
            prompt=question,
            system=None if system is None else argument_text(system, "--system"),
            raw=raw,
            json=json,
            verbose=verbose,
            quiet=quiet,
            sampling=sampling,
            settings=settings,
            manual=manual,
            rpc=servers,
        )
    )
