"""``tensortier models`` as a user starts it, against a hub on loopback that counts what it sends."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub_server import Hub

PROGRAM = [sys.executable, "-m", "tensortier.cli", "models"]
SECONDS = 120  # against hanging only
REPO = "owner/tiny-GGUF"
NAME = "tiny-F16.gguf"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def server(served: Hub, tiny_path: Path) -> Hub:
    shutil.rmtree(served.folder / "owner", ignore_errors=True)
    served.put(REPO, NAME, tiny_path.read_bytes())
    served.faults()
    served.clear_log()
    return served


class User:
    """A home folder of somebody's own."""

    def __init__(self, home: Path, url: str) -> None:
        self.home = home
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "OLLAMA", "LLAMA_"))}
        self.env = {**keep, "HOME": str(home), "HF_ENDPOINT": url, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.models = home / ".cache/tensortier/models"

    def start(self, *arguments: str, **options: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*PROGRAM, *arguments],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            **options,  # type: ignore[call-overload]
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=SECONDS)
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def failed(self, code: int, *arguments: str) -> str:
        """The one error line of a command that ends with that code."""
        result = self.run(*arguments)
        lines = result.stderr.splitlines()
        assert result.returncode == code and result.stdout == "", result
        assert [line for line in lines if "error:" in line] == lines[-1:], result.stderr
        return lines[-1]

    def in_terminal(
        self, *arguments: str, answer: str = "", watch: Callable[[str], None] = lambda _: None
    ) -> tuple[int, str]:
        """Exit code and everything shown of a command that has a terminal; ``answer`` is typed at the question,
        ``watch`` is called with what was shown so far."""
        pid, terminal = pty.fork()
        if pid == 0:
            os.execvpe(
                sys.executable, [*PROGRAM, *arguments], {**self.env, "TERM": "xterm", "COLUMNS": "120"}
            )
        shown = ""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if not select.select([terminal], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(terminal, 65536)
            except OSError:  # the other side is closed
                break
            if not data:
                break
            shown += data.decode(errors="replace")
            watch(shown)
            if answer and "[y/N]" in shown:
                os.write(terminal, f"{answer}\n".encode())
                answer = ""
        os.close(terminal)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown


@pytest.fixture
def user(server: Hub, tmp_path: Path) -> User:
    return User(tmp_path / "home", server.url)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


def test_pull_list_and_use(user: User, server: Hub, tiny_path: Path) -> None:
    result = user.run("pull", REPO)
    path = user.models / REPO / NAME
    assert (result.returncode, result.stdout) == (0, f"{path}\n"), result.stderr
    assert path.read_bytes() == tiny_path.read_bytes() and server.sent() == path.stat().st_size
    assert result.stderr == f"tensortier: tiny-F16: {path.stat().st_size / 2**20:.1f} MiB from {REPO}\n"
    (listed,) = (m for m in json.loads(user.run("list", "--json").stdout) if m["source"] == "tensortier")
    assert (listed["name"], listed["path"], listed["size"]) == ("tiny-F16", str(path), path.stat().st_size)
    for name in ("tiny-F16", f"{REPO}:F16", REPO, str(path)):
        command = [*PROGRAM[:-1], "inspect", name, "--json"]
        inspected = subprocess.run(command, env=user.env, capture_output=True, text=True, timeout=SECONDS)
        assert inspected.returncode == 0, inspected.stderr
    server.clear_log()
    again = user.run("pull", f"hf://{REPO}/{NAME}", "--json")
    found = json.loads(again.stdout)
    digest = hashlib.sha256(tiny_path.read_bytes()).hexdigest()
    assert found["files"] == [{"path": str(path), "size": path.stat().st_size, "sha256": digest}]
    assert found["repo"] == REPO and found["transferred"] == 0 == server.sent()
    assert "here already" in again.stderr


def test_search(user: User, server: Hub) -> None:
    found = json.loads(user.run("search", "tiny", "--json").stdout)
    assert [(m["repo"], [f["name"] for f in m["files"]]) for m in found] == [(REPO, [NAME])]
    shown = user.run("search", "tiny").stdout
    assert REPO in shown and "F16 (" in shown
    assert user.run("search", "nothing").stdout == ""
    user.env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert "cannot be reached" in user.failed(1, "search", "tiny")


def test_killed_at_37_percent_and_resumed(user: User, server: Hub, tiny_path: Path) -> None:
    size = tiny_path.stat().st_size
    cut = size * 37 // 100
    server.faults(stall_at=cut)
    part = user.models / REPO / f"{NAME}.part"
    with user.start("pull", REPO) as process:
        until(lambda: part.exists() and part.stat().st_size == cut)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGKILL
    arrived = part.stat().st_size
    assert not part.with_name(NAME).exists() and part.read_bytes() == tiny_path.read_bytes()[:arrived]
    assert arrived == cut
    left = user.run("list").stderr
    assert f"{REPO}/{NAME} is downloaded to {100 * cut // size} % of" in left
    server.faults()
    server.clear_log()
    result = user.run("pull", REPO)
    assert result.returncode == 0, result.stderr
    assert server.sent() == size - arrived, "only the rest"
    assert part.with_name(NAME).read_bytes() == tiny_path.read_bytes() and not part.exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_keep_what_arrived(user: User, server: Hub, number: signal.Signals, code: int) -> None:
    server.faults(stall_at=5_000_000)
    part = user.models / REPO / f"{NAME}.part"
    with user.start("pull", REPO) as process:
        until(lambda: part.exists() and part.stat().st_size == 5_000_000)
        process.send_signal(number)
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == code and "Traceback" not in err
    assert "MiB are kept: the same command goes on from there" in err
    server.faults()
    server.clear_log()
    assert user.run("pull", REPO).returncode == 0
    assert server.sent() == (server.folder / REPO / NAME).stat().st_size - 5_000_000


def test_cut_by_the_server(user: User, server: Hub, tiny_path: Path) -> None:
    size = tiny_path.stat().st_size
    server.faults(cut_at=size * 37 // 100, cut_times=1)
    result = user.run("pull", REPO)
    assert result.returncode == 0 and f"ended after {size * 37 // 100} of {size} bytes" in result.stderr
    assert server.sent() == size


def test_wrong_content_is_refused(user: User, server: Hub) -> None:
    server.faults(wrong_byte=1_000_000)
    assert "not what the hub has" in user.failed(1, "pull", REPO)
    assert list((user.models / REPO).iterdir()) == []


def test_too_little_room(user: User, server: Hub) -> None:
    server.faults(extra_files=[{"rfilename": "x-Q8_0.gguf", "size": 10**17, "lfs": {"sha256": "0" * 64}}])
    line = user.failed(1, "pull", f"{REPO}:Q8_0")
    assert (
        "too little room on the drive: 90949.5 TiB are to be downloaded" in line and "are free there" in line
    )
    assert not user.models.exists() and not any("resolve" in e["path"] for e in server.log())


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files with setrlimit")
def test_the_system_takes_no_more(user: User, server: Hub, tiny_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))

    with user.start("pull", REPO, preexec_fn=limit) as process:
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1 and "Traceback" not in err
    assert "a file cannot be larger there; what has arrived is kept" in err.splitlines()[-1]
    part = user.models / REPO / f"{NAME}.part"
    assert part.read_bytes() == tiny_path.read_bytes()[: part.stat().st_size] and part.stat().st_size > 10**6
    arrived = part.stat().st_size
    server.clear_log()
    assert user.run("pull", REPO).returncode == 0
    assert server.sent() == tiny_path.stat().st_size - arrived
    assert part.with_name(NAME).read_bytes() == tiny_path.read_bytes()


def test_which_one(user: User, server: Hub) -> None:
    server.put(REPO, "tiny-Q8_0-00001-of-00002.gguf", bytes(3 << 20))
    server.put(REPO, "tiny-Q8_0-00002-of-00002.gguf", bytes(2 << 20))
    size = (server.folder / REPO / NAME).stat().st_size / 2**20
    line = user.failed(2, "pull", REPO)
    assert f"give one of them as {REPO}:NAME: Q8_0 (5.0 MiB), F16 ({size:.1f} MiB)" in line
    assert "has no 'Q3_K_S'" in user.failed(2, "pull", f"{REPO}:Q3_K_S")
    assert "the hub has no owner/nothing" in user.failed(2, "pull", "owner/nothing")
    assert "no model of the hub" in user.failed(2, "pull", "nothing")
    result = user.run("pull", f"{REPO}:q8_0")
    assert result.returncode == 0 and result.stdout.endswith("tiny-Q8_0-00001-of-00002.gguf\n")
    assert (user.models / REPO / "tiny-Q8_0-00002-of-00002.gguf").stat().st_size == 2 << 20


def test_two_pulls_at_once(user: User, server: Hub, tiny_path: Path) -> None:
    server.faults(bytes_per_second=8_000_000)
    with user.start("pull", REPO) as one, user.start("pull", REPO) as two:
        outputs = [p.communicate(timeout=SECONDS) for p in (one, two)]
    assert one.returncode == two.returncode == 0, outputs
    assert outputs[0][0] == outputs[1][0] and server.sent() == tiny_path.stat().st_size
    assert (user.models / REPO / NAME).read_bytes() == tiny_path.read_bytes()


@pytest.mark.parametrize("name", ["../../../evil-Q8_0.gguf", "/tmp/evil-Q8_0.gguf", "con/evil-Q8_0.gguf"])
def test_names_that_lead_elsewhere(user: User, server: Hub, name: str) -> None:
    server.faults(extra_files=[{"rfilename": name, "size": 5, "lfs": {"sha256": "0" * 64}}])
    assert f"refused: the hub calls a file '{name}'" in user.failed(1, "pull", f"{REPO}:Q8_0")
    assert not user.models.exists() and not any("resolve" in e["path"] for e in server.log())


def test_progress_in_a_terminal(user: User, server: Hub, tiny_path: Path) -> None:
    """The server goes on each time that what has arrived is shown."""
    stops = [3_000_000, 6_000_000, 9_000_000, 12_000_000]
    amounts = [f"{stop / 2**20:.1f}" for stop in stops]
    step = r"tiny-F16 .*?([0-9.]+)/([0-9.]+) MiB"
    server.faults(stall_at=stops[0])

    def go_on(shown: str) -> None:
        if stops and amounts[-len(stops)] in (done for done, _ in re.findall(step, shown)):
            stops.pop(0)
            server.faults(stall_at=stops[0] if stops else None)

    code, shown = user.in_terminal("pull", REPO, watch=go_on)
    assert code == 0
    steps = re.findall(step, shown)
    assert {done for done, _ in steps} >= {*amounts, f"{tiny_path.stat().st_size / 2**20:.1f}"}
    assert {total for _, total in steps} == {f"{tiny_path.stat().st_size / 2**20:.1f}"}
    assert str(user.models / REPO) in shown.replace("\r\n", "")


def other_programs(user: User, model: Path) -> dict[str, Path]:
    """The same model as Ollama and as huggingface_hub keep it."""
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    ollama = user.home / ".ollama/models"
    blob = ollama / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(parents=True)
    shutil.copyfile(model, blob)
    manifest = ollama / "manifests/registry.ollama.ai/library/tiny/latest"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": 1}
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [layer]}))
    repo = user.home / ".cache/huggingface/hub/models--o--r"
    (repo / "blobs").mkdir(parents=True)
    data = bytearray(model.read_bytes())
    data[-1] ^= 1  # another file, or it would be listed once
    theirs = repo / "blobs" / hashlib.sha256(data).hexdigest()
    theirs.write_bytes(data)
    snapshot = repo / "snapshots/abc/hub-F16.gguf"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(os.path.relpath(theirs, snapshot.parent))
    return {"tiny:latest": blob, "hub-F16": theirs}


