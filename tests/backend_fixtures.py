"""A second device with memory of its own on any machine: ggml's RPC server on loopback."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tensortier import backends

SERVER_THREADS = 1  # client and server share the machine: two spinning thread pools slow each other down


@contextmanager
def rpc_server(log: Path, threads: int = SERVER_THREADS, address_space: int | None = None) -> Iterator[str]:
    """Run the server on a free port and yield "127.0.0.1:port". Fails when it has ended by itself.

    ``address_space``: bytes it may map, which is how a device runs out of memory for real (not on Windows).
    """
    program = backends.rpc_server()
    assert program is not None, "build the RPC module first"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [
        str(program),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--threads",
        str(threads),
        "--device",
        "CPU",
    ]

    def limit() -> None:
        if (
            sys.platform == "linux"
        ):  # it ends with the tests, even when they are killed: prctl(PR_SET_PDEATHSIG)
            import ctypes

            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if address_space is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    with (
        log.open("w") as out,
        subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, preexec_fn=limit) as process,
    ):
        try:
            wait_until_it_accepts(process, port, log)
            yield f"127.0.0.1:{port}"
            assert process.poll() is None, (
                f"the RPC server ended with {process.returncode}: {log.read_text()}"
            )
        finally:
            process.kill()


def wait_until_it_accepts(
    process: subprocess.Popen[bytes], port: int, log: Path, seconds: float = 20.0
) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the RPC server ended with {process.returncode}: {log.read_text()}"
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"the RPC server accepts no connection after {seconds:.0f} s: {log.read_text()}")


@pytest.fixture(scope="session")
def rpc_module() -> Path:
    """Path of the RPC module; built (half a minute) when the cache has none."""
    return backends.build("rpc")


@pytest.fixture(scope="session")
def rpc_device(rpc_module: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint "127.0.0.1:port" of a server that lives as long as the test session."""
    with rpc_server(tmp_path_factory.mktemp("rpc") / "server.log") as endpoint:
        yield endpoint
