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

from tests.server.conftest import PARALLEL, REQUEST_SECONDS
from tests.server.process import PATIENCE, ServerProcess, until

STREAMS = 64
NEVER_ENDS = {"0": -100, "2": -100}  # the tokens that end a text


def connect(server: ServerProcess) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)


def ask(
    server: ServerProcess, body: dict[str, Any], path: str = "/v1/completions"
) -> http.client.HTTPConnection:
    connection = connect(server)
    connection.request("POST", path, json.dumps({"model": "smollm2", "temperature": 0, **body}))
    return connection


def activity(server: ServerProcess) -> dict[str, int]:
    """Of smollm2's engine."""
    return next(m["activity"] for m in server.stats()["models"] if m["name"] == "smollm2")


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
    server.quiet()
    before = activity(server)["completion_tokens_total"]
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
    total = sum(4 + number % 13 for number in range(STREAMS)) + STREAMS
    server.quiet()
    assert activity(server)["completion_tokens_total"] == before + total


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_engine_at_once(server: ServerProcess, stream: bool) -> None:
    server.quiet()
    asked = {"max_tokens": 4000, "stream": stream, "logit_bias": NEVER_ENDS}
    connections = [ask(server, {"prompt": f"{n}: once upon a time", **asked}) for n in range(PARALLEL + 10)]
    until(lambda: activity(server)["active"] == PARALLEL and server.stats()["answers"] == PARALLEL + 10)
    generated = activity(server)["completion_tokens_total"]
    for connection in connections:
        connection.close()
    server.quiet()
    # a few batches, in place of the thousand that there is room for, and then those of the others
    assert activity(server)["completion_tokens_total"] - generated < 100 * PARALLEL


@pytest.mark.parametrize("kind", ["completion", "chat", "embeddings"])
def test_who_leaves_in_the_middle_of_a_long_prompt(server: ServerProcess, kind: str) -> None:
    numbers = " ".join(str(number) for number in range(1500))  # more than 6000 tokens
    path, body = {
        "completion": ("/v1/completions", {"prompt": numbers, "max_tokens": 1}),
        "chat": (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": numbers}], "stream": True},
        ),
        "embeddings": (
            "/v1/embeddings",
            {"input": [numbers[n:] for n in range(0, 100, 10)], "temperature": None},
        ),
    }[kind]
    server.quiet()
    before = activity(server)["prompt_tokens_total"]
    connection = ask(server, body, path)
    until(lambda: activity(server)["prompt_tokens_total"] > before)  # its first piece
    connection.close()
    server.quiet()
    assert activity(server)["prompt_tokens_total"] - before < (30_000 if kind == "embeddings" else 6000), (
        "all of it"
    )


def test_a_text_that_is_embedded_in_pieces_is_counted_once(server: ServerProcess) -> None:
    server.quiet()
    before = activity(server)["prompt_tokens_total"]
    connection = ask(server, {"input": "word " * 600, "temperature": None}, "/v1/embeddings")
    used = json.loads(connection.getresponse().read())["usage"]["prompt_tokens"]
    connection.close()
    assert used > 512 and activity(server)["prompt_tokens_total"] - before == used


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
            time.sleep(0.002 * (number % 50))  # at any moment
        if number % 5 == 0 and connection.sock is not None:  # not even a proper end
            linger = b"\1\0\0\0\0\0\0\0"
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
        return status

    with ThreadPoolExecutor(32) as threads:
        for status in threads.map(leave, range(300)):
            assert status in (0, 200, 503)
            refused += status == 503
    server.quiet()
    deadline = time.monotonic() + PATIENCE
    while server.files() > before[0] or server.threads() > before[1]:
        assert time.monotonic() < deadline, (before, server.files(), server.stats()["threads"])
        time.sleep(0.05)
    text, _ = read_stream(ask(server, {"prompt": "1, 2, 3, 4, 5,", "max_tokens": 6, "stream": True}))
    assert text == " 6, 7,"


def test_slow_readers_do_not_hold_up_others(server: ServerProcess) -> None:
    """Those who read nothing are let go after REQUEST_SECONDS; others do not wait for that."""
    seconds = []
    while min(seconds, default=REQUEST_SECONDS) >= REQUEST_SECONDS:
        assert len(seconds) < 5, seconds  # once, the machine may be the slow one
        asked = {"prompt": "x", "max_tokens": 300, "stream": True, "logprobs": 20, "logit_bias": NEVER_ENDS}
        slow = [ask(server, asked) for _ in range(2)]
        until(lambda: activity(server)["active"] == 2)
        started = time.monotonic()
        text, _ = read_stream(ask(server, {"prompt": "1, 2, 3, 4, 5,", "max_tokens": 6, "stream": True}))
        seconds.append(time.monotonic() - started)
        assert text == " 6, 7,"
        for connection in slow:
            connection.close()
        server.quiet()
