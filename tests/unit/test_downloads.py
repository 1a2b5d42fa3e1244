"""Downloads against a hub on loopback that counts what it sends and breaks as networks do."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tensortier import downloads, hub, modelfiles, transfer, web
from tensortier.downloads import Manager, State
from tensortier.errors import Cancelled, DownloadError, RemoteError, UsageError
from tensortier.hub import HubFile
from tensortier.transfer import Download
from tests.hub_server import Hub

SIZE = 6_000_000
DATA = random.Random(1).randbytes(SIZE)
CUT = SIZE * 37 // 100
SECONDS = 120.0  # after which something hangs
REPO, NAME = "owner/model-GGUF", "model-Q4_0.gguf"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def server(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(transfer, "RETRY_WAITS", (0.0, 0.01, 0.02))
    monkeypatch.setattr(hub, "PAUSE", 0.01)
    monkeypatch.setattr(
        web, "TIMEOUT", 10 * SECONDS
    )  # nothing ends by itself here because a server is silent
    shutil.rmtree(served.folder / "owner", ignore_errors=True)
    served.put(REPO, NAME, DATA)
    served.faults()
    served.clear_log()
    return served


def prepared(wanted: str = NAME, **options: object) -> Download:
    found = hub.model(REPO)
    return Download(REPO, hub.choose(found, wanted).files, revision=found.revision, **options)  # type: ignore[arg-type]


def beside(path: Path) -> set[str]:
    return {p.name for p in path.parent.iterdir()}


def broken_off(server: Hub, at: int = CUT) -> Path:
    """A download that ended at that byte; the path it would have."""
    server.faults(cut_at=at)
    download = prepared()
    with pytest.raises(RemoteError):
        download.run()
    server.faults()
    server.clear_log()
    return download.targets[0]


def test_whole_file(server: Hub) -> None:
    seen: list[tuple[int, int]] = []
    download = prepared(progress=lambda done, total: seen.append((done, total)))
    (path,) = download.run()
    assert path == modelfiles.models_dir() / "owner/model-GGUF" / NAME
    assert path.read_bytes() == DATA and beside(path) == {NAME, f"{NAME}.json"}
    assert seen == sorted(seen) and seen[-1] == (SIZE, SIZE) and len(seen) > 3
    assert download.transferred == SIZE == server.sent() and download.phase == "done"
    record = modelfiles.read_record(path.with_name(f"{NAME}.json"))
    assert record is not None and record.sha256 == hashlib.sha256(DATA).hexdigest()
    assert record.source == f"hf://{REPO}@{hub.model(REPO).revision}/{NAME}"
    assert all(e["token"] is None for e in server.log())
    server.clear_log()
    assert prepared().run() == (path,) and server.sent() == 0  # there already


def test_token_stays_with_the_hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.faults(token="hf_secret")
    prepared().run()
    tokens = {e["path"].split("/")[1]: e["token"] for e in server.log()}
    assert tokens == {"api": "Bearer hf_secret", "owner": "Bearer hf_secret", "cdn": None}


def test_a_cut_connection_goes_on_by_itself(server: Hub) -> None:
    server.faults(cut_at=CUT, cut_times=1)
    lines: list[str] = []
    download = prepared(say=lines.append)
    (path,) = download.run()
    assert path.read_bytes() == DATA
    assert server.sent() == SIZE == download.transferred, "nothing is sent twice"
    assert [e["range"] for e in server.log() if "/cdn/" in e["path"]] == [None, f"bytes={CUT}-"]
    assert lines == [f"{NAME}: the connection ended after {CUT} of {SIZE} bytes; going on in 0.0 s"]


def test_broken_off_at_37_percent_and_resumed(server: Hub) -> None:
    server.faults(cut_at=CUT)
    with pytest.raises(RemoteError, match=rf"ended after {CUT} of {SIZE} bytes; 2.1 MiB are kept"):
        prepared().run()
    assert len(server.log()) == 1 + 2 * (1 + len(transfer.RETRY_WAITS)), "attempts end"
    path = prepared().targets[0]
    assert beside(path) == {f"{NAME}.part", f"{NAME}.part.json"}
    assert path.with_name(f"{NAME}.part").read_bytes() == DATA[:CUT]
    (left,) = modelfiles.unfinished()
    assert (left.record.repo, left.record.file, left.done, left.record.size) == (REPO, NAME, CUT, SIZE)
    server.faults()
    server.clear_log()
    seen: list[int] = []
    again = prepared(progress=lambda done, _total: seen.append(done))
    assert again.missing() == SIZE - CUT
    again.run()
    assert path.read_bytes() == DATA and server.sent() == SIZE - CUT == again.transferred
    assert beside(path) == {NAME, f"{NAME}.json"} and seen[-1] == SIZE


def test_another_content_meanwhile(server: Hub) -> None:
    path = broken_off(server)
    new = random.Random(2).randbytes(SIZE)  # of the same size
    server.put(REPO, NAME, new)
    lines: list[str] = []
    prepared(say=lines.append).run()
    assert path.read_bytes() == new and server.sent() == SIZE
    assert lines == [f"{NAME} has changed since it was begun: it is fetched from the start"]


def test_another_content_that_only_the_etag_tells(server: Hub) -> None:
    """The list of files may be older than the files, on a mirror or at that very moment."""
    path = broken_off(server)
    stale = hub.model(REPO)
    server.put(REPO, NAME, random.Random(2).randbytes(SIZE))
    download = Download(REPO, stale.files)
    with pytest.raises(DownloadError, match="changed on the hub in this moment"):
        download.run()
    assert download.transferred == 0 and not path.exists()
    server.put(REPO, NAME, DATA[:-5])  # and another size
    with pytest.raises(DownloadError, match="changed on the hub"):
        Download(REPO, stale.files).run()
    server.put(REPO, NAME, DATA[: CUT - 5])  # shorter than what is here
    with pytest.raises(DownloadError, match="changed on the hub"):
        Download(REPO, stale.files).run()


def test_wrong_content_is_refused(server: Hub) -> None:
    server.faults(wrong_byte=SIZE // 2)
    download = prepared()
    with pytest.raises(DownloadError, match=r"not what the hub has \(SHA-256 .*refused and deleted"):
        download.run()
    assert beside(download.targets[0]) == set()
    server.faults()
    prepared().run()
    assert download.targets[0].read_bytes() == DATA


def test_a_damaged_beginning_is_fetched_again(server: Hub) -> None:
    """As a power failure may leave it."""
    path = broken_off(server)
    part = path.with_name(f"{NAME}.part")
    part.write_bytes(part.read_bytes()[:-1000] + bytes(1000))
    lines: list[str] = []
    prepared(say=lines.append).run()
    assert path.read_bytes() == DATA and server.sent() == SIZE - CUT + SIZE
    assert any("its beginning was damaged" in line for line in lines)


def test_wrong_end_after_a_right_beginning_is_refused_in_the_end(server: Hub) -> None:
    path = broken_off(server)
    server.faults(wrong_byte=SIZE - 1)
    with pytest.raises(DownloadError, match="not what the hub has"):
        prepared().run()
    assert server.sent() == SIZE - CUT + SIZE, "once more from the start, and no more than that"
    assert not path.exists()


@pytest.mark.parametrize("extra", [0, 1, 5000])
def test_a_beginning_that_is_all_of_it(server: Hub, extra: int) -> None:
    """Ended between the last byte and the renaming; or longer than the file ever was."""
    path = broken_off(server)
    path.with_name(f"{NAME}.part").write_bytes(DATA + bytes(extra))
    prepared().run()
    assert path.read_bytes() == DATA and server.sent() == (SIZE if extra else 0)


def test_a_beginning_without_its_description(server: Hub) -> None:
    path = broken_off(server)
    description = path.with_name(f"{NAME}.part.json")
    for text in ("", "{}", "[1]", "nonsense", '{"version": 2}', "[" * 100_000):
        description.write_text(text)
        assert prepared().missing() == SIZE
    prepared().run()
    assert path.read_bytes() == DATA and server.sent() == SIZE


def test_server_without_ranges(server: Hub) -> None:
    path = broken_off(server)
    server.faults(no_ranges=True)
    prepared().run()
    assert path.read_bytes() == DATA and server.sent() == SIZE


def test_busy_and_broken_servers(server: Hub) -> None:
    download = prepared()
    server.faults(busy=2, busy_header={"Retry-After": "0"})
    download.run()
    assert download.targets[0].read_bytes() == DATA
    download.targets[0].unlink()
    for status, text in ((403, "access denied"), (404, "no such file"), (410, "HTTP 410")):
        server.faults(status=status)
        with pytest.raises(RemoteError, match=text):
            prepared().run()
    server.faults(status=500)
    with pytest.raises(RemoteError, match="HTTP 500"):
        download.run()
    server.faults(busy=9, busy_header={"Retry-After": "3600"})
    with pytest.raises(RemoteError, match="try again in 3600 s"):
        download.run()


def test_small_files_have_gits_digest(server: Hub) -> None:
    server.put(REPO, "tiny-F16.gguf", b"few bytes")
    (path,) = prepared("F16").run()
    assert path.read_bytes() == b"few bytes"
    record = modelfiles.read_record(path.with_name(path.name + ".json"))
    assert record is not None and record.sha256 == hashlib.sha256(b"few bytes").hexdigest()
    assert prepared("F16").run() == (path,)
    path.unlink()
    path.with_name(path.name + ".json").unlink()
    server.faults(wrong_byte=1)
    with pytest.raises(DownloadError, match="git object"):
        prepared("F16").run()


def test_empty_file(server: Hub) -> None:
    server.put(REPO, "none-F16.gguf", b"")
    assert prepared("F16").run()[0].read_bytes() == b""


def test_without_a_digest_nothing_is_fetched() -> None:
    with pytest.raises(DownloadError, match="digest"):
        Download(REPO, [HubFile("x.gguf", 5, None)])


def test_split_model(server: Hub) -> None:
    names = [f"Q8_0/big-Q8_0-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    for i, name in enumerate(names):
        server.put(REPO, name, DATA[i * 1000 : i * 1000 + 2_000_000])
    seen: list[int] = []
    server.faults(cut_at=1_500_000, cut_times=2)
    download = prepared("Q8_0", progress=lambda done, total: seen.append(done))
    found = download.run()
    assert [p.relative_to(download.folder).as_posix() for p in found] == names
    assert [p.read_bytes() for p in found] == [DATA[i * 1000 : i * 1000 + 2_000_000] for i in range(3)]
    assert seen == sorted(seen) and seen[-1] == download.total == 6_000_000 == server.sent()
    found[1].unlink()
    server.clear_log()
    assert prepared("Q8_0").missing() == 2_000_000
    prepared("Q8_0").run()
    assert server.sent() == 2_000_000


def test_too_little_room(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = broken_off(server)
    need = SIZE - CUT + transfer.MARGIN
    for free in (0, need - 1):
        usage = shutil._ntuple_diskusage(10**12, 10**12 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, usage=usage: usage)
        with pytest.raises(
            DownloadError, match=r"too little room on the drive: 3\.6 MiB are to be downloaded"
        ):
            prepared().run()
    assert server.sent() == 0
    usage = shutil._ntuple_diskusage(10**12, 10**12 - need, need)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    prepared().run()
    assert path.read_bytes() == DATA


def test_drive_full_in_the_middle(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own refusal: /dev/full takes no byte."""
    download = prepared()
    path = download.targets[0]
    real = Path.open

    def full(self: Path, mode: str = "r", *args: object, **options: object) -> object:
        to = Path("/dev/full") if mode == "ab" and self.name.endswith(".part") else self
        return real(to, mode, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DownloadError, match="the drive is full; what has arrived is kept"):
        download.run()
    monkeypatch.undo()
    assert not path.exists()


