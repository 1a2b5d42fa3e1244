"""What no client should send: right status codes, OpenAI's error object, and nothing left behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tensortier.server.listen import _IDLE_SECONDS as IDLE_SECONDS
from tests.server.conftest import REQUEST_SECONDS
from tests.server.process import PATIENCE, ServerProcess

CHAT: dict[str, Any] = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


@pytest.fixture(autouse=True)
def nothing_is_left(server: ServerProcess) -> Iterator[None]:
    before = server.files(), server.threads()
    yield
    server.quiet()
    end = time.monotonic() + PATIENCE
    while (files := server.files()) > before[0] or server.threads() > before[1]:
        assert time.monotonic() < end, (before, files, server.threads(), server.stats()["threads"])
        time.sleep(0.05)


def post(
    server: ServerProcess, body: bytes | dict[str, Any], path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        connection.request("POST", path, data, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def refused(found: tuple[int, Any], status: int) -> dict[str, Any]:
    """The error object, after a look at its shape."""
    assert found[0] == status, found
    error = found[1]["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "smollm2",}',
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "\xed\xa0\x80"}',
        json.dumps(CHAT).replace("1", "NaN").encode(),
        json.dumps(CHAT).replace("1", "Infinity").encode(),
        json.dumps(CHAT).encode("utf-16"),
    ],
)
def test_what_is_not_a_json_object(server: ServerProcess, body: bytes) -> None:
    refused(post(server, body), 400)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "god", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": None}, "messages"),
        ({"model": 7}, "model"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 1 << 40}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": "2"}, "n"),
        ({"seed": 1 << 70}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"1": "a"}}, "logit_bias.1"),
        ({"logit_bias": {"\u0661": 1}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": {}}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": []}, "functions"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"model_path": "/etc/passwd"}, "model_path"),
    ],
)
def test_wrong_fields_are_named(server: ServerProcess, change: dict[str, Any], param: str) -> None:
    assert refused(post(server, CHAT | change), 400)["param"] == param


@pytest.mark.parametrize(
    ("path", "start", "member", "end", "param"),
    [
        ("/v1/completions", '"prompt": [', '1,"a",', "1]", "prompt[1]"),
        ("/v1/completions", '"prompt": [', '"a",1,', "1]", "prompt[1]"),
        ("/v1/embeddings", '"input": [', "[{}],", "[{}]]", "input[0][0]"),
        ("/v1/chat/completions", '"messages": [', "1,", "1]", "messages[0]"),
        (
            "/v1/chat/completions",
            '"messages": [{"role": "user", "content": [',
            "1,",
            "1]}]",
            "messages[0].content",
        ),
        ("/v1/chat/completions", '"messages": [{"role": "user", "content": "x"}]', ', "a": 1', "", "a"),
    ],
)
def test_the_first_wrong_member_is_enough(
    server: ServerProcess, path: str, start: str, member: str, end: str, param: str
) -> None:
    """Of a million. Listing them all took a gigabyte and a quarter of a minute, in which nobody else was served."""
    body = '{"model": "smollm2", ' + start + member * (7_000_000 // len(member)) + end + "}"
    started = server.cpu_seconds()
    assert refused(post(server, body.encode(), path), 400)["param"] == param
    assert server.cpu_seconds() - started < 5


def test_a_text_without_end(server: ServerProcess) -> None:
    """Only as much of it is read as would fit; of so many control tokens, reading all would take minutes."""
    started = server.cpu_seconds()
    messages = [{"role": "user", "content": "x"}] * 50_000
    error = refused(post(server, CHAT | {"messages": messages}), 400)
    assert error["code"] == "context_length_exceeded"
    error = refused(post(server, {"prompt": "<|im_end|>" * 800_000}, "/v1/completions"), 400)
    assert error["code"] == "context_length_exceeded"
    assert server.cpu_seconds() - started < 30


def test_wrong_values_that_only_the_engine_sees(server: ServerProcess) -> None:
    refused(post(server, CHAT | {"logit_bias": {"999999999": 1}}), 400)
    refused(post(server, CHAT | {"grammar": "root ::= nothing"}), 400)
    refused(post(server, {"model": "smollm2", "prompt": [999_999_999]}, "/v1/completions"), 400)
    refused(post(server, {"model": "smollm2", "prompt": [-1]}, "/v1/completions"), 400)
    refused(post(server, {"model": "smollm2", "prompt": []}, "/v1/completions"), 400)
    refused(post(server, {"model": "smollm2", "input": ["x", ""]}, "/v1/embeddings"), 400)
    refused(post(server, {"model": "smollm2", "input": "x", "encoding_format": "hex"}, "/v1/embeddings"), 400)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 20_000},
        {"type": "string", "maxLength": 10**9},
        {"type": "string", "minLength": 10**400},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 10**8},
        {"type": "object", "properties": {"maxItems": {"type": "array", "items": {}, "maxItems": 50_000}}},
        {"type": "string", "pattern": "^(ab){1000000000}$"},
        {"type": "string", "pattern": "^a{1,99999}$"},
        {"type": "string", "pattern": "^" + "(" * 5000 + "a" + ")" * 5000 + "$"},
        {"enum": ["x" * 1000] * 500},
        {"$ref": "http://127.0.0.1:1/x"},
        {"$ref": "file:///etc/passwd"},
        {"anyOf": []},
        [],
        7,
    ],
)
def test_schemas_that_would_end_or_fill_the_process(server: ServerProcess, schema: Any) -> None:
    """llama.cpp's parser goes as deep as a grammar nests, and a length is written out in brackets."""
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    refused(post(server, CHAT | {"response_format": asked}), 400)
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    refused(post(server, CHAT | {"tools": [tool], "tool_choice": "required"}), 400)


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000,
        "root ::= " + '"(" [(] ' + "(" * 3000 + '"a"' + ")" * 3000,
        'root ::= "' + "x" * 300_000 + '"',
        'root ::= ("")*',
        'root ::= root "a"',
        "root ::= nothing",
        'root ::= "a\0"',
        'root ::= "a"{3000000000}',
    ],
)
def test_grammars_that_would_end_the_process(server: ServerProcess, grammar: str) -> None:
    refused(post(server, CHAT | {"grammar": grammar}), 400)


