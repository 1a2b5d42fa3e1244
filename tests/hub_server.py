"""A hub of models on loopback, as a process of its own, with the faults that a network has.

``python -m tests.hub_server FOLDER`` serves ``FOLDER/owner/repo/...`` and prints its address. It speaks as much
of the Hugging Face hub's interface as tensortier uses: ``/api/models?search=``, ``/api/models/owner/repo?blobs=true``,
and ``/owner/repo/resolve/REVISION/FILE``, which redirects to another host (by its name: localhost) with
``X-Linked-Size`` and ``X-Linked-Etag``. Large files have an SHA-256, small ones (below 1000 bytes) git's SHA-1.

``Hub`` starts it and gives it faults; what was asked and sent stands in its log.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

SMALL = 1000
FAULTS: dict[str, Any] = {
    "cut_at": None,  # the connection ends before this byte of a file, on every answer that reaches it
    "cut_times": None,  # ... so often; None: always
    "busy": 0,  # so many requests are answered with 429
    "busy_header": {"Retry-After": "0"},
    "status": None,  # all requests for files get this status
    "wrong_byte": None,  # this byte of every file is sent changed
    "no_ranges": False,  # always the whole file
    "bytes_per_second": None,
    "stall_at": None,  # nothing more after so many bytes, with an open connection, until other faults are set
    "stale_api": {},  # file -> entry of the list of files, whatever is there
    "extra_files": [],  # entries of the list of files of every repository
    "gone": [],  # repositories that a search finds and that are not there when asked for
    "cdn": None,  # address that downloads are redirected to
    "token": None,  # without it: 401
    "api_body": None,  # what /api answers instead of JSON
}


class _State:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults = dict(FAULTS)
        self.log: list[dict[str, Any]] = []
        self.guard = threading.Condition()  # notified of other faults
        self.digests: dict[tuple[str, int, int], tuple[str, str]] = {}

    def digest(self, path: Path) -> tuple[str, str]:
        info = path.stat()
        key = (str(path), info.st_mtime_ns, info.st_size)
        if key not in self.digests:
            data = path.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self.digests[key] = (hashlib.sha256(data).hexdigest(), git)
        return self.digests[key]

    def repositories(self) -> list[str]:
        return sorted(f"{p.parent.name}/{p.name}" for p in self.folder.glob("*/*") if p.is_dir())

    def model(self, repo: str, blobs: bool) -> dict[str, Any]:
        top = self.folder / repo
        siblings: list[dict[str, Any]] = []
        commit = hashlib.sha1(repo.encode())
        for path in sorted(p for p in top.rglob("*") if p.is_file()):
            name = path.relative_to(top).as_posix()
            entry: dict[str, Any] = {"rfilename": name}
            sha256, git = self.digest(path)
            commit.update(git.encode())
            if blobs:
                size = path.stat().st_size
                entry |= {"size": size, "blobId": git}
                if size >= SMALL:
                    entry |= {"blobId": "0" * 40, "lfs": {"sha256": sha256, "size": size, "pointerSize": 135}}
            siblings.append(self.faults["stale_api"].get(name, entry))
        siblings += self.faults["extra_files"]
        owner, name = repo.split("/")
        found = {"_id": "0", "id": repo, "modelId": repo, "author": owner, "private": False, "gated": False}
        found |= {"sha": commit.hexdigest(), "downloads": 100 + len(name), "likes": len(owner)}
        return found | {"tags": ["gguf"], "siblings": siblings}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: _State

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.state.guard:
            if self.path == "/_faults":
                self.state.faults = {**FAULTS, **body}
                self.state.guard.notify_all()
            elif self.path == "/_clear":
                self.state.log.clear()
        self._json({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path == "/_log":
            with self.state.guard:
                self._json(self.state.log)
            return
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        entry = {"path": unquote(url.path), "query": url.query, "range": self.headers["Range"], "sent": 0}
        entry |= {"token": self.headers["Authorization"], "agent": self.headers["User-Agent"]}
        with self.state.guard:
            self.state.log.append(entry)
            faults = self.state.faults
            busy = faults["busy"] > 0
            faults["busy"] -= busy
        if busy:
            self._answer(429, {"Content-Length": "0", **faults["busy_header"]})
        elif faults["token"] and parts[0] != "cdn" and entry["token"] != f"Bearer {faults['token']}":
            self._answer(401, {"Content-Length": "0"})
        elif parts[0] == "api":
            self._api(parts, {k: v[0] for k, v in parse_qs(url.query).items()})
        elif parts[0] == "cdn":
            self._file(entry, self.state.folder / "/".join(parts[1:]))
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._answer(404, {"Content-Length": "0"})

    def _api(self, parts: list[str], query: dict[str, str]) -> None:
        raw = self.state.faults["api_body"]
        if raw is not None:
            self._answer(200, {"Content-Length": str(len(raw)), "Content-Type": "text/html"}, raw.encode())
        elif parts == ["api", "models"]:
            words = query.get("search", "").casefold().split()
            names = [r for r in self.state.repositories() if all(w in r.casefold() for w in words)]
            names = names[: int(query.get("limit", "30"))]
            self._json([self.state.model(r, blobs=False) for r in names])
        elif len(parts) in (4, 6) and (repo := "/".join(parts[2:4])) in self._there():
            self._json(self.state.model(repo, query.get("blobs") == "true"))
        else:
            self._answer(401, {"Content-Length": "0"})  # what the hub says of a repository that is not there

    def _there(self) -> list[str]:
        return [r for r in self.state.repositories() if r not in self.state.faults["gone"]]

    def _resolve(self, repo: str, name: str) -> None:
        path = self.state.folder / repo / name
        if self.state.faults["status"]:
            self._answer(self.state.faults["status"], {"Content-Length": "0"})
        elif ".." in name or not path.is_file():
            self._answer(404, {"Content-Length": "0"})
        else:
            sha256, git = self.state.digest(path)
            small = path.stat().st_size < SMALL
            cdn = self.state.faults["cdn"] or f"http://localhost:{self.server.server_address[1]}"
            place = f"{cdn}/cdn/{quote(repo)}/{quote(name)}"
            headers = {"Location": place, "X-Linked-Size": str(path.stat().st_size), "Content-Length": "0"}
            headers["X-Repo-Commit"] = self.state.model(repo, blobs=False)["sha"]
            self._answer(302, headers | {"X-Linked-Etag": f'"{git if small else sha256}"'})

    def _file(self, entry: dict[str, Any], path: Path) -> None:
        faults = self.state.faults
        data = bytearray(path.read_bytes())
        first = 0
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if faults["wrong_byte"] is not None:
            data[faults["wrong_byte"]] ^= 0xFF
        if asked and not faults["no_ranges"]:
            first = int(asked[1])
            if first >= len(data):
                self._answer(416, {"Content-Length": "0", "Content-Range": f"bytes */{len(data)}"})
                return
            whole = len(data)
            if asked[2]:
                del data[int(asked[2]) + 1 :]
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{whole}"
        self._answer(
            206 if first or headers.get("Content-Range") else 200,
            headers | {"Content-Length": str(len(data) - first)},
        )
        end = len(data)
        with self.state.guard:
            if faults["cut_at"] is not None and faults["cut_times"] != 0 and first <= faults["cut_at"] < end:
                end = faults["cut_at"]
                if faults["cut_times"] is not None:
                    faults["cut_times"] -= 1
        speed = faults["bytes_per_second"]
        step = 1 << 16 if speed is None else max(speed // 20, 1)
        try:
            while first < end:
                chunk = data[first : min(first + step, self._until_the_stall(first), end)]
                entry["sent"] += len(chunk)  # before: who has it may ask for the log at once
                self.wfile.write(chunk)
                first += len(chunk)
                if speed is not None:
                    time.sleep(len(chunk) / speed)
        except OSError:
            self.close_connection = True
        if end < len(data):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)

    def _until_the_stall(self, first: int) -> int:
        """The byte up to which may be sent, once there is anything to send behind ``first``."""
        limit = sys.maxsize

        def may_go_on() -> bool:
            nonlocal limit
            stall = self.state.faults["stall_at"]
            limit = sys.maxsize if stall is None else stall
            return first < limit

        with self.state.guard:
            self.state.guard.wait_for(may_go_on)
        return limit

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self._answer(200, {"Content-Type": "application/json", "Content-Length": str(len(body))}, body)

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@dataclass
class Hub:
    """The server's process. ``url`` is for ``HF_ENDPOINT``; files are put into ``folder``."""

    folder: Path
    url: str = ""
    _puts: int = 0
    _process: Any = field(default=None, repr=False)

    def __enter__(self) -> Hub:
        command = [sys.executable, "-m", "tests.hub_server", str(self.folder)]
        root = Path(__file__).resolve().parent.parent
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        self.url = self._process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), "the hub did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def put(self, repo: str, name: str, data: bytes) -> Path:
        path = self.folder / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coming = self.folder / "coming"  # apart from the repositories: nobody is sent half of it
        coming.write_bytes(data)
        self._puts += 1  # no two have the same time, however coarse the clock of the file system
        os.utime(coming, (self._puts, self._puts))
        coming.replace(path)
        return path

    def faults(self, **given: Any) -> None:
        """These faults and no others from now on."""
        assert given.keys() <= FAULTS.keys()
        self._post("/_faults", given)

    def clear_log(self) -> None:
        self._post("/_clear", {})

    def log(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url}/_log") as response:
            return list(json.load(response))

    def sent(self) -> int:
        """Bytes of files that left the server since the log was cleared."""
        return sum(entry["sent"] for entry in self.log())

    def _post(self, path: str, body: Any) -> None:
        with urllib.request.urlopen(f"{self.url}{path}", data=json.dumps(body).encode()) as response:
            response.read()


def main() -> None:
    handler = type("Handler", (_Handler,), {"state": _State(Path(sys.argv[1]))})
    server_class = type("Server", (ThreadingHTTPServer,), {"daemon_threads": True, "request_queue_size": 64})
    server = server_class(("127.0.0.1", 0), handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
