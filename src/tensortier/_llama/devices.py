"""ggml devices: load backend modules, reach remote servers, list what there is, find buffer types by name.

Run as a program (``python -m tensortier._llama.devices [host:port ...]``) it prints what it finds as JSON, so
that the planning half learns of devices without loading a native library: ``{"devices": [...], "warnings": [...]}``,
or ``{"error": text, "kind": name of the exception}``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tensortier import backends
from tensortier._llama.libs import ggml_function, llama
from tensortier.errors import BackendError, PatternError, TensortierError
from tensortier.types import Device

_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel", 4: "meta"}  # enum ggml_backend_dev_type


class _Props(ctypes.Structure):
    """``ggml_backend_dev_props``"""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", ctypes.c_bool * 16),  # flags that nobody reads here; fewer than that
    )


# ggml-rpc.cpp: the first command of a connection, and the bytes of capabilities in it and in its answer
_RPC_HELLO = 14
_RPC_CAPS = 24
_RPC_SECONDS = 5

_loaded: set[str] = set()  # modules, by name
_servers: set[str] = set()  # remote servers, by endpoint


def load_modules(rpc: Sequence[str] = ()) -> list[str]:
    """Loads the backend modules that were built on this machine and registers the remote servers ``rpc``
    (``host:port``). Calling it again does only what is new. Returns a warning for each GPU module that is
    there and does not load, which is normal where its driver is missing.

    Raises:
        BackendError: a server does not answer, or the RPC module is missing or does not load.
    """
    warnings = []
    for module in backends.installed():
        if module.name in _loaded or module.name == "rpc" or not module.here:
            continue
        if module.state != "ready":
            warnings.append(f"the {module.name} backend is not used: {module.state}")
        elif _load(str(module.path)):
            _loaded.add(module.name)
        else:
            warnings.append(
                f"the {module.name} backend does not load here (is its driver installed?): {module.path}"
            )
    for endpoint in rpc:
        _add_server(endpoint)
    return warnings


def _load(path: str) -> bool:
    llama()
    load = ggml_function("ggml_backend_load", ctypes.c_void_p, ctypes.c_char_p)
    return bool(load(os.fsencode(path)))


def _add_server(endpoint: str) -> None:
    if endpoint in _servers:
        return
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise BackendError(f"--rpc takes host:port, not {endpoint!r}")
    _greet(endpoint, host, int(port))
    if "rpc" not in _loaded:
        path = backends.module_path("rpc")
        if path is None:
            raise BackendError("the RPC backend is not built; run: tensortier backend build rpc")
        if not _load(str(path)):
            raise BackendError(f"the RPC backend does not load; rebuild it with --force: {path}")
        _loaded.add("rpc")
    by_name = ggml_function("ggml_backend_reg_by_name", ctypes.c_void_p, ctypes.c_char_p)
    get_address = ggml_function(
        "ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p
    )
    register = ggml_function("ggml_backend_register", None, ctypes.c_void_p)
    address = get_address(by_name(b"RPC"), b"ggml_backend_rpc_add_server")
    add_server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    registry = add_server(endpoint.encode())
    if not registry:
        raise BackendError(f"the server at {endpoint} does not speak this version of ggml's RPC protocol")
    register(registry)
    _servers.add(endpoint)


def _greet(endpoint: str, host: str, port: int) -> None:
    """Says HELLO as ggml's client does (ggml-rpc.cpp). It comes first because ggml ends the process when the
    answer is another than it expects, and waits without end for none.

    Raises:
        BackendError: nobody answers, or nobody who speaks ggml's protocol.
    """
    request = bytes([_RPC_HELLO]) + _RPC_CAPS.to_bytes(8, "little") + bytes(_RPC_CAPS)
    wanted = 8 + 4 + _RPC_CAPS  # size, version, capabilities
    answer = b""
    try:
        # one time limit for all of it: a server may also answer a byte at a time
        deadline = time.monotonic() + _RPC_SECONDS
        with socket.create_connection((host, port), timeout=_RPC_SECONDS) as connection:
            connection.sendall(request)
            while len(answer) < wanted:
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError
                connection.settimeout(left)
                if not (data := connection.recv(wanted - len(answer))):
                    break
                answer += data
    except TimeoutError as exc:
        raise BackendError(
            f"{endpoint} does not answer within {_RPC_SECONDS} s: it is unreachable, busy with another "
            "client, or no RPC server"
        ) from exc
    except OSError as exc:
        raise BackendError(
            f"no RPC server answers at {endpoint} ({exc.strerror or exc}); start one there"
        ) from exc
    if len(answer) < wanted or int.from_bytes(answer[:8], "little") != wanted - 8:
        raise BackendError(f"what answers at {endpoint} is no ggml RPC server, or one of another version")


def _handles() -> Iterator[int]:
    count = ggml_function("ggml_backend_dev_count", ctypes.c_size_t)
    get = ggml_function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    for i in range(count()):
        yield get(i)


def _string(function: str, handle: int) -> str:
    text = ggml_function(function, ctypes.c_char_p, ctypes.c_void_p)(handle)
    return text.decode(errors="replace") if text else ""


def name_of(handle: int) -> str:
    """ggml's name of a device: "CPU", "CUDA0", "RPC0"."""
    return _string("ggml_backend_dev_name", handle)


