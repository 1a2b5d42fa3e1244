"""Does the server keep many streams apart, and are they faster together? 64 clients at a time, for a minute.

    python -m bench.serve_streams [--seconds 60] [--streams 64] [--parallel 16] [--threads 2] [model]

Each client asks again and again for a stream of so many tokens and checks that it is one answer, whole, with the usage
that belongs to it. In every eighth answer a bias forces a token on the model that is the client's own, and each
character is checked: nothing may be lost or mixed. Before that one client does the same alone, a quarter of that time.

Expected: no wrong answer, and about twice the tokens/s of the one client. Alone, each token reads all weights once;
together, a batch of tokens does, so the ceiling is the ratio of batched to single products of this machine's cores
(`python -m bench.batching` shows it without HTTP: 2.03 on two cores). 16 answers are computed at a time and the others
wait, because more in one cache are slower. Nothing goes on afterwards, and no file or thread is left.
"""

from __future__ import annotations

import argparse
import http.client
import json
import tempfile
import threading
import time
from pathlib import Path

from tests.server.process import ServerProcess

FIRST_TOKEN, STEP = 1000, 13  # of the tokens that are forced


class Client:
    """Asks one after the other until the time is over."""

    def __init__(self, server: ServerProcess, model: str, number: int, tokens: int) -> None:
        self._server = server
        self._number = number
        self._forced = {str(FIRST_TOKEN + STEP * number): 100}
        self._body = {"model": model, "prompt": f"Stream {number}:", "temperature": 0, "stream": True}
        self._body["stream_options"] = {"include_usage": True}
        self._tokens = tokens
        self.answers = 0
        self.wrong: list[str] = []
        self._word, _ = self._ask(1, forced=True)

    def run(self, end: float) -> None:
        while time.monotonic() < end:
            length = self._tokens + (self.answers + self._number) % 7
            forced = (self.answers + self._number) % 8 == 0
            text, done = self._ask(length, forced=forced)
            self.answers += 1
            if forced and (text != self._word * length or done != length):
                self.wrong.append(f"{text[:80]!r}, {done} tokens, instead of {self._word!r} x {length}")

    def _ask(self, length: int, *, forced: bool) -> tuple[str, int]:
        """Text and number of tokens."""
        body = self._body | {"max_tokens": length, "logit_bias": self._forced if forced else {}}
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(body))
        answer = connection.getresponse()
        read = answer.read().decode()
        connection.close()
        lines = [line.removeprefix("data: ") for line in read.split("\n\n") if line.startswith("data: ")]
        if answer.status != 200 or lines[-1] != "[DONE]":
            self.wrong.append(f"status {answer.status}, ended with {read[-100:]!r}")
            return "", 0
        chunks = [json.loads(line) for line in lines[:-1]]
        reasons = [c["choices"][0]["finish_reason"] for c in chunks[:-1] if c["choices"][0]["finish_reason"]]
        done = int(chunks[-1]["usage"]["completion_tokens"])
        if len({c["id"] for c in chunks}) != 1 or reasons != ["length" if done == length else "stop"]:
            self.wrong.append(f"chunks of several answers, or {done} of {length} tokens and {reasons}")
        return "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]), done


def measure(server: ServerProcess, clients: list[Client], seconds: float) -> float:
    """Tokens/s of all together, while all are at it; prints what was wrong."""
    threads = [threading.Thread(target=client.run, args=(time.monotonic() + seconds,)) for client in clients]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 10)
    began, before = time.monotonic(), generated(server)
    time.sleep(seconds * 0.9)
    rate = (generated(server) - before) / (time.monotonic() - began)
    for thread in threads:
        thread.join()
    answers = sum(client.answers for client in clients)
    wrong = [text for client in clients for text in client.wrong]
    print(f"{len(clients):3} at a time: {rate:7.1f} tokens/s, {answers} answers, {len(wrong)} wrong")
    if wrong:
        raise SystemExit("\n".join(wrong[:5]))
    return rate


def generated(server: ServerProcess) -> int:
    return int(server.stats()["models"][0]["activity"]["completion_tokens_total"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer, at least")
    args = parser.parse_args()
    options = ["--parallel", str(args.parallel), "--queue", str(args.streams), "--threads", str(args.threads)]
    home = Path(tempfile.mkdtemp())
    with ServerProcess(args.model, "--no-calibrate", *options, home=home) as server:
        server.ready()
        name = server.stats()["models"][0]["name"]
        clients = [Client(server, name, number, args.tokens) for number in range(args.streams)]
        before = server.files(), server.threads()
        alone = measure(server, clients[:1], args.seconds / 4)
        clients[0].answers = 0
        together = measure(server, clients, args.seconds)
        print(f"together {together / alone:.2f} times as fast as one after the other")
        server.quiet()
        time.sleep(1)
        print(f"files and threads before {before}, after {(server.files(), server.threads())}")
        if server.stop() != 0:
            raise SystemExit(f"the server ended with an error: {''.join(server.log)}")


if __name__ == "__main__":
    main()
