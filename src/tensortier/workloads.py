"""What people do with a model, in tokens: named workloads and ``P:G:D``."""

from __future__ import annotations

from dataclasses import replace

from tensortier.errors import UsageError
from tensortier.types import Workload

# Prompt tokens computed per request, tokens generated, and tokens that are in the context already.
NAMED = {
    w.name: w
    for w in (
        Workload("chat", prompt=256, output=300, depth=2048),  # a question in a conversation of some pages
        Workload("code", prompt=2048, output=600, depth=6144),  # a change in files that were read before
        Workload("long-document", prompt=24576, output=500, depth=0),  # a report read at once
        Workload("agent", prompt=1024, output=250, depth=16384),  # one tool call late in a long session
    )
}
LONGEST = 1 << 24  # tokens of anything


def parse(text: str) -> Workload:
    """A name of ``NAMED``, or ``P:G:D``: tokens of prompt, of output, and already in the context.

    Raises:
        UsageError: neither, or numbers that cannot be.
    """
    if text in NAMED:
        return NAMED[text]
    parts = text.split(":")
    if len(parts) != 3 or not all(p.isascii() and p.isdecimal() for p in parts):
        raise UsageError(
            f"there is no workload {text!r}: one of {', '.join(NAMED)}, or PROMPT:OUTPUT:DEPTH in tokens, "
            "such as 512:256:4096"
        )
    if any(len(p) > 9 for p in parts):
        raise UsageError(f"workload {text!r}: more tokens than any context holds")
    prompt, output, depth = (int(p) for p in parts)
    if max(prompt, output, depth) > LONGEST:
        raise UsageError(f"workload {text!r}: more tokens than any context holds")
    if prompt < 1 or output < 1:
        raise UsageError(f"workload {text!r}: at least one token of prompt and one of output are needed")
    return Workload(text, prompt, output, depth)


def fitted(workload: Workload, context: int) -> Workload:
    """``workload`` made to fit in ``context`` tokens: less in the context before, and where that is not enough
    less of prompt and output in proportion."""
    if workload.context <= context:
        return workload
    asked = workload.prompt + workload.output
    if asked <= context:
        return replace(workload, depth=context - asked)
    prompt = min(max(1, context * workload.prompt // asked), max(1, context - 1))
    return replace(workload, prompt=prompt, output=max(1, context - prompt), depth=0)
