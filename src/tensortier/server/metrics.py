"""``/health``, ``/metrics`` and ``/stats``: whether, how much and how well."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import JSONResponse, Response

from tensortier.server.host import ModelHost
from tensortier.server.limits import Gate, Settings
from tensortier.server.loading import UNDER_WAY, Loaded, Phase
from tensortier.types import TierStats

if TYPE_CHECKING:
    from tensortier.engine import Engine

_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts requests, and asks the engines for the rest when somebody looks."""

    def __init__(self, host: ModelHost, gate: Gate) -> None:
        self.registry = CollectorRegistry()
        labels = ("endpoint", "status")
        self._requests = Counter("tensortier_requests", "Requests answered.", labels, registry=self.registry)
        self._seconds = Histogram(
            "tensortier_first_response_seconds",
            "From a request to the beginning of its answer.",
            ("endpoint", "stream"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_Engines(host, gate))
        ProcessCollector(registry=self.registry)

    def told(self, endpoint: str, stream: bool) -> Callable[[int], None]:
        """For a request that begins now: to be called with the status of its answer."""
        started = time.perf_counter()
        mode = "true" if stream else "false"

        def tell(status: int) -> None:
            self._requests.labels(endpoint, str(status)).inc()
            self._seconds.labels(endpoint, mode).observe(time.perf_counter() - started)

        return tell


class _Engines(Collector):
    """What a model did counts for as long as the server runs: engines that were freed included."""

    def __init__(self, host: ModelHost, gate: Gate) -> None:
        self._host = host
        self._gate = gate
        # (figure, model) -> of engines that were freed
        self._past: defaultdict[tuple[str, str], float] = defaultdict(float)
        host.before_free(self._remember)

    def _remember(self, model: str, engine: Engine) -> None:
        for name, value in _counts(engine):
            self._past[name, model] += value

    def collect(self) -> Iterable[Metric]:
        yield _gauge("tensortier_answers", "Answers that are computed or wait.", self._gate.inside)
        yield _counter("tensortier_refused", "Requests refused because too much went on.", self._gate.refused)
        yield _gauge(
            "tensortier_threads", "Threads of this process that Python knows.", threading.active_count()
        )
        models = self._host.state()
        states = GaugeMetricFamily(
            "tensortier_model_state", "1 for the state a model is in.", labels=("model", "phase")
        )
        for name, phase in dict.fromkeys((one.name, one.phase) for one in models):
            states.add_metric((name, phase), 1)
        yield states
        yield from self._figures(models)

    def _figures(self, models: Iterable[Loaded]) -> Iterable[Metric]:
        found = self._past.copy()
        for one in models:
            if one.engine is None:
                continue
            for name, value in _counts(one.engine):
                found[name, one.name] += value  # one that is loaded again may have two engines for a while
            if one.phase is Phase.READY:
                found.update({(name, one.name): value for name, value in _gauges(one.engine)})
        families: dict[str, Metric] = {}
        for (name, model), value in found.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = families.setdefault(name, kind(name, _TEXTS[name], labels=("model",)))
            family.add_metric((model,), value)  # type: ignore[attr-defined]
        yield from families.values()


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


_TEXTS = {
    "tensortier_prompt_tokens_total": "Tokens of prompts computed.",
    "tensortier_completion_tokens_total": "Tokens generated.",
    "tensortier_tier_drive_bytes_total": "Read from the drive.",
    "tensortier_tier_stall_seconds_total": "Waited for the drive.",
    "tensortier_active": "Answers that are computed.",
    "tensortier_waiting": "Answers that wait.",
    "tensortier_decode_tokens_per_second": "In the last second.",
    "tensortier_kv_used_cells": "Cells of the KV cache in use.",
    "tensortier_kv_cells": "Cells of the KV cache.",
    "tensortier_tier_hit_rate": "Of experts, found in memory.",
    "tensortier_tier_memory_bytes": "RAM for weights from the drive.",
}


def _counts(engine: Engine) -> Iterator[tuple[str, float]]:
    """What it did since it was made."""
    now = engine.activity()
    yield "tensortier_prompt_tokens_total", now.prompt_tokens_total
    yield "tensortier_completion_tokens_total", now.completion_tokens_total
    if engine.paged is not None:
        tier = engine.paged.stats()
        yield "tensortier_tier_drive_bytes_total", tier.drive_bytes
        yield "tensortier_tier_stall_seconds_total", tier.stall_seconds


def _gauges(engine: Engine) -> Iterator[tuple[str, float]]:
    """What it does now."""
    now = engine.activity()
    yield "tensortier_active", now.active
    yield "tensortier_waiting", now.waiting
    yield "tensortier_decode_tokens_per_second", now.decode_tokens_per_second
    yield "tensortier_kv_used_cells", now.kv_used_cells
    yield "tensortier_kv_cells", now.n_ctx
    if engine.paged is not None:
        tier = engine.paged.stats()
        yield "tensortier_tier_hit_rate", tier.hit_rate
        yield "tensortier_tier_memory_bytes", tier.memory_bytes


def router(host: ModelHost, gate: Gate, metrics: Metrics, settings: Settings) -> APIRouter:
    routes = APIRouter()

    @routes.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        if host.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        served = next((m for m in host.state() if host.served and m.path == host.served.path), None)
        if served is not None and served.phase is Phase.FAILED:
            return JSONResponse({"status": "failed", "error": served.error}, 503)
        if served is not None and served.phase in UNDER_WAY:
            told = {"status": "loading", "phase": served.phase, "fraction": round(served.fraction, 3)}
            if served.waits_for:
                told["waits_for"] = served.waits_for
            return JSONResponse(told, 503, {"retry-after": "1"})
        return JSONResponse({"status": "ok"})

    @routes.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @routes.get("/stats")
    async def stats() -> dict[str, Any]:
        return {
            "answers": gate.inside,
            "refused": gate.refused,
            "parallel": settings.parallel,
            "queue": settings.queue,
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "models": [model_stats(loaded) for loaded in host.state()],
        }

    return routes


def model_stats(loaded: Loaded) -> dict[str, Any]:
    """A loaded model: its state, its memory beside the plan's, what goes on, and how the drive does."""
    plan, engine = loaded.plan, loaded.engine
    found: dict[str, Any] = {
        "name": loaded.name,
        "phase": loaded.phase,
        "waits_for": loaded.waits_for,
        "fraction": loaded.fraction,
        "error": loaded.error,
        "users": loaded.users,
    }
    if plan is not None and plan.estimate is not None:
        found["predicted"] = {
            "prefill_tokens_per_second": plan.estimate.prefill_tokens_per_second,
            "decode_tokens_per_second": plan.estimate.decode_tokens_per_second,
        }
    if engine is None or loaded.phase is not Phase.READY:
        return found
    found["memory"] = [
        {
            "device": row.device,
            "planned_bytes": None if row.planned is None else row.planned.total_bytes,
            "allocated_bytes": row.allocated.total_bytes,
        }
        for row in engine.memory
    ]
    found["activity"] = asdict(engine.activity())
    found["drive"] = None if engine.paged is None else tier_stats(engine.paged.stats())
    return found


def tier_stats(stats: TierStats) -> dict[str, Any]:
    """Of weights on the drive, since the model was loaded."""
    uses = stats.dense_uses
    return {
        "expert_hit_rate": stats.hit_rate,
        "dense_hit_rate": stats.dense_hits / uses if uses else 0.0,
        "memory_bytes": stats.memory_bytes,
        "bytes_read": stats.drive_bytes,
        "bytes_per_second": stats.drive_bytes_per_second,
        "busy_seconds": stats.drive_busy_seconds,
        "stall_seconds": stats.stall_seconds,
        "reader": stats.reader,
    }