def test_verify(user: User, server: Hub, tiny_path: Path) -> None:
    theirs = other_programs(user, tiny_path)
    user.run("pull", REPO)
    ours = user.models / REPO / NAME
    before = tree(user.home)
    result = user.run("verify", "tiny-F16", "tiny:latest", "hub-F16")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "ok       tiny-F16: structure, and SHA-256 of download",
        "ok       tiny:latest: structure, and SHA-256 of Ollama",
        "ok       hub-F16: structure, and SHA-256 of Hugging Face",
    ]
    assert tree(user.home) == before, "reading only"
    for name, path in {"tiny-F16": ours, **theirs}.items():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x10  # in the weights: no header tells
        path.write_bytes(data)
        result = user.run("verify", name)
        assert result.returncode == 1 and "has SHA-256" in result.stdout, result
        assert result.stdout.startswith(f"DAMAGED  {name}: ")
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    ours.write_bytes(ours.read_bytes()[:-1000])
    result = user.run("verify", "--json", "tiny-F16")
    (found,) = json.loads(result.stdout)
    assert result.returncode == 1 and found["damaged"] and "past the end of the file" in found["error"]
    assert "bytes instead of" in found["files"][0]["error"]
    result = user.run("verify")  # everything: the others, the embedded model among them, are still right
    lines = result.stdout.splitlines()
    assert result.returncode == 1 and sum(line.startswith("DAMAGED") for line in lines) == 1
    assert len(lines) >= 3
    outside = user.home / "alone.gguf"
    shutil.copyfile(tiny_path, outside)
    result = user.run("verify", str(outside))
    assert (result.returncode, result.stdout) == (
        0,
        "ok       alone: structure; nobody recorded its SHA-256\n",
    )
    outside.write_bytes(tiny_path.read_bytes()[:-1000])
    assert user.run("verify", str(outside)).returncode == 1
    assert "no file and no model" in user.failed(2, "verify", "nothing")


