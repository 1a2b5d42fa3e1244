"""Systems that do not allow what the reader would like best: it goes on with what there is, says so in one line, and
nothing that is computed changes.

What a system does not allow is made here: a small library that stands before the C library's functions, and a filter
of system calls. Each case is a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tier_runs as runs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stands before glibc's functions")
ROOT = Path(__file__).parents[2]

BEFORE_THE_C_LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int asked(const char * what) {
    const char * case_ = getenv("REFUSED");
    return case_ && strcmp(case_, what) == 0;
}

ssize_t pread(int fd, void * memory, size_t size, off_t offset) {
    static ssize_t (*real)(int, void *, size_t, off_t);
    if (!real) *(void **) &real = dlsym(RTLD_NEXT, "pread");
    if (asked("haste")) {
        static _Atomic unsigned calls;
        const unsigned number = calls++;
        usleep(number % 7 == 3 ? 8000 : number % 5 * 100); /* later ones end earlier */
    }
    if (asked("direct reads") && (fcntl(fd, F_GETFL) & O_DIRECT)) {
        errno = EINVAL;
        return -1;
    }
    return real(fd, memory, size, offset);
}

/* statx: the two fields for direct reads, the second of which is the granularity in the file */
long syscall(long number, ...) {
    static long (*real)(long, ...);
    if (!real) *(void **) &real = dlsym(RTLD_NEXT, "syscall");
    __builtin_va_list list;
    __builtin_va_start(list, number);
    long a[6];
    for (int i = 0; i < 6; ++i) a[i] = __builtin_va_arg(list, long);
    __builtin_va_end(list);
    const long result = real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (number == SYS_statx && result == 0) {
        unsigned value = asked("direct reads, by statx") ? 0 : asked("small sectors") ? 65536 : 1;
        if (value != 1) {
            *(unsigned *) a[4] |= 0x2000;
            memcpy((char *) a[4] + 0x9c, &value, sizeof(value));
        }
    }
    return result;
}

int allowed_threads = 1 << 30;

int pthread_create(pthread_t * thread, const pthread_attr_t * how, void * (*run)(void *), void * with) {
    static int (*real)(pthread_t *, const pthread_attr_t *, void * (*)(void *), void *);
    if (!real) *(void **) &real = dlsym(RTLD_NEXT, "pthread_create");
    return allowed_threads-- > 0 ? real(thread, how, run, with) : EAGAIN;
}
"""

PROGRAM = """
import ctypes, json, os, sys
from pathlib import Path
import numpy as np
from tests import tier_runs as runs
from tensortier.errors import TensortierError

def refuse(number):
    # a filter of system calls (seccomp(2)): this one ends with EPERM
    class Step(ctypes.Structure):
        _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_uint16), ("steps", ctypes.POINTER(Step)))
    steps = (Step * 4)((0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(Program(4, steps)), 0, 0) == 0, ctypes.get_errno()

path, target, reader, call, threads = sys.argv[1:]
plan = runs.tier_plan(Path(path), expert_bytes=runs.expert_bytes(Path(path))[0], reader=reader, queue_depth=8)
from tensortier.tier import PagedWeights
from tensortier._llama.libs import native
native()
if call != "-":
    refuse(int(call))
if threads != "-":
    ctypes.c_int.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "allowed_threads").value = int(threads)
try:
    with runs.tiered(plan) as (model, ctx, paged):
        running = len(os.listdir("/proc/self/task"))
        np.save(target, runs.generate(model, ctx, steps=2))
        stats = paged.stats()
        found = {"reader": stats.reader, "direct": stats.direct, "tasks": running}
        print(json.dumps({**found, "warnings": paged.warnings()}))
except TensortierError as exc:
    print(json.dumps({"error": str(exc)}))
"""


SLOW_DRIVE = """
import sys
from pathlib import Path
import llama_cpp
import numpy as np
from tests import tier_runs as runs

asked = limit = 0


@llama_cpp.ggml_abort_callback
def stop(_):
    global asked
    asked += 1
    return 0 < limit < asked


path, expected = Path(sys.argv[1]), np.load(sys.argv[2])
least, everything = runs.expert_bytes(path)
pattern = r"_exps\\.weight|ffn_(up|gate|down)_shexp|attn_(q|k|v|output)\\.weight"
for policy in ("lru", "second-touch"):
    for budget in (least, (least + everything) // 3):
        plan = runs.tier_plan(
            path, pattern, expert_bytes=budget, dense_bytes=200 << 10, policy=policy, reader="threads", guesses=8,
            queue_depth=6, read_bytes=16 << 10,
        )
        with runs.tiered(plan, abort_callback=stop) as (model, ctx, paged):
            for given_up in (0, 4, 9, 14, 25):  # at which operation a request before it is
                asked, limit = 0, given_up
                runs.decode(ctx, [300])
                limit = 0
                assert np.array_equal(runs.generate(model, ctx, steps=2), expected), (policy, budget)
"""