def test_a_file_in_the_way(server: Hub) -> None:
    path = prepared().targets[0]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(DownloadError, match="in the way"):
        prepared().run()
    assert path.read_bytes() == b"mine"
    path.write_bytes(DATA)  # the very same, from elsewhere: it is taken on
    prepared().run()
    assert server.sent() == 0 and path.with_name(f"{NAME}.json").exists()
    server.put(REPO, NAME, DATA[::-1])  # a new version of what was downloaded takes its place
    prepared().run()
    assert path.read_bytes() == DATA[::-1]
    assert prepared().missing() == 0


def test_folder_that_cannot_be_written(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="Not a directory"):
        prepared(folder=tmp_path / "file" / "inside").run()


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../x.gguf",
            "a/../../x.gguf",
            "/etc/x.gguf",
            "a//x.gguf",
            "./x.gguf",
            "..",
            "",
            "a/",
            "\\..\\x.gguf",
        ),
        *(
            "C:\\x.gguf",
            "C:x.gguf",
            "x\0.gguf",
            "x\n.gguf",
            "x\x1b[2J.gguf",
            "x\u202egguf.exe.gguf",
            "x?.gguf",
        ),
        *("con.gguf", "AUX/x.gguf", "nul", "COM1.gguf", "lpt9.x.gguf", "x.gguf.", "x.gguf ", "a /x.gguf"),
        *("x" * 300 + ".gguf", "\ud800.gguf"),
    ],
)
def test_names_that_lead_elsewhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="refused: the hub calls a file"):
        Download(REPO, [HubFile(name, 1, "0" * 64)], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["x.gguf", "Q8_0/x.gguf", "..x.gguf", "console.gguf", "ä ö/ü.gguf", "com10.gguf"]
)
def test_names_that_stay(name: str, tmp_path: Path) -> None:
    (path,) = Download(REPO, [HubFile(name, 1, "0" * 64)], tmp_path).targets
    assert path == tmp_path / name and tmp_path in path.resolve().parents


