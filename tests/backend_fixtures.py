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

ATTEMPTS = 5  # to start a server on a port that is free at that moment
SERVER_THREADS = 1  # client and server share the machine: two spinning thread pools slow each other down


@contextmanager
def rpc_server(log: Path, threads: int = SERVER_THREADS, address_space: int | None = None) -> Iterator[str]:
    """Run the server on a free port and yield "127.0.0.1:port". Fails when it has ended by itself.

    ``address_space``: bytes it may map, which is how a device runs out of memory for real (not on Windows).
    """
    program = backends.rpc_server()
    assert program is not None, "build the RPC module first"

    def limit() -> None:
        if (
            sys.platform == "linux"
        ):  # it ends with the tests, even when they are killed: prctl(PR_SET_PDEATHSIG)
            import ctypes

            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if address_space is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    for attempt in range(ATTEMPTS):
        port = free_port()
        argv = [str(program), "--host", "127.0.0.1", "--port", str(port)]
        argv += ["--threads", str(threads), "--device", "CPU"]
        with (
            log.open("w") as out,
            subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, preexec_fn=limit) as process,
        ):
            try:
                if not it_accepts(process, port):
                    told = f"the RPC server ended with {process.returncode}: {log.read_text()}"
                    assert attempt + 1 < ATTEMPTS, told
                    continue  # somebody else took the port meanwhile
                yield f"127.0.0.1:{port}"
                assert process.poll() is None, (
                    f"the RPC server ended with {process.returncode}: {log.read_text()}"
                )
                return
            finally:
                process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def it_accepts(process: subprocess.Popen[bytes], port: int, seconds: float = 60.0) -> bool:
    """Waits until the server listens; False when it has ended instead."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        assert time.monotonic() < deadline, f"the RPC server accepts no connection after {seconds:.0f} s"
        with socket.socket() as client:
            # bound, or the kernel might choose the very port: who connects to himself finds somebody who listens
            client.bind(("127.0.0.1", 0))
            if client.getsockname()[1] != port and client.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="session")
def rpc_module() -> Path:
    """Path of the RPC module; built (half a minute) when the cache has none."""
    return backends.build("rpc")


@pytest.fixture(scope="session")
def rpc_device(rpc_module: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint "127.0.0.1:port" of a server that lives as long as the test session."""
    with rpc_server(tmp_path_factory.mktemp("rpc") / "server.log") as endpoint:
        yield endpoint
