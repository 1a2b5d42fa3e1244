"""From an engine's pieces to the terminal: streaming, the line of speeds, the JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tensortier import explain
from tensortier.cli.common import note
from tensortier.cli.worker import EngineThread
from tensortier.errors import Cancelled
from tensortier.explain import readable_size
from tensortier.types import GenerationStats, Plan, TierStats

if TYPE_CHECKING:
    from tensortier.engine import Engine, Request

CANCELLED = "cancelled"  # the finish_reason of an answer that Ctrl-C ended

# On a terminal, a model's text must not move the cursor or change settings: C0 and C1 controls but tab and
# newline are left out. Piped, the text is passed on as it is.
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


@dataclass(frozen=True)
class Answer:
    """One finished or cancelled answer."""

    text: str
    finish_reason: str | None  # of the engine, or "cancelled"
    stats: GenerationStats

    @property
    def cancelled(self) -> bool:
        return self.finish_reason == CANCELLED

    @property
    def in_prompt(self) -> bool:
        """Whether it ended before the whole prompt was computed: nothing is known of the prompt's speed then."""
        return self.cancelled and not self.stats.completion_tokens


def stream_answer(worker: EngineThread, ask: Callable[[], Request], *, show: bool) -> Answer:
    """Make the request that ``ask`` makes and gather its text; with ``show`` write it to standard output as it comes,
    ended by a newline. Ctrl-C keeps what there is."""
    parts: list[str] = []
    reason: str | None = None
    last = "\n"
    terminal = show and sys.stdout.isatty()
    made: list[Request] = []

    def start() -> Request:
        made.append(ask())
        return made[0]

    def cancel() -> None:
        for request in made:
            request.cancel()

    try:
        for piece in worker.stream(start, cancel):
            parts.append(piece.text)
            reason = piece.finish_reason or reason
            shown = piece.text.translate(_CONTROLS) if terminal else piece.text
            if show and shown:
                sys.stdout.write(shown)
                sys.stdout.flush()
                last = shown
    except Cancelled:
        reason = CANCELLED
    if show and not last.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    stats = made[0].stats
    return Answer("".join(parts), reason or stats.finish_reason, stats)


def speed_line(answer: Answer) -> str:
    """Prompt and decode speed of one request, on one line, in tokens/s."""
    stats = answer.stats
    if answer.in_prompt:
        return f"prompt: {stats.prompt_tokens} tokens, not finished after {stats.prompt_seconds:.1f} s"
    cached = f" ({stats.cached_tokens} of them cached)" if stats.cached_tokens else ""
    return (
        f"prompt: {stats.prompt_tokens} tokens{cached}, {stats.prompt_tokens_per_second:.1f} tokens/s; "
        f"answer: {stats.completion_tokens} tokens, {stats.decode_tokens_per_second:.1f} tokens/s"
    )


class DriveMeter:
    """What answers took of the drive. Nothing is told of a model without weights there."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before = self._stats()

    def _stats(self) -> TierStats | None:
        return None if self._engine.paged is None else self._engine.paged.stats()

    def line(self) -> str:
        """Since the last call, or since the meter was made; behind a speed line, so it begins with a semicolon. Empty
        where nothing was asked of weights on the drive."""
        before, after = self._before, self._stats()
        self._before = after
        if before is None or after is None:
            return ""
        nbytes, busy = (
            after.drive_bytes - before.drive_bytes,
            after.drive_busy_seconds - before.drive_busy_seconds,
        )
        speed = f" at {nbytes / busy / 1e9:.1f} GB/s" if busy > 0 else ""
        parts = [f"{readable_size(nbytes)}{speed}"]
        # other weights pass through RAM in a known order: what counts is whether they came before they were needed
        for told, count in (("experts found in RAM", _experts), ("other weights there in time", _others)):
            hits, uses = (new - old for new, old in zip(count(after), count(before), strict=True))
            if uses > 0:
                parts.append(f"{hits / uses:.0%} of {told}")
        parts.append(f"{after.stall_seconds - before.stall_seconds:.1f} s waited")
        return f"; drive: {', '.join(parts)}"


def _experts(stats: TierStats) -> tuple[int, int]:
    """(hits, uses)"""
    return sum(layer.hits for layer in stats.layers), sum(layer.uses for layer in stats.layers)


def _others(stats: TierStats) -> tuple[int, int]:
    return stats.dense_hits, stats.dense_uses


def tier_json(stats: TierStats, *, layers: bool) -> dict[str, Any]:
    """What reading weights from the drive took and gave since the model was loaded; of each layer with ``layers``."""
    found = asdict(stats) | {
        "hit_rate": stats.hit_rate,
        "stall_seconds": stats.stall_seconds,
        "drive_bytes_per_second": stats.drive_bytes_per_second,
    }
    if not layers:
        del found["layers"]
    return found


def devices_json(engine: Engine) -> list[dict[str, Any]]:
    """Per device what the plan said and what llama.cpp allocated, in bytes."""

    def sizes(memory: Any) -> dict[str, int] | None:
        if memory is None:
            return None
        return {key: value for key, value in asdict(memory).items() if key != "device"}

    return [
        {"device": r.device, "planned": sizes(r.planned), "allocated": sizes(r.allocated)}
        for r in engine.memory
    ]


def answer_json(engine: Engine, plan: Plan, answer: Answer, *, layers: bool = False) -> str:
    """The one object that ``run --json`` prints; with ``layers`` also what each layer took of the drive."""
    stats, paged = answer.stats, engine.paged
    return json.dumps(
        {
            "model": plan.model,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "completion_tokens": stats.completion_tokens,
            "prompt_seconds": stats.prompt_seconds,
            "decode_seconds": stats.decode_seconds,
            "prompt_tokens_per_second": 0.0 if answer.in_prompt else stats.prompt_tokens_per_second,
            "decode_tokens_per_second": stats.decode_tokens_per_second,
            "load_seconds": engine.load_seconds,
            "context": engine.n_ctx,
            "devices": devices_json(engine),
            "tier": None if paged is None else tier_json(paged.stats(), layers=layers),
            "estimate": None if plan.estimate is None else asdict(plan.estimate),
            "reasons": list(plan.reasons),
            "warnings": list(plan.warnings),
        },
        indent=2,
        ensure_ascii=False,
    )


def memory_lines(engine: Engine) -> Sequence[str]:
    """One line per device for a reader: what is allocated and what was planned."""
    lines = []
    for report in engine.memory:
        got = report.allocated
        planned = f" (planned {readable_size(report.planned.total_bytes)})" if report.planned else ""
        lines.append(
            f"{report.device}: {readable_size(got.total_bytes)}{planned}: "
            f"weights {readable_size(got.weights_bytes)}, KV cache {readable_size(got.kv_bytes)}, "
            f"compute {readable_size(got.compute_bytes)}"
        )
    return lines


def print_plan(plan: Plan, *, quiet: bool) -> None:
    """The plan's warnings, and unless ``quiet`` its reasons and predicted speeds, on standard error."""
    if not quiet:
        for reason in plan.reasons:
            note(reason)
        if plan.estimate is not None:
            note(f"predicted: {explain.predicted(plan)[0]}")
    for warning in plan.warnings:
        note(f"tensortier: warning: {warning}")
