"""Many answers at once, and clients that leave: nothing is lost, mixed up or left behind."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.conftest import PARALLEL
from tests.server.process import ServerProcess

STREAMS = 64


def connect(server: ServerProcess) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)


def ask(
    server: ServerProcess, body: dict[str, Any], path: str = "/v1/completions"
) -> http.client.HTTPConnection:
    connection = connect(server)
    connection.request("POST", path, json.dumps({"model": "smollm2", "temperature": 0, **body}))
    return connection


def read_stream(connection: http.client.HTTPConnection) -> tuple[str, list[Any]]:
    """The text, and all chunks."""
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    lines = [line for line in answer.read().decode().split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]", lines[-1]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    return "".join(c["choices"][0]["text"] for c in chunks if c["choices"]), chunks


def test_sixty_four_streams_at_once(server: ServerProcess) -> None:
    """Each is told to repeat a word of its own, by a bias that leaves no choice, and has to get that word only."""
    before = server.stats()["models"][0]["activity"]["completion_tokens_total"]
    tokens = [str(1000 + 13 * number) for number in range(STREAMS)]
    words = {}
    for token in tokens:
        body = {"prompt": "x", "max_tokens": 1, "logit_bias": {token: 100}, "logprobs": 0}
        connection = ask(server, body)
        choice = json.loads(connection.getresponse().read())["choices"][0]
        words[token] = bytes(choice["text"], "utf-8")
        connection.close()
    assert len(set(words.values())) == STREAMS
    barrier = threading.Barrier(STREAMS)

    def one(number: int) -> None:
        token = tokens[number]
        length = 4 + number % 13
        barrier.wait()
        body = {"prompt": f"Stream {number}:", "max_tokens": length, "logit_bias": {token: 100}}
        connection = ask(server, body | {"stream": True, "stream_options": {"include_usage": True}})
        text, chunks = read_stream(connection)
        connection.close()
        assert text.encode() == words[token] * length
        assert chunks[-1]["usage"]["completion_tokens"] == length
        assert len({chunk["id"] for chunk in chunks}) == 1

    with ThreadPoolExecutor(STREAMS) as threads:
        list(threads.map(one, range(STREAMS)))
    found = server.quiet()
    total = sum(4 + number % 13 for number in range(STREAMS)) + STREAMS
    assert found["models"][0]["activity"]["completion_tokens_total"] == before + total
    assert found["refused"] == 0 or found["answers"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_engine_at_once(server: ServerProcess, stream: bool) -> None:
    server.quiet()
    connections = [
        ask(server, {"prompt": f"{n}: once upon a time", "max_tokens": 4000, "stream": stream})
        for n in range(PARALLEL + 10)
    ]
    deadline = time.monotonic() + 10
    while server.stats()["models"][0]["activity"]["active"] < PARALLEL:
        assert time.monotonic() < deadline
    assert server.stats()["answers"] == PARALLEL + 10
    for connection in connections:
        connection.close()
    started = time.monotonic()
    server.quiet()
    assert time.monotonic() - started < 1.5


def test_who_leaves_in_the_middle_of_a_long_prompt(server: ServerProcess) -> None:
    server.quiet()
    computed = server.stats()["models"][0]["activity"]["prompt_tokens_total"]
    prompt = " ".join(str(number) for number in range(1500))
    for path, body in (
        ("/v1/completions", {"prompt": prompt, "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}], "stream": True}),
        ("/v1/embeddings", {"input": [prompt[n:] for n in range(0, 100, 10)], "temperature": None}),
    ):
        connection = ask(server, body, path)
        deadline = time.monotonic() + 10
        while not server.stats()["models"][0]["activity"]["active"]:
            assert time.monotonic() < deadline
        time.sleep(0.1)
        connection.close()
        started = time.monotonic()
        found = server.quiet()
        assert time.monotonic() - started < 1.5, path
    assert found["models"][0]["activity"]["prompt_tokens_total"] - computed < 10_000


def test_a_storm_of_clients_that_leave(server: ServerProcess) -> None:
    server.quiet()
    before = server.files(), server.threads()
    refused = 0

    def leave(number: int) -> int:
        body = {"prompt": f"{number}:", "max_tokens": 500, "stream": number % 2 == 0, "n": 1 + number % 3}
        connection = ask(server, body)
        status = 0
        if number % 4 == 0:  # after the first bytes
            answer = connection.getresponse()
            status = answer.status
            answer.read(10)
            answer.close()
        elif number % 4 == 1:
            time.sleep(0.002 * (number % 50))
        if number % 5 == 0 and connection.sock is not None:  # not even a proper end
            linger = b"\1\0\0\0\0\0\0\0"
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
        return status

    with ThreadPoolExecutor(32) as threads:
        for status in threads.map(leave, range(300)):
            assert status in (0, 200, 503)
            refused += status == 503
    server.quiet(20)
    deadline = time.monotonic() + 10
    while server.files() > before[0] or server.threads() > before[1]:
        assert time.monotonic() < deadline, (before, server.files(), server.stats()["threads"])
        time.sleep(0.05)
    text, _ = read_stream(ask(server, {"prompt": "1, 2, 3, 4, 5,", "max_tokens": 6, "stream": True}))
    assert text == " 6, 7,"


def test_slow_readers_do_not_hold_up_others(server: ServerProcess) -> None:
    slow = [ask(server, {"prompt": "x", "max_tokens": 300, "stream": True, "logprobs": 20}) for _ in range(2)]
    started = time.monotonic()
    text, _ = read_stream(ask(server, {"prompt": "1, 2, 3, 4, 5,", "max_tokens": 6, "stream": True}))
    assert text == " 6, 7," and time.monotonic() - started < 10
    for connection in slow:
        connection.close()
    server.quiet()