def test_repositories_that_lead_elsewhere() -> None:
    for repo in ("../x", "a/..", "a", "/a/b", "a/b/c", "a\\b/c"):
        with pytest.raises(UsageError):
            Download(repo, [])


def test_cancel(server: Hub) -> None:
    server.faults(stall_at=1_000_000)  # the server says nothing more, and does not hang up
    download = prepared()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(download.run)
        _until(lambda: download.transferred == 1_000_000)
        download.cancel()
        assert isinstance(running.exception(SECONDS), Cancelled), "without waiting for the server"
    download.cancel()  # once more changes nothing
    arrived = download.targets[0].with_name(f"{NAME}.part").stat().st_size
    assert arrived == download.transferred
    server.faults()
    server.clear_log()
    prepared().run()
    assert server.sent() == SIZE - arrived and download.targets[0].read_bytes() == DATA


def test_cancelled_before_it_begins(server: Hub) -> None:
    download = prepared()
    download.cancel()
    with pytest.raises(Cancelled):
        download.run()
    assert server.sent() == 0


def test_two_at_once(server: Hub) -> None:
    server.faults(stall_at=1_000_000)  # until one of them waits for the other
    lines: list[str] = []
    pair = [prepared(say=lines.append), prepared(say=lines.append)]
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(d.run) for d in pair]
        _until(lambda: lines)
        server.faults()
        for download in running:
            download.result(SECONDS)
    assert sorted(d.transferred for d in pair) == [0, SIZE] and server.sent() == SIZE
    assert pair[0].targets[0].read_bytes() == DATA
    assert lines == ["another process is downloading the same file: waiting for it"]