def devices() -> list[Device]:
    """Every device ggml knows in this process, with its memory now."""
    get_registry = ggml_function("ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)
    get_props = ggml_function("ggml_backend_dev_get_props", None, ctypes.c_void_p, ctypes.POINTER(_Props))
    default = ggml_function("ggml_backend_dev_buffer_type", ctypes.c_void_p, ctypes.c_void_p)
    found = []
    for handle in _handles():
        props = _Props()
        get_props(handle, ctypes.byref(props))
        found.append(
            Device(
                name=name_of(handle),
                kind=_KINDS.get(props.type, "unknown"),
                description=_string("ggml_backend_dev_description", handle),
                memory_total=props.memory_total,
                memory_free=props.memory_free,
                backend=_string("ggml_backend_reg_name", get_registry(handle)),
                buffer_type=_string("ggml_backend_buft_name", default(handle)),
                device_id=(props.device_id or b"").decode(errors="replace"),
            )
        )
    return found


def device_handles(names: Iterable[str]) -> list[int]:
    """The handles of named devices, in the order given.

    Raises:
        BackendError: there is no such device; the message lists those there are.
    """
    by_name = {name_of(handle): handle for handle in _handles()}
    for name in (names := list(names)):
        if name not in by_name:
            raise BackendError(f"there is no device {name!r} here; there are: {', '.join(by_name)}")
    return [by_name[name] for name in names]


def buffer_type(name: str) -> int:
    """The handle of a buffer type, by its own name or by that of the device whose default it is.

    Raises:
        PatternError: there is none of that name; the message lists those there are.
    """
    default = ggml_function("ggml_backend_dev_buffer_type", ctypes.c_void_p, ctypes.c_void_p)
    known: dict[str, int] = {}
    for handle in _handles():
        buft = default(handle)
        if buft:
            known.setdefault(_string("ggml_backend_buft_name", buft), buft)
            known.setdefault(name_of(handle), buft)
    if name not in known:
        raise PatternError(f"there is no buffer type {name!r} here; there are: {', '.join(known)}")
    return known[name]


def _main(endpoints: Sequence[str]) -> int:
    # Libraries print what they like on standard output; the answer has it to itself.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        warnings = load_modules(endpoints)
        found: dict[str, Any] = {
            "devices": [dataclasses.asdict(device) for device in devices()],
            "warnings": warnings,
        }
    except TensortierError as exc:
        found = {"error": str(exc), "kind": type(exc).__name__}
    json.dump(found, answer)
    answer.close()
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
