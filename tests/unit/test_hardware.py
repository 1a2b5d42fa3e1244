"""The probe, against /proc, psutil, real control groups, and file trees made after the kernel's documents."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from rich.console import Console

from tensortier import hardware, system
from tensortier.errors import BackendError, LibraryError
from tensortier.types import Device

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the files of Linux")
GIB = 2**30
V1 = "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V1_CPU = "36 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "35 31 0:32 {root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def meminfo(total: int, available: int) -> str:
    return f"MemTotal: {total // 1024} kB\nMemAvailable: {available // 1024} kB\nSwapTotal: 2048 kB\n"


def machine(root: Path, mounts: str, group: str, files: dict[str, str]) -> Path:
    fixed = {
        "proc/meminfo": meminfo(64 * GIB, 40 * GIB),
        "proc/self/mountinfo": mounts,
        "proc/self/cgroup": group,
    }
    return make(root, fixed | files)


@linux
def test_memory_without_a_group_is_what_the_kernel_says(tmp_path: Path) -> None:
    found = system.memory(machine(tmp_path, "", "0::/\n", {}))
    assert found == system.Memory(64 * GIB, 64 * GIB, 40 * GIB, 2 * 2**20)


@linux
def test_memory_v1_limit_of_an_ancestor_binds(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory"
    root = machine(
        tmp_path,
        V1.format(root="/"),
        "4:memory:/a/b\n0::/\n",
        {
            f"{top}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{top}/memory.usage_in_bytes": f"{50 * GIB}\n",
            f"{top}/a/memory.limit_in_bytes": f"{8 * GIB}\n",
            f"{top}/a/memory.usage_in_bytes": f"{5 * GIB}\n",
            f"{top}/a/memory.stat": f"inactive_file 7\ntotal_inactive_file {2 * GIB}\n",
            f"{top}/a/memory.use_hierarchy": "1\n",
            f"{top}/a/b/memory.limit_in_bytes": "9223372036854771712\n",
            f"{top}/a/b/memory.usage_in_bytes": "1\n",
        },
    )
    found = system.memory(root)
    assert (found.limit, found.available) == (8 * GIB, 5 * GIB)
    (root / top / "a/memory.use_hierarchy").write_text("0\n")  # then /a does not count what is in /a/b
    assert system.memory(root).limit == 64 * GIB


@linux
def test_memory_v2_tightest_of_the_chain_binds_each_figure(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    root = machine(
        tmp_path,
        V2.format(root="/"),
        "0::/user/app\n",
        {
            f"{top}/user/memory.max": f"{16 * GIB}\n",
            f"{top}/user/memory.high": "max\n",
            f"{top}/user/memory.current": f"{15 * GIB}\n",
            f"{top}/user/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            f"{top}/user/app/memory.max": "max\n",
            f"{top}/user/app/memory.high": f"{12 * GIB}\n",
            f"{top}/user/app/memory.current": f"{2 * GIB}\n",
        },
    )
    found = system.memory(root)
    assert found.limit == 12 * GIB  # of the inner group
    assert found.available == 2 * GIB  # of the outer one: 16 - 15 + 1
    (root / top / "user/memory.current").write_text(f"{20 * GIB}\n")
    assert system.memory(root).available == 0


@linux
@pytest.mark.parametrize("group", ["/docker/abc", "/", "/../elsewhere"])
def test_memory_in_a_container(tmp_path: Path, group: str) -> None:
    """The mount shows the container's part of the tree only; the group is told from either root."""
    mounts = V1.format(root="/docker/abc")
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    }
    found = system.memory(machine(tmp_path, mounts, f"4:memory:{group}\n", files))
    assert (found.limit, found.available) == (4 * GIB, 3 * GIB)