def test_long_schemas_and_brackets_in_texts_are_taken(server: ServerProcess) -> None:
    for schema in ({"type": "string", "maxLength": 1000}, {"enum": ["(" * 5000]}):
        asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        assert post(server, CHAT | {"response_format": asked})[0] == 200


def test_harmless_fields_are_taken(server: ServerProcess) -> None:
    harmless = {
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "n": None,
        "stop": None,
    }
    assert post(server, CHAT | harmless | {"reasoning_effort": "low", "parallel_tool_calls": True})[0] == 200
    assert post(server, CHAT, Content_Type="text/plain")[0] == 200
    without_name = {k: v for k, v in CHAT.items() if k != "model"}
    assert post(server, without_name)[1]["model"] == "smollm2"


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1:1/x.gguf",
        "hf://ggml-org/models/tinyllamas/stories15M-q4_0.gguf",
        "smollm2/../smollm2",
        "./smollm2",
        "~/smollm2",
        "smollm2\\..",
        "smollm2%00",
        "C:\\smollm2.gguf",
        "a" * 5000,
    ],
)
def test_only_names_of_models_are_known(server: ServerProcess, name: str, tiny_path: Any) -> None:
    assert refused(server.get(f"/v1/models/{name.replace('%00', '')}x"), 404)["code"] == "model_not_found"
    decoded = name.replace("%2f", "/").replace("%2e", ".").replace("%00", "\0")
    assert refused(post(server, CHAT | {"model": decoded}), 404)["code"] == "model_not_found"
    assert refused(post(server, CHAT | {"model": str(tiny_path)}), 404)["param"] == "model"


