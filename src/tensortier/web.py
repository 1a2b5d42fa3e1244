"""HTTP as all parts here speak it: redirects that do not carry a token away, and errors in words.

urllib, not the library that huggingface_hub uses: that one was requests, then httpx, then httpx2, each with
exceptions of its own, and all of its releases since 0.30 are welcome here.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from email.message import Message
from typing import IO, Any
from urllib.parse import urljoin, urlsplit

from tensortier.errors import RemoteError

TIMEOUT = 30.0  # seconds without a byte
USER_AGENT = "tensortier"


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; the token goes along only to the same host (urllib would send it anywhere).

    ``linked`` are the headers of the one in which the hub says what the file behind it is (X-Linked-Etag).
    ``followed`` says whether there was any.
    """

    def __init__(self) -> None:
        self.linked: Message | None = None
        self.followed = False

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        self.followed = True
        if "X-Linked-Etag" in headers:
            self.linked = headers
        target = urljoin(req.full_url, newurl)
        old, new = urlsplit(req.full_url), urlsplit(target)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme != "https"):
            raise urllib.error.URLError(f"refused a redirect from {old.scheme} to {new.scheme}")
        following = super().redirect_request(req, fp, code, msg, headers, target)
        token = req.unredirected_hdrs.get("Authorization")
        if following is not None and token and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            following.add_unredirected_header("Authorization", token)
        return following


def request(url: str, token: str | None = None, **headers: str) -> urllib.request.Request:
    """A GET request for the bytes as they are. Underscores in the names of ``headers`` stand for hyphens."""
    given = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    made = urllib.request.Request(url, headers=given)
    if token:
        made.add_unredirected_header("Authorization", f"Bearer {token}")
    return made


def hub() -> tuple[str, str | None]:
    """The hub's address and the token for it, both as huggingface_hub finds them (``HF_ENDPOINT``, ``HF_TOKEN``,
    ``hf auth login``). Raises RemoteError where ``HF_HUB_OFFLINE`` forbids to ask it."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise RemoteError("HF_HUB_OFFLINE is set, so the hub is not asked: unset it")
    # from the environment as it is now, too: the constant is that of the moment of the import
    address = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    try:
        scheme = urlsplit(address).scheme
    except ValueError as exc:
        raise RemoteError(f"HF_ENDPOINT is {address!r}, which is no address: {exc}") from exc
    if scheme not in ("http", "https"):
        raise RemoteError(f"HF_ENDPOINT is {address!r}, which is no http:// or https:// address")
    return address, get_token()


def explain(error: urllib.error.HTTPError) -> str:
    """The status in words."""
    if error.code in (401, 403):
        return f"access denied (HTTP {error.code}); for a gated model set HF_TOKEN and accept its terms"
    if error.code == 404:
        return "no such file (HTTP 404)"
    reason = " ".join(str(error.reason).split())[:200]
    return f"the server answered with HTTP {error.code} {reason}"