@linux
def test_cpu_quota_v1_and_v2(tmp_path: Path) -> None:
    v1 = machine(
        tmp_path / "1",
        V1_CPU,
        "1:cpu,cpuacct:/a/b\n",
        {
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "350000\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n",
        },
    )
    assert system.usable_cpus(v1, 16) == 3
    v2 = machine(
        tmp_path / "2", V2.format(root="/"), "0::/x\n", {"sys/fs/cgroup/x/cpu.max": "50000 100000\n"}
    )
    assert system.usable_cpus(v2, 16) == 1
    (v2 / "sys/fs/cgroup/x/cpu.max").write_text("max 100000\n")
    assert system.usable_cpus(v2, 16) == 16


def cores(root: Path, siblings: list[str], **per_core: list[int]) -> Path:
    files = {"sys/devices/system/cpu/online": f"0-{len(siblings) - 1}\n"}
    for n, text in enumerate(siblings):
        files[f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list"] = text + "\n"
        for name, values in per_core.items():
            files[f"sys/devices/system/cpu/cpu{n}/{name.replace('__', '/')}"] = f"{values[n]}\n"
    return make(root, files)


@linux
def test_cores_of_an_intel_hybrid(tmp_path: Path) -> None:
    root = cores(tmp_path, ["0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7"])
    make(root, {"sys/devices/cpu_core/cpus": "0-3\n", "sys/devices/cpu_atom/cpus": "4-7\n"})
    found = system.cpu(root)
    assert (found.logical_cores, found.physical_cores, found.performance_cores) == (8, 6, 2)


@linux
def test_cores_of_arm_clusters_and_of_equal_cores(tmp_path: Path) -> None:
    alone = [str(n) for n in range(8)]
    arm = cores(tmp_path / "arm", alone, cpu_capacity=[325] * 4 + [800] * 3 + [1024])
    make(arm, {"proc/cpuinfo": "processor: 0\nFeatures : fp asimd asimddp sve2\n"})
    found = system.cpu(arm)
    assert (found.physical_cores, found.performance_cores) == (8, 4)
    assert found.features == ("asimd", "asimddp", "sve2")
    assert found.model == "unknown"
    favoured = cores(tmp_path / "x86", alone, cpufreq__cpuinfo_max_freq=[5_700_000] * 2 + [5_400_000] * 6)
    assert system.cpu(favoured).performance_cores == 8
    dense = cores(tmp_path / "c", alone, cpufreq__cpuinfo_max_freq=[5_100_000] * 2 + [3_300_000] * 6)
    assert system.cpu(dense).performance_cores == 2


@linux
def test_real_machine_agrees_with_psutil() -> None:
    found = system.cpu()
    # what is available changes while it is looked at
    before = psutil.virtual_memory().available
    memory = system.memory()
    after = psutil.virtual_memory().available
    assert found.logical_cores == psutil.cpu_count()
    assert found.physical_cores == psutil.cpu_count(logical=False)
    assert 1 <= found.usable_cpus <= len(os.sched_getaffinity(0))
    assert memory.total == psutil.virtual_memory().total
    assert 0 < memory.available <= memory.limit <= memory.total
    assert memory.available <= max(before, after) + GIB // 4
    assert found.model in Path("/proc/cpuinfo").read_text() or found.model == "unknown"


PROBE_IN_GROUP = """
import json, os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
from tensortier import system
first = system.memory()
held = bytearray(os.urandom(1)) * (128 << 20)
second = system.memory()
print(json.dumps([first.limit, first.available, second.available]))
"""


@linux
def test_probe_inside_a_real_control_group() -> None:
    groups = [(f, v) for f, v in system._control_groups(Path("/"), "memory")]
    folder = None
    for above, version in groups:
        try:
            folder = above / f"tensortier-test-{os.getpid()}"
            folder.mkdir()
            limit_file = folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")
            limit_file.write_text(str(512 << 20))
            break
        except OSError:
            if folder is not None and folder.is_dir():
                folder.rmdir()
            folder = None
    if folder is None:
        pytest.skip("this user may not make a control group with a memory limit")
    try:
        argv = [sys.executable, "-c", PROBE_IN_GROUP, str(folder / "cgroup.procs")]
        answer = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    finally:
        remove_group(folder)
    limit, before, after = json.loads(answer.stdout)
    assert limit == 512 << 20
    assert (380 << 20) < before <= limit
    assert abs((before - after) - (128 << 20)) < 16 << 20


def remove_group(folder: Path) -> None:
    """The kernel may still be busy with the last process of it."""
    end = time.monotonic() + 60
    while True:
        try:
            folder.rmdir()
        except OSError as exc:
            if exc.errno != errno.EBUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return


def test_drive_of_a_name_that_begins_with_a_tilde_and_no_user() -> None:
    assert system.drive("~no such user/x").total > 0


def test_drive_of_real_paths(tmp_path: Path) -> None:
    found = system.drive(tmp_path / "not" / "there" / "yet")
    usage = psutil.disk_usage(str(tmp_path))
    assert found.total == usage.total
    assert found.kind in ("nvme", "ssd", "hdd", "network", "memory", "unknown")
    if sys.platform == "linux":
        by_df = subprocess.run(
            ["df", "--output=target,fstype", str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout.split()
        assert [found.mount_point, found.filesystem] == by_df[-2:]
        assert system.drive("/dev/shm").kind == "memory"
        assert system.drive("/proc/self").kind == "unknown"


def block(root: Path, number: str, device: str, files: dict[str, str]) -> None:
    """A block device as sysfs shows it: a folder, and a link by number."""
    home = root / "sys/devices/x/block" / device
    make(home, files)
    home.mkdir(parents=True, exist_ok=True)
    (root / "sys/dev/block").mkdir(parents=True, exist_ok=True)
    (root / "sys/dev/block" / number).symlink_to(home)


@linux
@pytest.mark.parametrize(
    ("device", "files", "kind"),
    [
        ("nvme0n1/nvme0n1p2", {"partition": "2"}, "nvme"),
        ("sda", {"queue/rotational": "1\n", "device/vendor": "ATA     \n"}, "hdd"),
        ("sda", {"queue/rotational": "0\n", "device/vendor": "ATA     \n"}, "ssd"),
        ("sda", {"queue/rotational": "1\n", "device/vendor": "QEMU    \n"}, "unknown"),
        ("vda", {"queue/rotational": "0\n"}, "unknown"),
        ("mmcblk0", {"queue/rotational": "0\n"}, "unknown"),
    ],
)
def test_drive_kinds(tmp_path: Path, device: str, files: dict[str, str], kind: str) -> None:
    make(tmp_path, {"proc/self/mountinfo": "27 1 8:2 / / rw - ext4 /dev/x rw\n"})
    block(tmp_path, "8:2", device, files)
    assert system.drive("/", tmp_path).kind == kind


@linux
def test_drive_through_the_device_mapper_and_over_the_network(tmp_path: Path) -> None:
    mounts = "27 1 253:0 / / rw - ext4 /dev/mapper/root rw\n28 27 0:50 / /usr rw - nfs4 server:/usr rw\n"
    make(tmp_path, {"proc/self/mountinfo": mounts})
    block(tmp_path, "259:0", "nvme0n1", {})
    block(tmp_path, "8:0", "sda", {"queue/rotational": "1\n"})
    block(tmp_path, "253:0", "dm-0", {})
    slaves = tmp_path / "sys/devices/x/block/dm-0/slaves"
    slaves.mkdir()
    (slaves / "nvme0n1").symlink_to(tmp_path / "sys/dev/block/259:0")
    assert system.drive("/etc", tmp_path).kind == "nvme"
    (slaves / "sda").symlink_to(tmp_path / "sys/dev/block/8:0")
    assert system.drive("/etc", tmp_path).kind == "unknown"  # half on each
    over_nfs = system.drive("/usr/bin", tmp_path)
    assert (over_nfs.kind, over_nfs.device, over_nfs.mount_point) == ("network", "server:/usr", "/usr")


def test_probe_lists_the_remote_device_and_prints(rpc_device: str) -> None:
    found = hardware.probe(rpc=[rpc_device])
    assert found.devices[0].name == "CPU"
    remote = [d for d in found.devices if d.backend == "RPC"]
    assert len(remote) == 1
    assert rpc_device in remote[0].name + remote[0].description
    assert remote[0].kind == "gpu"
    assert remote[0].memory_total == psutil.virtual_memory().total  # the server is on this machine
    assert json.loads(json.dumps(hardware.to_json(found)))["ram_total"] == found.ram_total
    out = io.StringIO()
    hardware.render(found, Console(file=out, width=200))
    assert rpc_device in out.getvalue()


def test_probe_of_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody else can listen there, and it does not
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(LibraryError, match=rf"no RPC server answers at {re.escape(address)}\b"):
            hardware.probe(rpc=[address])


@pytest.mark.parametrize(
    ("answer", "stays", "told"),
    [
        (b"", False, "no ggml RPC server|no RPC server answers"),
        (
            b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            False,
            "no ggml RPC server",
        ),
        (b"\xff" * 4096, True, "no ggml RPC server"),
        (b"", True, "does not answer within"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", True, "does not answer within"),
    ],
)
def test_a_port_where_something_else_listens(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, stays: bool, told: str
) -> None:
    from tensortier._llama import devices

    # a short time only where it has to pass
    monkeypatch.setattr(devices, "_RPC_SECONDS", 0.3 if told.startswith("does not answer") else 120)
    over = threading.Event()

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(33, socket.MSG_WAITALL)
            with contextlib.suppress(OSError):  # the other side may have heard enough
                connection.sendall(answer)
            if stays:
                over.wait(120)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        try:
            with pytest.raises(BackendError, match=told):
                devices._greet(f"127.0.0.1:{port}", "127.0.0.1", port)
        finally:
            over.set()
            thread.join()


def test_a_server_that_answers_a_byte_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the time is over, between two bytes or in the middle of waiting for one."""
    from tensortier._llama import devices

    now = 0.0

    class Slow(contextlib.nullcontext[None]):
        def __enter__(self) -> Any:
            return self

        def sendall(self, _data: bytes) -> None:
            pass

        def settimeout(self, seconds: float) -> None:
            assert seconds > 0

        def recv(self, _size: int) -> bytes:
            nonlocal now
            now += 0.5
            return b"x"

    monkeypatch.setattr(devices, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(devices.socket, "create_connection", lambda *_, **__: Slow())
    with pytest.raises(BackendError, match="does not answer within 5 s"):
        devices._greet("h:1", "h", 1)
    assert now == 5.0


def test_details_only_where_it_is_certain_which_card_is_which() -> None:
    def cuda(n: int, name: str) -> Device:
        return Device(f"CUDA{n}", "gpu", name, 1, 1, "CUDA")

    cards = [{"index": 0, "name": "A"}, {"index": 1, "name": "B"}, {"index": 2, "name": "B"}]
    devices = [cuda(0, "A"), cuda(1, "B"), cuda(2, "B"), Device("RPC0", "gpu", "A", 1, 1, "RPC")]
    details = [d.details for d in hardware._with_details(devices, cards)]
    assert details == [cards[0], {}, {}, {}]


def test_details_by_pci_address() -> None:
    cards = [
        {"name": "A", "pci_bus_id": "00000000:01:00.0"},
        {"name": "A", "pci_bus_id": "00000000:C1:00.0"},
    ]
    devices = [
        Device("CUDA0", "gpu", "A", 1, 1, "CUDA", device_id="0000:c1:00.0"),
        Device("Vulkan0", "gpu", "A", 1, 1, "Vulkan", device_id="0000:01:00.0"),
        Device("Vulkan1", "gpu", "A", 1, 1, "Vulkan", device_id="0000:07:00.0"),
    ]
    details = [d.details for d in hardware._with_details(devices, cards)]
    assert details == [cards[1], cards[0], {}]