def test_unknown_addresses_and_methods(server: ServerProcess) -> None:
    refused(post(server, CHAT, "/v1/chat"), 404)
    refused(post(server, CHAT, "/v1/../v1/models/../chat"), 404)
    assert refused(server.get("/v1/chat/completions"), 405)["code"] == "method_not_allowed"
    for path, methods in (
        ("/v1/chat/completions", "POST"),
        ("/health", "GET, HEAD"),
        ("/api/downloads/x", "DELETE"),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        connection.request("PUT", path, b"x")
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Allow"]) == (405, methods)
        connection.close()
    refused(server.get("/docs"), 404)
    refused(server.get("/openapi.json"), 404)
    for path in ("/../../../../etc/passwd", "/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc/passwd"):
        refused(server.get(path), 404)


def test_ten_megabytes(server: ServerProcess) -> None:
    body = json.dumps(CHAT | {"messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
    assert refused(post(server, body), 413)["code"] == "request_too_large"
    # in pieces of unknown total length
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    pieces = (body[i : i + 100_000] for i in range(0, len(body), 100_000))
    connection.request("POST", "/v1/chat/completions", pieces, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    # who asks before he sends is told before he does
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as raw:
        raw.sendall(head("POST", f"Content-Length: {len(body)}", "Expect: 100-Continue"))
        assert raw.recv(1000).startswith(b"HTTP/1.1 413 ")
    refused(post(server, b"x", Content_Encoding="gzip"), 415)


def head(method: str, *lines: str, path: str = "/v1/chat/completions") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


HALF_SENT = [
    (b"", b""),
    (b"POST /v1/chat/comp", b""),
    (head("POST", "Content-Length: 100")[:-2], b""),
    (head("POST", "Content-Length: 100") + b'{"model"', b"HTTP/1.1 408 "),
    (head("POST", "Transfer-Encoding: chunked") + b"5\r\n{", b"HTTP/1.1 408 "),
    (head("GET", path="/health") + b"GET /he", b"HTTP/1.1 200 "),
]


def test_half_sent_requests_time_out(server: ServerProcess) -> None:
    def received(sent: bytes) -> tuple[bytes, float]:
        """And after how many seconds the server closed the connection."""
        started, found = time.monotonic(), b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as raw:
            raw.sendall(sent)
            with contextlib.suppress(ConnectionResetError):
                while piece := raw.recv(10_000):
                    found += piece
        return found, time.monotonic() - started

    with ThreadPoolExecutor(len(HALF_SENT)) as threads:
        ended = list(threads.map(received, [sent for sent, _ in HALF_SENT]))
    for (sent, answer), (found, seconds) in zip(HALF_SENT, ended, strict=True):
        assert found.startswith(answer) and bool(found) == bool(answer), sent
        assert seconds >= REQUEST_SECONDS, sent
    # none by the time that a connection may be idle; where the machine is busy, all are later
    first, *_, last = sorted(seconds for _, seconds in ended)
    assert last - first < IDLE_SECONDS - REQUEST_SECONDS


def test_half_sent_requests_whose_sender_leaves(server: ServerProcess) -> None:
    for sent in (b"POST", head("POST", "Content-Length: 100") + b"{"):
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", server.port)) as raw:
                raw.sendall(sent)


@pytest.mark.parametrize(
    "sent",
    [b"\0\0\0\0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"A" * 200_000],
)
def test_what_is_not_http(server: ServerProcess, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as raw:
        try:
            raw.sendall(sent)
            assert raw.recv(1000).startswith(b"HTTP/1.1 400 ")
        except ConnectionError:
            pass  # closed while it was sent
    assert server.get("/health")[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:80"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost"}, 200),
        ({"Host": "LOCALHOST:1234"}, 200),
        ({"Host": "127.0.0.1:99"}, 200),
        ({"Host": "127.1.2.3"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "file://"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://localhost:7", "Host": "localhost:7"}, 200),
        ({"Origin": "http://evil.example", "Host": "evil.example"}, 403),
    ],
)
def test_foreign_hosts_and_origins(server: ServerProcess, headers: dict[str, str], status: int) -> None:
    found = post(server, CHAT, **headers)
    if status == 200:
        assert found[0] == 200
    else:
        refused(found, status)
    for path in ("/v1/models", "/health", "/api/models", "/stats", "/"):
        assert server.get(path, **headers)[0] == status


def test_too_many_answers_at_once(server: ServerProcess) -> None:
    refused(post(server, CHAT | {"n": 100}), 400)
    never_ends = {"0": -100, "2": -100}
    long = CHAT | {"n": 70, "max_tokens": 2000, "stream": True, "logit_bias": never_ends}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("POST", "/v1/chat/completions", json.dumps(long))
    answer = connection.getresponse()
    assert answer.status == 200
    second = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    second.request("POST", "/v1/chat/completions", json.dumps(CHAT | {"n": 3}))
    busy = second.getresponse()
    assert refused((busy.status, json.loads(busy.read())), 503)["code"] == "overloaded"
    assert 1 <= int(busy.headers["Retry-After"]) <= 60
    assert post(server, CHAT | {"n": 2, "model": "tiny"})[0] == 200  # each model has places of its own
    second.close()
    connection.close()
    answer.close()
    server.quiet()
    assert post(server, CHAT | {"n": 3})[0] == 200
