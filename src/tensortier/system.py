"""What the operating system says of this machine: cores, memory within control-group limits, drives.

On Linux everything is read below ``root``, so that a test can hand in a tree of its own. Where the system
does not say something, the answer is "unknown", never a guess.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tensortier.types import Drive

ROOT = Path("/")

# Cores count as performance cores from these shares of the best one's figure on. Favoured cores of one kind
# differ by a few percent; efficiency cores have at most about half the capacity, or two thirds of the clock.
_CAPACITY_SHARE = 0.6
_FREQUENCY_SHARE = 0.75

# Instruction sets that ggml's CPU kernels ask for, as /proc/cpuinfo names them
_FEATURES = (
    "ssse3 sse4_1 sse4_2 avx f16c fma bmi2 avx2 avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512vbmi "
    "avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16 asimd asimdhp asimddp i8mm bf16 sve sve2 sme vsx"
)
_MEMORY_FILESYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
_NETWORK_FILESYSTEMS = (
    *(
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "afpfs",
        "webdav",
        "ceph",
        "glusterfs",
        "lustre",
        "beegfs",
        "afs",
    ),
    *(
        "fuse.sshfs",
        "fuse.rclone",
        "fuse.s3fs",
        "fuse.gcsfuse",
        "fuse.glusterfs",
        "fuse.davfs",
        "fuse.juicefs",
    ),
)
_BTRFS_READ_AHEAD_KIB = (
    4096  # at least, whatever the drive's is (open_ctree in the kernel's fs/btrfs/disk-io.c)
)
_VIRTUAL_VENDORS = ("QEMU", "VMware", "Msft", "VBOX", "Google", "Amazon", "Red Hat", "Virtio")


@dataclass(frozen=True)
class Cpu:
    model: str
    physical_cores: int
    logical_cores: int
    performance_cores: int
    usable_cpus: int
    features: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    """In bytes. ``limit`` and ``available`` respect the control groups of this process."""

    total: int
    limit: int
    available: int
    swap_total: int


@dataclass(frozen=True)
class _Mount:
    device: str  # major:minor
    root: str  # the part of the file system that is mounted
    point: str
    filesystem: str
    source: str
    options: str


def cpu(root: Path = ROOT) -> Cpu:
    """Cores and instruction sets. Counts are of the whole machine but for ``usable_cpus``."""
    import psutil

    logical = psutil.cpu_count() or os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    performance = physical
    model, features = "unknown", set[str]()
    if sys.platform == "linux":
        model, features = _read_cpuinfo(root)
        if cores := _linux_cores(root):
            logical = sum(len(c) for c in cores)
            physical = len(cores)
            performance = _linux_performance_cores(root, cores)
    elif sys.platform == "darwin":
        model = _sysctl("machdep.cpu.brand_string") or model
        answer = _sysctl("hw.perflevel0.physicalcpu")
        performance = int(answer) if answer.isdigit() else physical
    elif sys.platform == "win32":
        model = _windows_cpu_model() or model
    return Cpu(model, physical, logical, performance, usable_cpus(root, logical), tuple(sorted(features)))


def usable_cpus(root: Path = ROOT, logical: int | None = None) -> int:
    """Logical CPUs that this process can keep busy: affinity, and the control groups' CPU quota.

    A quota of 1.5 CPUs counts as one: a second spinning thread would only be throttled.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity and root == ROOT else logical or os.cpu_count() or 1
    for folder, version in _control_groups(root, "cpu"):
        if version == 2:
            quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        else:
            quota = _read(folder / "cpu.cfs_quota_us").strip()
            period = _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period):
            cpus = min(cpus, max(1, int(quota) // int(period)))
    return cpus


def memory(root: Path = ROOT) -> Memory:
    """Main memory. Within every control group above this process, what is available is the limit minus what
    is used, plus the inactive part of the page cache, which the kernel takes back first."""
    if sys.platform != "linux":
        import psutil

        now = psutil.virtual_memory()
        return Memory(now.total, now.total, now.available, psutil.swap_memory().total)
    info = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc" / "meminfo"), re.MULTILINE))
    total = 1024 * int(info.get("MemTotal", 0))
    limit, available = total, 1024 * int(info.get("MemAvailable", 0))
    for folder, version in _control_groups(root, "memory"):
        if version == 2:
            # above memory.high the kernel throttles the group to a crawl
            limits = [_number(folder / "memory.max"), _number(folder / "memory.high")]
            used, reclaimable = _number(folder / "memory.current"), _statistic(folder, "inactive_file")
        else:
            limits = [_number(folder / "memory.limit_in_bytes")]
            used, reclaimable = (
                _number(folder / "memory.usage_in_bytes"),
                _statistic(folder, "total_inactive_file"),
            )
        # version 1 writes "no limit" as the largest number of pages
        allowed = min((n for n in limits if n is not None), default=total)
        if allowed < total:
            limit = min(limit, allowed)
            available = min(available, max(0, allowed - (used or 0) + reclaimable))
    return Memory(total, limit, available, 1024 * int(info.get("SwapTotal", 0)))


def drive(path: str | Path, root: Path = ROOT) -> Drive:
    """The drive that holds ``path``, or would hold it if it existed."""
    import psutil

    asked = str(path)
    with contextlib.suppress(RuntimeError):  # "~name" of nobody: a name like any other
        path = Path(path).expanduser()
    place = Path(os.path.realpath(path))
    while not place.exists() and place != place.parent:
        place = place.parent
    usage = psutil.disk_usage(str(place))
    if sys.platform == "linux":
        mount = _mount_of(place, root)
        if mount is None:
            return Drive(asked, "unknown", "unknown", "unknown", "unknown", usage.total, usage.free)
        kind = _linux_drive_kind(mount, root)
        read_ahead = _read_ahead(mount, root)
        details = {} if read_ahead is None else {"read_ahead_bytes": read_ahead}
        return Drive(
            asked, mount.point, mount.source, mount.filesystem, kind, usage.total, usage.free, details
        )
    parts = [p for p in psutil.disk_partitions(all=True) if place.is_relative_to(p.mountpoint)]
    if not parts:
        return Drive(asked, "unknown", "unknown", "unknown", "unknown", usage.total, usage.free)
    part = max(parts, key=lambda p: len(p.mountpoint))
    if part.fstype in _NETWORK_FILESYSTEMS:
        kind = "network"
    else:
        kind = _mac_drive_kind(part.device) if sys.platform == "darwin" else "unknown"
    return Drive(asked, part.mountpoint, part.device, part.fstype, kind, usage.total, usage.free)


# --- reading ---------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    """Content of a file of the kernel, empty where this kernel or machine has none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _statistic(folder: Path, key: str) -> int:
    match = re.search(rf"^{key} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
    return int(match[1]) if match else 0


def _sysctl(name: str) -> str:
    answer = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    return answer.stdout.strip()


def _windows_cpu_model() -> str:
    if sys.platform != "win32":
        return ""
    import winreg

    key = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
    with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as opened:
        return str(winreg.QueryValueEx(opened, "ProcessorNameString")[0]).strip()


# --- cores -----------------------------------------------------------------------------------------------


def _read_cpuinfo(root: Path) -> tuple[str, set[str]]:
    text = _read(root / "proc" / "cpuinfo")
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    board = _read(root / "proc" / "device-tree" / "model").strip("\0\n ")  # ARM names no processor
    model = fields.get("model name") or fields.get("cpu model") or fields.get("cpu") or board or "unknown"
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return model, set(_FEATURES.split()) & set(flags)


def _parse_list(text: str) -> frozenset[int]:
    """The kernel's lists: ``0-3,8``."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _linux_cores(root: Path) -> set[frozenset[int]]:
    """The online physical cores, each as its logical CPUs."""
    folder = root / "sys" / "devices" / "system" / "cpu"
    online = _parse_list(_read(folder / "online"))
    found = set()
    for number in online:
        topology = folder / f"cpu{number}" / "topology"
        siblings = _parse_list(_read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list"))
        found.add((siblings & online) or frozenset({number}))
    return found


def _linux_performance_cores(root: Path, cores: set[frozenset[int]]) -> int:
    devices = root / "sys" / "devices"
    if intel := _parse_list(_read(devices / "cpu_core" / "cpus")):  # hybrid processors only
        return sum(1 for core in cores if core & intel) or len(cores)
    figures = (("cpu_capacity", _CAPACITY_SHARE), ("cpufreq/cpuinfo_max_freq", _FREQUENCY_SHARE))
    for name, share in figures:
        values = [_number(devices / "system" / "cpu" / f"cpu{min(core)}" / name) for core in cores]
        known = [v for v in values if v is not None]
        if len(known) == len(cores):
            return sum(1 for v in known if v >= share * max(known))
    return len(cores)


# --- control groups --------------------------------------------------------------------------------------


def _mounts(root: Path) -> list[_Mount]:
    found = []
    for line in _read(root / "proc" / "self" / "mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        a, b = left.split(), right.split()
        if len(a) >= 6 and len(b) >= 3:
            found.append(_Mount(a[2], _unescape(a[3]), _unescape(a[4]), b[0], _unescape(b[1]), b[2]))
    return found


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)


def _control_groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """(folder, version) of this process's control groups that ``controller`` can limit, innermost first."""
    if sys.platform != "linux":
        return
    mounts = _mounts(root)
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        for mount in mounts:
            if version == 2 and mount.filesystem != "cgroup2":
                continue
            if version == 1 and (mount.filesystem != "cgroup" or controller not in mount.options.split(",")):
                continue
            yield from _ancestors(mount, group, root, version)
            break


def _ancestors(mount: _Mount, group: str, root: Path, version: int) -> Iterator[tuple[Path, int]]:
    top = root / mount.point.lstrip("/")
    inside = group.strip("/")
    if mount.root != "/":  # a container sees its own part of the tree only, but is told the whole path
        inside = os.path.relpath(group, mount.root) if (group + "/").startswith(mount.root + "/") else ""
    parts = [p for p in inside.split("/") if p not in ("", ".", "..")]
    for depth in range(len(parts), -1, -1):
        folder = top.joinpath(*parts[:depth])
        # In version 1 a group may be told not to count its children.
        counts = depth == len(parts) or _read(folder / "memory.use_hierarchy").strip() != "0"
        if folder.is_dir() and counts:
            yield folder, version


# --- drives ----------------------------------------------------------------------------------------------


def _mount_of(place: Path, root: Path) -> _Mount | None:
    best: _Mount | None = None
    for mount in _mounts(root):  # of two mounts on one point the later hides the earlier
        if place.is_relative_to(mount.point) and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


def _linux_drive_kind(mount: _Mount, root: Path) -> str:
    if mount.filesystem in _MEMORY_FILESYSTEMS:
        return "memory"
    if mount.filesystem in _NETWORK_FILESYSTEMS:
        return "network"
    block = _block(mount, root)
    return "unknown" if block is None else _block_kind(block)


def _block(mount: _Mount, root: Path) -> Path | None:
    block = root / "sys" / "dev" / "block" / mount.device
    if not block.exists() and mount.source.startswith("/dev/"):  # btrfs: the mount has a number of its own
        block = root / "sys" / "class" / "block" / Path(mount.source).resolve().name
    return block.resolve() if block.exists() else None


def _read_ahead(mount: _Mount, root: Path) -> int | None:
    """Bytes that the kernel reads ahead of what is asked for in a file there; None where nothing says how many (an
    overlay of other file systems, or one of its own device numbers that does not tell)."""
    if mount.filesystem in _MEMORY_FILESYSTEMS:
        return None
    block = _block(mount, root)
    kib = _number(
        root / "sys" / "class" / "bdi" / mount.device / "read_ahead_kb"
    )  # network file systems, FUSE
    if kib is None and block is not None:
        disk = block.parent if (block / "partition").exists() else block
        kib = _number(disk / "queue" / "read_ahead_kb")
        if kib is not None and mount.filesystem == "btrfs":
            kib = max(kib, _BTRFS_READ_AHEAD_KIB)
    return None if kib is None else kib << 10


def _block_kind(block: Path) -> str:
    if (block / "partition").exists():
        return _block_kind(block.parent)
    slaves = sorted((block / "slaves").iterdir()) if (block / "slaves").is_dir() else []
    if slaves:  # device mapper, software RAID
        kinds = {_block_kind(slave.resolve()) for slave in slaves}
        return kinds.pop() if len(kinds) == 1 else "unknown"
    if block.name.startswith("nvme"):
        return "nvme"
    rotational = _read(block / "queue" / "rotational").strip()
    vendor = _read(block / "device" / "vendor").strip()
    # What a virtual disk says of itself is not what it is made of.
    if not block.name.startswith("sd") or vendor.startswith(_VIRTUAL_VENDORS):
        return "unknown"
    return {"0": "ssd", "1": "hdd"}.get(rotational, "unknown")


def _mac_drive_kind(device: str) -> str:
    import plistlib

    answer = subprocess.run(
        ["/usr/sbin/diskutil", "info", "-plist", device], capture_output=True, check=False
    )
    if answer.returncode:
        return "unknown"
    info = plistlib.loads(answer.stdout)
    if info.get("BusProtocol") in ("PCI-Express", "Apple Fabric"):
        return "nvme"
    return {True: "ssd", False: "hdd"}.get(info.get("SolidState"), "unknown")


def operating_system() -> str:
    """Name and version: "Linux 6.1.0"."""
    return f"{platform.system()} {platform.release()}".strip() or "unknown"
