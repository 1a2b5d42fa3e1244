"""Errors as OpenAI's clients expect them: a status, and one JSON object that says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from tensortier.errors import Cancelled, ContextFull, ModelNotFound, OutOfMemory, TensortierError, UsageError
from tensortier.server.loading import HostStopping, ModelUnavailable, Occupied

RETRY_SECONDS = 5  # where nothing better is known


class Problem(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: one line for a person.
        code: for a program; None where the status says it all.
        param: the field of the request that is to blame.
        retry_after: seconds after which it may work.
        close: the connection is of no more use.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after)))
        if close:
            self.headers["connection"] = "close"
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.body, self.status, {**self.headers, **(headers or {})})


def problem_of(error: Exception) -> Problem:
    """What a client is told of an exception of the package; anything else is a bug, of which no more is told."""
    message = " ".join(str(error).split())
    match error:
        case Problem():
            return error
        case ModelNotFound():
            return Problem(404, message, code="model_not_found", param="model")
        case ContextFull():
            return Problem(400, message, code="context_length_exceeded", param="messages")
        case UsageError():
            return Problem(400, message)
        case Occupied():
            return Problem(409, message, code="busy", retry_after=RETRY_SECONDS)
        case HostStopping():
            return Problem(503, message, code="stopping", retry_after=RETRY_SECONDS)
        case Cancelled():
            return Problem(503, message, code="cancelled", retry_after=RETRY_SECONDS)
        case ModelUnavailable() | OutOfMemory():
            return Problem(503, message, code="model_unavailable", retry_after=RETRY_SECONDS)
        case TensortierError():
            return Problem(500, message)
    return Problem(500, "the server made a mistake; its log says which")
