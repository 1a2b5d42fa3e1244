"""The application: routes, the page, and errors as one kind of object."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Mount

from tensortier.deciding import Wish
from tensortier.errors import TensortierError
from tensortier.server import api, metrics, openai
from tensortier.server.guard import Guard
from tensortier.server.host import ModelHost
from tensortier.server.limits import Gate, Settings
from tensortier.server.pagefiles import PageFiles
from tensortier.server.problems import Problem, problem_of
from tensortier.server.schemas import invalid
from tensortier.types import Hardware

if TYPE_CHECKING:
    from tensortier import downloads


def make_app(
    host: ModelHost,
    settings: Settings,
    wish: Wish,
    machine: Hardware,
    manager: downloads.Manager | None = None,
) -> FastAPI:
    """The server as an ASGI application. Its life is that of ``host``: it begins to load the served model when it
    starts, and frees all models when it ends. ``wish``, ``machine``, ``manager``: as for ``api.router``."""

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        del app
        await host.start()
        yield
        await host.close()

    # the pages that describe an interface to people would be loaded from another host
    app = FastAPI(lifespan=life, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Guard, settings=settings)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Problem, _known)
    app.add_exception_handler(TensortierError, _known)
    app.add_exception_handler(Exception, _known)
    gate = Gate(settings)
    counted = metrics.Metrics(host, gate)
    app.state.gate = gate
    app.include_router(openai.router(host, gate, counted))
    app.include_router(metrics.router(host, gate, counted, settings))
    app.include_router(api.router(host, wish, machine, manager))
    app.mount("/", PageFiles())
    return app


def _known(request: Request, error: Exception) -> Response:
    del request
    return problem_of(error).response()


def _invalid(request: Request, error: Exception) -> Response:
    """What FastAPI itself would answer with a 422 of another shape."""
    del request
    assert isinstance(error, RequestValidationError)
    first = dict(error.errors()[0])
    first["loc"] = tuple(first["loc"])[1:]  # without "body" or "query"
    return invalid(first).response()


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: ("there is no such address", "unknown_url"),
        405: ("this address does not take this method", "method_not_allowed"),
    }
    status, headers = error.status_code, error.headers
    if isinstance(request.scope.get("endpoint"), PageFiles):  # it gets what no route takes
        allowed = _methods(request)
        status, headers = (405, {"allow": ", ".join(allowed)}) if allowed else (404, None)
    message, code = messages.get(status, (str(error.detail), None))
    where = f"{request.method} {request.url.path[:200]}"
    problem = Problem(status, f"{where}: {message}", code=code)
    return problem.response(headers)


def _methods(request: Request) -> list[str]:
    """That the address takes, the page's files left out."""
    routes = [route for route in request.app.routes if not isinstance(route, Mount)]
    return [
        method
        for method in ("GET", "HEAD", "POST", "DELETE")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]
