"""``/api/*``: what the page asks. ``router`` has all of it; docs/server.md lists the shapes.

Errors are raised as exceptions of ``errors``; the application turns them into responses.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from sse_starlette import EventSourceResponse

from tensortier import __version__, export, measuring, placement, planfile, workloads
from tensortier.deciding import Wish
from tensortier.errors import DownloadError, ModelFileError, UsageError
from tensortier.export import quoting
from tensortier.library import LibraryModel
from tensortier.server.host import ModelHost
from tensortier.server.live import Live
from tensortier.server.loading import Loaded
from tensortier.server.plans import Busy, Choice, Plans
from tensortier.server.problems import Problem
from tensortier.server.threads import in_thread
from tensortier.types import Hardware, Plan

if TYPE_CHECKING:
    from tensortier import downloads

MAX_CONTEXT = 1 << 24  # tokens
_TICK_SECONDS = 0.25  # between looks at what a page should be told
_MEASUREMENT = "the measurement of this machine"
_FOUND = 20  # repositories that a search shows


class _Asked(BaseModel):
    """What is asked about: see ``plans.Choice``."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=500)
    context: int | None = Field(None, ge=256, le=MAX_CONTEXT)
    kv: Literal["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "iq4_nl", "q4_0"] | None = None
    workload: str | None = Field(None, max_length=50)


class _PlanAsked(_Asked):
    budget: int | None = Field(None, ge=0, le=1 << 60)  # bytes; None: all that is free


class _ForecastAsked(_Asked):
    """``model``: a file of the repository ``repo``, as the hub calls it."""

    repo: str = Field(max_length=200)
    revision: str = Field("main", max_length=40, pattern="^(main|[0-9a-f]{40})$")


class _UnloadAsked(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=500)


class _LoadAsked(BaseModel):
    model_config = ConfigDict(extra="forbid")

    plan: str = Field(max_length=100)  # its id


class _DownloadAsked(BaseModel):
    model_config = ConfigDict(extra="forbid")

    repo: str = Field(max_length=200)
    file: str = Field(max_length=500)


def router(
    host: ModelHost, wish: Wish, machine: Hardware, manager: downloads.Manager | None = None
) -> APIRouter:
    """All of ``/api``.

    ``wish``: what the options of the server say for every model. ``machine``: before any model was loaded.
    ``manager``: of downloads; None: there are none on this server.
    """
    plans = Plans(wish, machine)
    measurement = _Measurement(plans)
    live = Live()

    @contextlib.asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await plans.close()
            if manager is not None:
                await asyncio.to_thread(manager.close)

    api = APIRouter(prefix="/api", lifespan=lifespan)

    async def choice(asked: _Asked) -> Choice:
        found = await host.find(asked.model)
        load = None if asked.workload is None else workloads.parse(asked.workload)
        return Choice(found, asked.context, asked.kv, load)

    @api.get("/models")
    async def models() -> Any:
        loaded = {one.name: one.phase for one in host.state()}
        return {
            "models": [_model_json(m, loaded.get(m.name)) for m in await host.look()],
            "served": None if host.served is None else host.served.name,
            "downloads": manager is not None,
        }

    @api.get("/machine")
    async def machine_() -> Any:
        return await asyncio.to_thread(_machine_json, plans, measurement)

    @api.post("/measure", status_code=202)
    async def measure() -> Any:
        if not measurement.running:
            async with contextlib.AsyncExitStack() as held:
                await held.enter_async_context(host.alone(_MEASUREMENT))
                await held.enter_async_context(plans.paused())
                measurement.start(held.pop_all())
        return {"seconds": measuring.SECONDS}

    @api.post("/slider")
    async def slider(asked: _Asked) -> Response:
        return await _answered(plans.curve(await choice(asked), _plans_of(host)))

    @api.post("/plan")
    async def plan(asked: _PlanAsked) -> Response:
        return await _answered(plans.plan(await choice(asked), asked.budget, _plans_of(host)))

    @api.get("/plans/{plan_id}")
    async def plan_file(plan_id: str) -> Response:
        kept = plans.kept(plan_id)
        return Response(
            json.dumps(planfile.to_dict(kept.plan), indent=2, ensure_ascii=False) + "\n",
            media_type="application/json",
            headers={"Content-Disposition": 'attachment; filename="plan.json"'},
        )

    @api.get("/targets")
    async def targets() -> Any:
        return {"targets": [{"name": name, "text": text} for name, text in export.TARGETS.items()]}

    @api.get("/export/{target}")
    async def exported(target: str, plan: str, shell: Literal["posix", "powershell", "cmd"] = "posix") -> Any:
        kept = plans.kept(plan)
        made = await asyncio.to_thread(export.export, kept.plan, kept.model, target)
        return {
            "target": target,
            "command": quoting.quote(made.argv, shell) if made.argv else "",
            "files": dict(made.files),
            "lost": made.lost,
            "text": export.render(made, shell),
        }

    @api.post("/load", status_code=202)
    async def load(asked: _LoadAsked) -> Any:
        kept = plans.kept(asked.plan)
        host.load(kept.name, kept.plan)
        return {"model": kept.name}

    @api.post("/unload", status_code=202)
    async def unload(asked: _UnloadAsked) -> Any:
        return {"model": host.unload(asked.model)}

    @api.get("/events")
    async def events(request: Request) -> EventSourceResponse:
        def now() -> dict[str, Any]:
            return {
                "state": {"models": [_loaded_json(one, plans) for one in host.state()]},
                "stats": {"models": live.of(host.state())},
                "downloads": {
                    "downloads": []
                    if manager is None
                    else [dataclasses.asdict(row) for row in manager.state()]
                },
                "measuring": measurement.state(),
            }

        async def told() -> AsyncIterator[dict[str, str]]:
            last: dict[str, str] = {}
            while not host.stopping:
                for event, value in now().items():
                    text = json.dumps(value, separators=(",", ":"))
                    if last.get(event) != text:
                        last[event] = text
                        yield {"event": event, "data": text}
                await asyncio.sleep(_TICK_SECONDS)

        return EventSourceResponse(told(), ping=15)

    if manager is not None:
        _add_downloads(api, manager)

        @api.post("/forecast")
        async def forecast(asked: _ForecastAsked) -> Response:
            source = _hub_address(asked)
            file = LibraryModel(asked.model, source, 0, "", "", "hub")
            load = None if asked.workload is None else workloads.parse(asked.workload)
            chosen = Choice(file, asked.context, asked.kv, load)
            with _hub_problems():
                return await _answered(plans.forecast(chosen, _plans_of(host)))

    return api


def _hub_address(asked: _ForecastAsked) -> str:
    """hf://... of what was asked about. Raises UsageError for what can be no file of the hub."""
    from tensortier import hub, modelfiles

    repo = hub.checked_repo(asked.repo)
    try:
        modelfiles.target(Path(), asked.model)
    except DownloadError as exc:
        raise UsageError(str(exc)) from exc
    return f"hf://{repo}@{asked.revision}/{asked.model}"


@contextlib.contextmanager
def _hub_problems() -> Iterator[None]:
    """What the hub or a file there is to blame for, as a status that says so."""
    try:
        yield
    except ModelFileError as exc:
        raise Problem(502, str(exc), code="hub") from exc


def _add_downloads(api: APIRouter, manager: downloads.Manager) -> None:
    from tensortier import hub, modelfiles

    @api.get("/search")
    async def search(q: str) -> Any:
        if not q.strip() or len(q) > 200:
            raise UsageError("a search needs some words, and not more than 200 characters")
        with _hub_problems():
            found = await in_thread(hub.search, q, _FOUND)
        return {
            "room": modelfiles.room(),
            "models": [
                {
                    "repo": model.repo,
                    "revision": model.revision,
                    "downloads": model.downloads,
                    "likes": model.likes,
                    "gated": model.gated,
                    "error": model.error,
                    "files": [
                        {"label": c.name, "name": c.files[0].name, "size": c.size, "missing": c.missing}
                        for c in hub.choices(model)
                    ],
                }
                for model in found
            ],
        }

    @api.post("/downloads", status_code=202)
    async def download(asked: _DownloadAsked) -> Any:
        return {"id": await asyncio.to_thread(manager.start, asked.repo, asked.file)}

    @api.delete("/downloads/{download_id}")
    async def cancel(download_id: str) -> Any:
        await asyncio.to_thread(manager.cancel, download_id)
        return {"id": download_id}


def _plans_of(host: ModelHost) -> list[Plan]:
    """Of the models that are loaded."""
    return [one.plan for one in host.state() if one.engine is not None and one.plan is not None]


async def _answered(work: Any) -> Response:
    try:
        return Response(await work, media_type="application/json")
    except Busy as exc:
        error = {"message": str(exc), "type": "overloaded_error"}
        return JSONResponse({"error": error}, 503, {"Retry-After": "2"})


class _Measurement:
    """Of this machine, one at a time."""

    def __init__(self, plans: Plans) -> None:
        self._plans = plans
        self._fraction: float | None = None
        self._said: list[str] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        return self._task is not None and not self._task.done()

    def start(self, held: contextlib.AsyncExitStack | None = None) -> None:
        """In the background; nothing where it is going on already. ``held`` is left at its end."""
        if not self.running:
            self._fraction, self._said = 0.0, []
            self._task = asyncio.create_task(self._run(held or contextlib.AsyncExitStack()))

    async def _run(self, held: contextlib.AsyncExitStack) -> None:
        def progress(fraction: float) -> None:
            self._fraction = round(fraction, 2)

        wish, machine = self._plans.wish, self._plans.machine
        try:
            found = await in_thread(
                measuring.measured, machine, wish.settings, wish.rpc, self._said.append, progress
            )
            self._said += () if found is None else found.notes
        except Exception as exc:
            self._said.append(f"measuring failed: {exc}")
            raise
        finally:
            self._fraction = None
            await held.aclose()

    def state(self) -> dict[str, Any]:
        """``fraction`` None: nothing is being measured."""
        return {"fraction": self._fraction, "warnings": list(self._said)}


def _model_json(model: LibraryModel, phase: str | None) -> dict[str, Any]:
    return {
        "id": model.name,
        "path": model.path,
        "size": model.size,
        "architecture": model.architecture,
        "quantization": model.quantization,
        "source": model.source,
        "error": model.error,
        "phase": phase,
    }


def _machine_json(plans: Plans, measurement: _Measurement) -> dict[str, Any]:
    machine = plans.machine
    return {
        "version": __version__,
        "cpu": machine.cpu_model,
        "cores": machine.performance_cores,
        "threads": machine.usable_cpus,
        "ram_total": machine.ram_limit,
        "ram_available": machine.ram_available,
        "os": machine.os,
        "gpus": [
            {
                "name": d.name,
                "description": d.description,
                "total": d.memory_total,
                "free": d.memory_free,
            }
            for d in placement.gpus(machine)
        ],
        "drive": next(({"kind": d.kind, "free": d.free, "total": d.total} for d in machine.drives), None),
        "measured": plans.measured(),
        "measuring": measurement.state()["fraction"],
        "measure_seconds": measuring.SECONDS,
        "warnings": machine.warnings,
        "workloads": {
            name: {"prompt": w.prompt, "output": w.output, "depth": w.depth}
            for name, w in workloads.NAMED.items()
        },
    }


def _loaded_json(one: Loaded, plans: Plans) -> dict[str, Any]:
    return {
        "model": one.name,
        "loading": one.loading,  # so that one that is over in a moment, with the same plan, is told too
        "phase": str(one.phase),
        "waits_for": one.waits_for,
        "fraction": round(one.fraction, 3),
        "error": one.error,
        "plan": None if one.plan is None else plans.id_of(one.plan),
        "memory": []
        if one.plan is None
        else [[r.device, r.weights_bytes, r.kv_bytes, r.compute_bytes] for r in one.plan.memory],
        "context": None if one.plan is None else one.plan.settings.n_ctx,
    }