def test_a_broken_model_is_damaged(user: User, server: Hub) -> None:
    server.put(REPO, "tiny-Q8_0-00001-of-00002.gguf", bytes(2000))
    server.put(REPO, "tiny-Q8_0-00002-of-00002.gguf", bytes(3000))
    assert user.run("pull", f"{REPO}:Q8_0").returncode == 0
    result = user.run("verify", f"{REPO}:Q8_0")
    assert result.returncode == 1 and "not a GGUF file" in result.stdout
    (user.models / REPO / "tiny-Q8_0-00002-of-00002.gguf").unlink()
    result = user.run("verify")
    assert result.returncode == 1 and "part 2 of 2 is missing" in result.stdout
    result = user.run("remove", "--yes", "tiny-Q8_0")
    assert result.returncode == 0, result.stderr
    assert [p for p in user.models.rglob("*") if "00001" in p.name] == []


def test_remove(user: User, server: Hub, tiny_path: Path) -> None:
    other_programs(user, tiny_path)
    user.run("pull", REPO)
    path = user.models / REPO / NAME
    assert "give --yes" in user.failed(2, "remove", "tiny-F16") and path.exists()
    code, shown = user.in_terminal("remove", "tiny-F16", answer="n")
    assert code == 1 and "nothing was deleted" in shown and path.exists()
    assert str(path) in shown
    before = tree(user.home)
    for name, whose in (("tiny:latest", "Ollama"), ("hub-F16", "Hugging Face"), ("smollm2", "")):
        line = user.failed(2, "remove", "--yes", name)
        assert whose in line and "only what `tensortier models pull` fetched is removed" in line
    assert user.failed(2, "remove", "--yes", "tiny-F16", "hub-F16") and path.exists(), "all or nothing"
    assert "no file and no model" in user.failed(2, "remove", "--yes", "nothing")
    assert "/etc/passwd" in user.failed(2, "remove", "--yes", "/etc/passwd")
    assert tree(user.home) == before
    size = sum(p.stat().st_size for p in path.parent.iterdir())
    code, shown = user.in_terminal("remove", f"{REPO}:F16", answer="y")
    assert code == 0 and f"{size / 2**20:.1f} MiB freed" in shown
    assert not path.exists() and list(user.models.iterdir()) == []
    ours = str(user.models.relative_to(user.home))
    assert {p: what for p, what in before.items() if not p.startswith((ours, ".cache/tensortier/locks"))} == {
        p: what for p, what in tree(user.home).items() if not p.startswith((ours, ".cache/tensortier/locks"))
    }, "nothing else has changed"
    user.run("pull", REPO)
    result = user.run("remove", "--yes", "--json", str(path))
    found = json.loads(result.stdout)
    assert found["freed"] == size and sorted(found["files"]) == [str(path), f"{path}.json"]


def test_remove_what_has_arrived(user: User, server: Hub) -> None:
    server.faults(stall_at=5_000_000)
    part = user.models / REPO / f"{NAME}.part"
    with user.start("pull", REPO) as process:
        until(lambda: part.exists() and part.stat().st_size == 5_000_000)
        assert "is being downloaded by another process" in user.failed(1, "remove", "--yes", REPO)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
    result = user.run("remove", "--yes", f"{REPO}:F16")
    assert result.returncode == 0 and "MiB freed" in result.stdout, result.stderr
    assert list(user.models.iterdir()) == []


def test_a_link_in_our_folder_leads_nowhere(user: User, server: Hub, tiny_path: Path) -> None:
    mine = user.home / "mine.gguf"
    mine.parent.mkdir()
    shutil.copyfile(tiny_path, mine)
    link = user.models / "owner/linked/linked.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to(mine)
    result = user.run("remove", "--yes", "linked")
    assert result.returncode == 0 and "0 B freed" in result.stdout
    assert mine.exists() and not link.is_symlink()