def test_a_beginning_that_gets_its_name_while_others_look_at_it(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = broken_off(server)
    looked = Path.is_file

    def finished_behind(self: Path, **options: bool) -> bool:
        found = looked(self, **options)
        if found and self.name.endswith(".part"):
            self.rename(path)
        return found

    monkeypatch.setattr(Path, "is_file", finished_behind)
    assert modelfiles.unfinished() == [] and path.exists()
    path.rename(path.with_name(f"{NAME}.part"))
    assert prepared().missing() == SIZE and path.exists()


# the manager


def _until(true: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.fixture
def manager() -> Iterator[Manager]:
    made = Manager()
    yield made
    ends(made)


def ends(manager: Manager) -> None:
    """Nothing of it goes on in the next test."""
    manager.close(SECONDS)
    for thread in downloading():
        thread.join(SECONDS)  # one that had nothing more to do may be about to end
        assert not thread.is_alive()


def downloading() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "download"]


def only(manager: Manager) -> State:
    (state,) = manager.state()
    return state


def test_manager(server: Hub, manager: Manager) -> None:
    steps = (1_000_000, 2_500_000, 5_999_999)
    server.faults(stall_at=steps[0])
    started = manager.start(REPO)
    assert manager.start(REPO) == started, "the same one is not begun twice"
    seen: list[int] = []

    def looked() -> State:
        state = only(manager)
        seen.append(state.done)
        assert state.done <= state.total
        return state

    for step in steps:
        server.faults(stall_at=step)
        _until(lambda step=step: looked().done == step)  # type: ignore[misc]
        assert looked().phase == "downloading"
    server.faults()
    _until(lambda: looked().phase in downloads.ENDED)
    state = only(manager)
    assert (state.id, state.repo, state.file, state.phase) == (started, REPO, NAME, "done")
    assert state.done == state.total == SIZE and Path(state.path).read_bytes() == DATA
    assert seen == sorted(seen) and server.sent() == SIZE
    manager.cancel(started)
    assert manager.state() == ()
    with pytest.raises(UsageError, match="no download"):
        manager.cancel(started)


def test_manager_runs_two_and_queues_the_rest(server: Hub, manager: Manager) -> None:
    for i in range(4):
        server.put(REPO, f"m{i}.gguf", DATA[i : i + 1_000_000])
    server.faults(stall_at=400_000)
    started = [manager.start(REPO, f"m{i}.gguf") for i in range(4)]
    _until(lambda: [s.done for s in manager.state()] == [400_000, 400_000, 0, 0])
    assert [s.phase for s in manager.state()] == ["downloading", "downloading", "queued", "queued"]
    manager.cancel(started[2])
    assert manager.state()[2].phase == "cancelled"
    server.faults()

    def ended() -> bool:
        states = manager.state()
        assert sum(s.phase not in (*downloads.ENDED, "queued") for s in states) <= 2
        return all(s.phase in downloads.ENDED for s in states)

    _until(ended)
    assert [s.phase for s in manager.state()] == ["done", "done", "cancelled", "done"]
    assert not (modelfiles.models_dir() / REPO / "m2.gguf").exists()
    assert not any(e["path"].endswith("m2.gguf") for e in server.log())


def test_manager_cancels_and_goes_on(server: Hub, manager: Manager) -> None:
    server.faults(stall_at=1_000_000)
    first = manager.start(REPO, "Q4_0")
    _until(lambda: only(manager).done == 1_000_000)
    manager.cancel(first)
    assert only(manager).phase == "cancelled"
    server.faults()
    server.clear_log()
    second = manager.start(REPO, "Q4_0")
    assert second != first
    _until(lambda: manager.state()[1].phase == "done")
    assert manager.state()[0].phase == "cancelled" and server.sent() == SIZE - 1_000_000


def test_manager_tells_what_went_wrong(server: Hub, manager: Manager, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        manager.start("../..", "x.gguf")
    wrong = [manager.start("nobody/nothing"), manager.start(REPO, "Q2_K"), manager.start(REPO, "../x.gguf")]
    _until(lambda: all(s.phase == "failed" for s in manager.state()))
    errors = {s.id: s.error for s in manager.state()}
    assert (
        "nobody/nothing" in errors[wrong[0]]
        and "Q2_K" in errors[wrong[1]]
        and "../x.gguf" in errors[wrong[2]]
    )
    server.faults(extra_files=[{"rfilename": "../../evil-Q2_K.gguf", "size": 5, "blobId": "0" * 40}])
    evil = manager.start(REPO, "Q2_K")
    _until(lambda: manager.state()[-1].phase == "failed")
    assert manager.state()[-1].id == evil and "refused" in manager.state()[-1].error
    assert not list(tmp_path.rglob("evil-*")), "the home folder, with the cache in it"
    server.faults(wrong_byte=7)
    manager.start(REPO, NAME)
    _until(lambda: manager.state()[-1].phase == "failed")
    assert "not what the hub has" in manager.state()[-1].error
    json.dumps([s.__dict__ for s in manager.state()])


def test_manager_has_an_end(server: Hub) -> None:
    manager = Manager(longest_queue=2)
    for i in range(4):
        server.put(REPO, f"m{i}.gguf", DATA)
    server.faults(stall_at=0)
    for i in range(4):
        manager.start(REPO, f"m{i}.gguf")
        if i < 2:
            _until(lambda: all(s.phase != "queued" for s in manager.state()))
    phases = [s.phase for s in manager.state()]
    assert phases[2:] == ["queued"] * 2 and not {*phases[:2]} & {"queued", *downloads.ENDED}
    with pytest.raises(UsageError, match="2 downloads are waiting already"):
        manager.start(REPO, "m9.gguf")
    manager.close(SECONDS)  # without waiting for the server, which will not say anything
    assert not downloading()
    assert {s.phase for s in manager.state()} == {"cancelled"}
    with pytest.raises(UsageError, match="ending"):
        manager.start(REPO)