@pytest.fixture(scope="module")
def expected(path: Path) -> runs.Floats:
    with runs.stock(path) as (model, ctx):
        return runs.generate(model, ctx, steps=2)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, compiled."""
    folder = tmp_path_factory.mktemp("before")
    code, target = folder / "before.c", folder / "before.so"
    code.write_text(BEFORE_THE_C_LIBRARY)
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is needed, as for the plug-in itself"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(target), str(code), "-ldl"], check=True)
    return target


@pytest.fixture
def run(path: Path, before: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], runs.Floats | None]]:
    """What the process says, and the logits where it came to any."""

    def call(
        *, reader: str = "auto", refused: str = "", system_call: int | None = None, threads: int | None = None
    ) -> tuple[dict[str, Any], runs.Floats | None]:
        target = tmp_path / "logits.npy"
        arguments = [str(path), str(target), reader]
        arguments += ["-" if number is None else str(number) for number in (system_call, threads)]
        # beside what a sanitizer has put there
        preload = f"{os.environ.get('LD_PRELOAD', '')} {before}".strip()
        program = PROGRAM.replace('os.environ["LD_PRELOAD"]', repr(str(before)))
        environment = {**os.environ, "LD_PRELOAD": preload, "REFUSED": refused, "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1]), np.load(target) if target.exists() else None

    return call


def test_a_system_that_allows_everything(run: Callable[..., Any], path: Path, expected: runs.Floats) -> None:
    """Shows that what the others find comes from what they refuse."""
    found, logits = run(reader="threads")
    assert found["direct"] == runs.reads_directly(path)
    assert (found["warnings"] == []) == found["direct"]
    assert np.array_equal(logits, expected)


@pytest.mark.parametrize("refused", ["direct reads", "direct reads, by statx", "small sectors"])
def test_direct_reads_that_are_refused(refused: str, run: Callable[..., Any], expected: runs.Floats) -> None:
    """Although the file could be opened for them."""
    found, logits = run(reader="threads", refused=refused)
    assert not found["direct"]
    (line,) = found["warnings"]
    assert "does not allow direct reads" in line
    assert "\n" not in line
    assert np.array_equal(logits, expected)


# io_uring_setup and io_uring_enter have these numbers on every processor
@pytest.mark.parametrize("system_call", [425, 426])
def test_a_system_without_io_uring(system_call: int, run: Callable[..., Any], expected: runs.Floats) -> None:
    found, logits = run(system_call=system_call)
    assert found["reader"] == "threads"
    assert found["warnings"][0] == "this system does not allow io_uring: weights are read by threads"
    assert len(found["warnings"]) == (1 if found["direct"] else 2)
    assert np.array_equal(logits, expected)
    found, logits = run(reader="io_uring", system_call=system_call)
    assert found["error"] == 'this system does not allow io_uring; use the reader "threads"'


def test_fewer_threads_than_wanted(run: Callable[..., Any], expected: runs.Floats) -> None:
    found, logits = run(reader="threads", threads=3)
    assert np.array_equal(logits, expected)
    found, logits = run(reader="threads", threads=0)
    assert found["error"].startswith("no thread can be started to read: ")


def test_reads_that_end_in_any_order(path: Path, before: Path, expected: runs.Floats, tmp_path: Path) -> None:
    """Slowly too: those that nobody needs any more are still under way when others want their place."""
    np.save(tmp_path / "expected.npy", expected)
    environment = {**os.environ, "LD_PRELOAD": str(before), "REFUSED": "haste"}
    arguments = [str(path), str(tmp_path / "expected.npy")]
    done = subprocess.run(
        [sys.executable, "-c", SLOW_DRIVE, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_file_system_in_memory(path: Path, expected: runs.Floats) -> None:
    """Whether it has direct reads depends on the kernel."""
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK) or shutil.disk_usage(folder).free < 4 * path.stat().st_size:
        pytest.skip("no room in a file system in memory")
    copy = folder / f"tensortier-test-{os.getpid()}.gguf"
    try:
        shutil.copy(path, copy)
        for reader in ("auto", "threads"):
            plan = runs.tier_plan(copy, expert_bytes=runs.expert_bytes(path)[0], reader=reader)
            with runs.tiered(plan) as (model, ctx, paged):
                assert np.array_equal(runs.generate(model, ctx, steps=2), expected)
                told = [line for line in paged.warnings() if "direct reads" in line]
                assert bool(told) != paged.stats().direct
    finally:
        copy.unlink(missing_ok=True)
