"""ggml devices: load backend modules, reach remote servers, list what there is, find buffer types by name.

Run as a program (``python -m tensortier._llama.devices [host:port ...]``) it prints what it finds as JSON, so
that the planning half learns of devices without loading a native library: ``{"devices": [...], "warnings": [...]}``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence

from tensortier import backends
from tensortier._llama.libs import ggml_function, llama
from tensortier.errors import BackendError, PatternError, TensortierError
from tensortier.types import Device

_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel", 4: "meta"}  # enum ggml_backend_dev_type

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
        if module.name in _loaded or module.name == "rpc":
            continue
        if _load(str(module.path)):
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
    # ggml ends the process when it cannot connect, so look first.
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as exc:
        raise BackendError(
            f"no RPC server answers at {endpoint} ({exc.strerror or exc}); start one there"
        ) from exc
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
    get_type = ggml_function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    get_registry = ggml_function("ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)
    get_memory = ggml_function(
        "ggml_backend_dev_memory",
        None,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.POINTER(ctypes.c_size_t),
    )
    default = ggml_function("ggml_backend_dev_buffer_type", ctypes.c_void_p, ctypes.c_void_p)
    found = []
    for handle in _handles():
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        get_memory(handle, ctypes.byref(free), ctypes.byref(total))
        found.append(
            Device(
                name=name_of(handle),
                kind=_KINDS.get(get_type(handle), "unknown"),
                description=_string("ggml_backend_dev_description", handle),
                memory_total=total.value,
                memory_free=free.value,
                backend=_string("ggml_backend_reg_name", get_registry(handle)),
                buffer_type=_string("ggml_backend_buft_name", default(handle)),
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
        rows = [dataclasses.asdict(device) for device in devices()]
    except TensortierError as exc:
        print(exc, file=sys.stderr)
        return 1
    json.dump({"devices": rows, "warnings": warnings}, answer)
    answer.close()
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
