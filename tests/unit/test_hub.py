"""References, quantizations in files' names, and the hub's answers, from a hub on loopback that huggingface_hub itself
understands."""

from __future__ import annotations

import hashlib
import io
import socket
import urllib.error
from collections.abc import Iterator
from datetime import UTC, datetime
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest

from tensortier import hub
from tensortier.errors import RemoteError, UsageError
from tensortier.hub import HubFile, HubModel, Reference
from tests.hub_server import Hub


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as server:
        server.put("tiny/llama-GGUF", "llama-Q4_K_M.gguf", b"4" * 4000)
        server.put("tiny/llama-GGUF", "llama-Q8_0.gguf", b"8" * 8000)
        server.put("tiny/llama-GGUF", "mmproj-F16.gguf", b"m" * 2000)
        server.put("tiny/llama-GGUF", "README.md", b"hello")
        server.put("tiny/llama-GGUF", "small.gguf", b"few")
        for number in (1, 2, 3):
            server.put("big/Llama-GGUF", f"Q6_K/big-Q6_K-{number:05d}-of-00003.gguf", b"%d" % number * 3000)
        server.put("big/Llama-GGUF", "BF16/big-BF16-00001-of-00002.gguf", b"b" * 3000)
        server.put("other/qwen", "qwen.gguf", b"q" * 3000)
        yield server


@pytest.fixture
def server(served: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    served.faults()
    served.clear_log()
    return served


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/repo", Reference("owner/repo")),
        (" owner/repo ", Reference("owner/repo")),
        ("owner/repo:Q4_K_M", Reference("owner/repo", "main", "Q4_K_M")),
        ("owner/repo@v1.0:Q4_K_M", Reference("owner/repo", "v1.0", "Q4_K_M")),
        ("owner/repo@v1.0", Reference("owner/repo", "v1.0")),
        ("hf://owner/repo/file.gguf", Reference("owner/repo", "main", "file.gguf")),
        ("HF://owner/repo@abc/sub/file.gguf", Reference("owner/repo", "abc", "sub/file.gguf")),
        ("hf://owner/repo:IQ2_XXS", Reference("owner/repo", "main", "IQ2_XXS")),
        ("owner/repo/sub/file.gguf", Reference("owner/repo", "main", "sub/file.gguf")),
        ("https://huggingface.co/owner/repo", Reference("owner/repo")),
        ("https://huggingface.co/owner/repo/", Reference("owner/repo")),
        ("hf.co/owner/repo:Q8_0", Reference("owner/repo", "main", "Q8_0")),
        ("https://huggingface.co/owner/repo/tree/main", Reference("owner/repo")),
        (
            "https://huggingface.co/owner/repo/resolve/v2/sub/a%20b.gguf?download=true",
            Reference("owner/repo", "v2", "sub/a b.gguf"),
        ),
        ("https://huggingface.co/o/r/blob/main/x-Q4_0.gguf", Reference("o/r", "main", "x-Q4_0.gguf")),
    ],
)
def test_references(text: str, expected: Reference) -> None:
    assert hub.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "model",
            "owner/",
            "/repo",
            "owner/repo:",
            "owner/repo@",
            "../etc:Q4_0",
            "owner/..",
            "owner//x.gguf",
        ),
        *(
            "https://example.com/owner/repo",
            "own er/repo",
            "owner/repo\0",
            "a/b\n:Q4",
            "owner/re--po",
            ".a/b",
        ),
        *("owner/repo.git", "a/" + "b" * 97, "C:\\models/x", "ow\u00e9/repo"),
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(UsageError):
        hub.parse(text)


# names as uploaders on the hub write them
@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Qwen3-30B-A3B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("gemma-3-270m-it-q4_0.gguf", "Q4_0"),
        ("mistral-7b-instruct-v0.2.Q5_K_S.gguf", "Q5_K_S"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("gpt-oss-120b-MXFP4_MOE-00001-of-00001.gguf", "MXFP4_MOE"),
        ("Qwen2.5-Coder-0.5B-Instruct-IQ4_XS.gguf", "IQ4_XS"),
        ("SmolLM2.F16.gguf", "F16"),
        ("llama-bf16.gguf", "BF16"),
        ("bitnet-TQ1_0.gguf", "TQ1_0"),
        ("phi-2.Q8.gguf", "Q8"),
        ("Qwen3-8B.gguf", ""),  # no label in a model's name
        ("model.gguf", ""),
        ("IQ3_M/thing-00001-of-00001.gguf", "IQ3_M"),
    ],
)
def test_quantization_in_a_name(name: str, label: str) -> None:
    found = HubModel("o/r", 0, 0, (HubFile(name, 10, "0" * 64),))
    (choice,) = hub.choices(found)
    assert choice.quantization == label


