"""What every request passes before anything looks at it: who asks, from where, and how much.

A page of another origin may make a browser send requests here, and a name that its owner resolves to 127.0.0.1 (DNS
rebinding) may make the browser take this server for that page's own. So the Host header has to be a name of this
machine, and an Origin header that of the page that is served here, or one that was allowed.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tensortier.server.limits import Settings
from tensortier.server.problems import Problem

_DRAINED_BYTES = (
    64 << 20
)  # of a body that is too long: its sender reads the answer only after it has sent all
_KEYED = ("/v1/", "/api/", "/metrics", "/stats")
_CORS_HEADERS = "authorization, content-type, x-api-key"  # for a browser that does not say what it will send
_NAMES = re.compile(r"[\w-]+(, ?[\w-]+)*", re.ASCII)  # of headers
_ALWAYS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class ClientGone(Exception):
    """The client has closed the connection."""


class Guard:
    """ASGI middleware. Refuses with OpenAI's error object; the application gets the whole body at once."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        extra = dict(_ALWAYS)
        try:
            self._check_host(headers)
            extra |= self._check_origin(headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await self._preflight(headers, extra)(scope, receive, send)
                return
            self._check_key(scope["path"], headers)
            body = await self._body(headers, receive)
        except Problem as problem:
            await problem.response(extra)(scope, receive, send)
            return
        except ClientGone:
            return

        replayed = False

        async def receive_again() -> Message:
            nonlocal replayed
            if not replayed:
                replayed = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in extra.items():
                    answer.setdefault(name, value)
            await send(message)

        await self._app(scope, receive_again, send_with_headers)

    def _check_host(self, headers: Headers) -> None:
        allowed = self._settings.hosts
        if allowed is None:
            return
        name = host_name(headers.get("host", ""))
        if name in allowed or is_loopback(name):
            return
        raise Problem(
            403,
            f"this server is not {name[:100] or 'without a name'}: use http://127.0.0.1",
            code="wrong_host",
        )

    def _check_origin(self, headers: Headers) -> dict[str, str]:
        """Headers for the answer. Raises Problem."""
        origin = headers.get("origin")
        if origin is None:
            return {}
        if origin in self._settings.origins or "*" in self._settings.origins:
            return {
                "access-control-allow-origin": origin,
                "access-control-expose-headers": "retry-after",
                "cross-origin-resource-policy": "cross-origin",
                "vary": "origin",
            }
        if origin != "null" and origin.partition("://")[2] == headers.get("host", ""):
            return {}
        raise Problem(
            403, f"the page {origin[:100]} may not use this server (--allow-origin)", code="wrong_origin"
        )

    def _preflight(self, headers: Headers, extra: dict[str, str]) -> Response:
        """An allowed page may send any header: OpenAI's client for browsers adds a dozen of its own."""
        if "access-control-allow-origin" in extra:
            wanted = headers.get("access-control-request-headers", "")
            extra["access-control-allow-methods"] = "GET, POST, DELETE"
            extra["access-control-allow-headers"] = wanted if _NAMES.fullmatch(wanted) else _CORS_HEADERS
            extra["access-control-max-age"] = "600"
        return Response(status_code=204, headers=extra)

    def _check_key(self, path: str, headers: Headers) -> None:
        key = self._settings.api_key
        if key is None or not path.startswith(_KEYED):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        if not given:
            raise Problem(401, "no API key: send it as 'Authorization: Bearer KEY'", code="invalid_api_key")
        if not hmac.compare_digest(given.strip().encode(), key.encode()):
            raise Problem(401, "the API key is wrong", code="invalid_api_key")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """All of it. Raises Problem, ClientGone."""
        most = self._settings.body_bytes
        length = headers.get("content-length", "")
        too_long = Problem(
            413, f"the request is longer than {most >> 20} MiB", code="request_too_large", close=True
        )
        if headers.get("content-encoding", "identity") != "identity":
            raise Problem(415, "compressed requests are not read", close=True)
        if length.isdigit() and int(length) > most and "100-continue" in headers.get("expect", "").lower():
            raise too_long
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self._settings.request_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    size += len(message.get("body", b""))
                    if size <= most:
                        body += message.get("body", b"")
                    if size > _DRAINED_BYTES or not message.get("more_body", False):
                        break
        except TimeoutError:
            if size <= most:
                raise Problem(408, "the rest of the request did not come", close=True) from None
        if size > most:
            raise too_long
        return bytes(body)


def host_name(host: str) -> str:
    """Of a Host header, without the port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:  # brackets that do not match
        return ""


def is_loopback(name: str) -> bool:
    """Of a host name or an address."""
    if name in ("localhost", "localhost.localdomain"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def hosts_of(bound: str, origins: Iterable[str]) -> tuple[str, ...]:
    """Names that requests to a loopback address may come under, besides those of loopback itself: the one it was
    bound by, and those of the pages that were allowed, which a reverse proxy may serve."""
    return (bound, *(name for origin in origins if (name := urlsplit(origin).hostname)))