def test_the_local_hub_is_one_for_its_own_library(server: Hub, tmp_path: Path) -> None:
    """What the tests rely on: huggingface_hub reads the same from that server, and gets the same bytes."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi(endpoint=server.url).model_info("tiny/llama-GGUF", files_metadata=True)
    theirs = {
        s.rfilename: (s.size, s.lfs.sha256 if s.lfs else None, None if s.lfs else s.blob_id)
        for s in info.siblings or []
        if s.rfilename.endswith(".gguf")
    }
    ours = hub.model("tiny/llama-GGUF")
    assert {f.name: (f.size, f.sha256, f.git_oid) for f in ours.files} == theirs and len(theirs) == 4
    assert ours.revision == info.sha
    listed = {m.id: (m.downloads, m.likes) for m in HfApi(endpoint=server.url).list_models(search="llama")}
    assert {m.repo: (m.downloads, m.likes) for m in hub.search("llama")} == listed
    got = hf_hub_download("tiny/llama-GGUF", "llama-Q4_K_M.gguf", endpoint=server.url, cache_dir=tmp_path)
    assert Path(got).read_bytes() == b"4" * 4000


def test_search(server: Hub) -> None:
    found = hub.search("llama", 5)
    assert [m.repo for m in found] == ["big/Llama-GGUF", "tiny/llama-GGUF"]
    tiny = {f.name: f for f in found[1].files}
    assert set(tiny) == {"llama-Q4_K_M.gguf", "llama-Q8_0.gguf", "mmproj-F16.gguf", "small.gguf"}
    q4 = tiny["llama-Q4_K_M.gguf"]
    assert (q4.size, q4.sha256) == (4000, hashlib.sha256(b"4" * 4000).hexdigest())
    assert not any(m.error for m in found) and len(server.log()) == 3
    assert hub.search("nothing like that") == []
    assert "search=a+%26b%3Dc" in (hub.search("a &b=c"), server.log()[-1]["query"])[1]
    for limit in (0, 101):
        with pytest.raises(UsageError, match="1 to 100"):
            hub.search("llama", limit)


def test_choices(server: Hub) -> None:
    big = hub.model("big/Llama-GGUF")
    bf16, q6 = hub.choices(big)
    assert (q6.name, q6.quantization, q6.size, q6.missing) == ("big-Q6_K", "Q6_K", 9000, 0)
    assert [f.name[-19:-5] for f in q6.files] == ["00001-of-00003", "00002-of-00003", "00003-of-00003"]
    assert bf16.missing == 1
    assert hub.choose(big, "q6_k") == q6 == hub.choose(big, "Q6_K/big-Q6_K-00002-of-00003.gguf")
    with pytest.raises(UsageError, match="1 of its parts"):
        hub.choose(big, "BF16")
    tiny = hub.model("tiny/llama-GGUF")
    assert [c.name for c in hub.choices(tiny)] == ["small", "llama-Q4_K_M", "llama-Q8_0"]
    assert hub.choose(tiny, "mmproj-F16.gguf").files[0].size == 2000  # by its name, a projector too
    with pytest.raises(UsageError, match=r"has 3 models: .*tiny/llama-GGUF:NAME.*llama-Q8_0 \(7.8 KiB\)"):
        hub.choose(tiny, None)
    with pytest.raises(UsageError, match="has no 'Q2_K'"):
        hub.choose(tiny, "Q2_K")
    with pytest.raises(
        UsageError, match=r"no file 'llama-q8_0.gguf'; its GGUF files: llama-Q4_K_M.gguf, llama-Q8"
    ):
        hub.choose(tiny, "llama-q8_0.gguf")
    assert hub.choose(hub.model("other/qwen"), None).name == "qwen"
    with pytest.raises(UsageError, match="no GGUF model"):
        hub.choose(HubModel("o/r", 0, 0, ()), None)


def test_sizes_stand_in_the_question() -> None:
    files = tuple(HubFile(f"m-{q}.gguf", n << 20, "0" * 64) for q, n in (("Q4_K_M", 4100), ("Q8_0", 7900)))
    with pytest.raises(UsageError) as caught:
        hub.choose(HubModel("o/r", 0, 0, files), None)
    assert (
        str(caught.value)
        == "o/r has 2 models: give one of them as o/r:NAME: Q4_K_M (4.0 GiB), Q8_0 (7.7 GiB)"
    )


def test_token_goes_to_the_hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.faults(token="hf_secret")
    with pytest.raises(UsageError, match="HF_TOKEN"):
        hub.model("other/qwen")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert hub.model("other/qwen").files[0].size == 3000
    assert [e["token"] for e in server.log()] == [None, "Bearer hf_secret"]


def test_no_such_repository(server: Hub) -> None:
    with pytest.raises(UsageError, match="the hub has no nobody/nothing@main"):
        hub.model("nobody/nothing")


def test_a_busy_hub(server: Hub) -> None:
    server.faults(busy=1, busy_header={"Retry-After": "7"})
    with pytest.raises(RemoteError, match=r"HTTP 429.*try again in 7 s"):
        hub.search("llama")
    waits: list[float] = []
    server.faults(busy=2, busy_header={"RateLimit": '"api";r=0;t=3'})
    assert hub.model("other/qwen", wait=lambda s, _why: waits.append(s)).files
    assert waits == [3, 3]
    server.faults(busy=3)
    with pytest.raises(RemoteError, match="HTTP 429"):
        hub.model("other/qwen", wait=lambda s, _why: waits.append(s))


def test_a_repository_that_is_gone_hides_no_other(server: Hub) -> None:
    server.faults(gone=["big/Llama-GGUF"])
    gone, there = hub.search("llama")
    assert gone.repo == "big/Llama-GGUF" and "HTTP 401" in gone.error and not gone.files
    assert not there.error and len(there.files) == 4


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 5.0),
        ({"Retry-After": "12"}, 12.0),
        ({"Retry-After": "nonsense"}, 5.0),
        ({"RateLimit": '"resolvers";r=0;t=246'}, 246.0),
    ],
)
def test_when_to_come_back(headers: dict[str, str], expected: float) -> None:
    message = Message()
    for name, value in headers.items():
        message[name] = value
    assert hub.retry_after(urllib.error.HTTPError("u", 429, "busy", message, io.BytesIO())) == expected
    assert hub.retry_after(urllib.error.HTTPError("u", 404, "gone", message, io.BytesIO())) is None


def test_when_to_come_back_as_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    message = Message()
    message["Retry-After"] = "Wed, 21 Oct 2015 07:28:00 GMT"  # RFC 9110, 10.2.3
    then = datetime(2015, 10, 21, 7, 28, tzinfo=UTC).timestamp()
    for now, seconds in ((then - 60, 60), (then, 0), (then + 5, 0)):
        monkeypatch.setattr(hub, "time", SimpleNamespace(time=lambda now=now: now))
        assert hub.retry_after(urllib.error.HTTPError("u", 503, "busy", message, io.BytesIO())) == seconds


@pytest.mark.parametrize(
    "body",
    [
        *("<html>no hub</html>", "", "[" * 100_000, "null", '"text"', "[1]", "{}", '[{"id": 3}]'),
        *('[{"id": "../../etc"}]', '{"id": "a/../b"}', "\xff"),
    ],
)
def test_answers_that_make_no_sense(server: Hub, body: str) -> None:
    server.faults(api_body=body)
    with pytest.raises(RemoteError):
        hub.search("llama")


@pytest.mark.parametrize(
    "body",
    [
        '{"id": "other/qwen", "siblings": 3}',
        '{"id": "other/qwen", "siblings": [1, null, {"rfilename": 3}, {"rfilename": "x.gguf"}]}',
        '{"id": "other/qwen", "siblings": [{"rfilename": "x.gguf", "size": -1}]}',
        '{"id": "other/qwen", "siblings": [{"rfilename": "x.gguf", "size": true}]}',
        '{"id": "other/qwen", "siblings": [{"rfilename": "x.gguf", "size": "9"}], "downloads": "x"}',
    ],
)
def test_files_that_make_no_sense_are_not_there(server: Hub, body: str) -> None:
    server.faults(api_body=body)
    assert hub.model("other/qwen").files == ()


def test_digests_of_another_form_are_none(server: Hub) -> None:
    server.faults(
        api_body='{"id": "o/r", "siblings": [{"rfilename": "x.gguf", "size": 9, "lfs": {"sha256": "../"}}]}'
    )
    assert hub.model("o/r").files == (HubFile("x.gguf", 9, None, None),)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but it does not listen
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(RemoteError, match="cannot be reached"):
            hub.search("llama")
    for broken in ("http://[::1", "http://", "http://no such host", "http://\udcff"):
        monkeypatch.setenv("HF_ENDPOINT", broken)
        with pytest.raises(RemoteError):
            hub.search("llama")
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    with pytest.raises(RemoteError, match="no http:// or https:// address"):
        hub.search("llama")


def test_offline(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RemoteError, match="HF_HUB_OFFLINE"):
        hub.search("llama")
    assert server.log() == []
