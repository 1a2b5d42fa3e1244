"""The native tests with the plug-in built under sanitizers: address and undefined behaviour, then thread.

    python scripts/sanitize.py [PYTEST_ARGUMENT ...]

Without arguments all of tests/native; with some, such as ``tests/native/test_tier.py -k policy``, what they choose.
Needs gcc with its sanitizer runtimes (Linux). Exits with 1 when a sanitizer reports anything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The runtime has to be there before anything else, because Python itself is not built with it. Leaks are left
# out: the interpreter keeps memory to its end, and the report would be of that.
RUNS = {
    "address,undefined": (
        "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"},
    ),
    # One thread of OpenMP's: how those wait for each other, in its uninstrumented runtime, the sanitizer does not see.
    "thread": ("libtsan.so", {"TSAN_OPTIONS": "halt_on_error=1", "OMP_THREAD_LIMIT": "1"}),
}
# The plug-in just built stands before the installed one on the package's path.
TESTS = """
import sys, tensortier._llama as package
package.__path__.insert(0, sys.argv[1])
import pytest
# what the plug-in links to, and what memory a process takes, are other things with a sanitizer in it
LINKS = "tests/native/test_plugin.py::test_links_to_nothing_but_the_runtime"
MEMORY = "tests/native/test_scratch.py::test_what_a_process_takes"
LEFT_OUT = ["--deselect", LINKS, "--deselect", MEMORY]
sys.exit(pytest.main(["-p", "no:cacheprovider", *LEFT_OUT, *(sys.argv[2:] or ["tests/native"])]))
"""


def library_path(name: str) -> str:
    """Where the compiler finds a library."""
    command = ["c++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    failed = []
    for sanitizer, (runtime, options) in RUNS.items():
        folder = ROOT / "build" / f"sanitize-{sanitizer.replace(',', '-')}"
        configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
        subprocess.run(
            [*configure, f"-DTENSORTIER_SANITIZE={sanitizer}"], check=True, stdout=subprocess.DEVNULL
        )
        subprocess.run(["cmake", "--build", str(folder)], check=True, stdout=subprocess.DEVNULL)
        # the C++ runtime too, or the sanitizer does not find the function that throws
        found = [library_path(name) for name in (runtime, "libstdc++.so")]
        environment = {**os.environ, **options, "LD_PRELOAD": " ".join(found)}
        print(f"--- {sanitizer}", flush=True)
        done = subprocess.run(
            [sys.executable, "-c", TESTS, str(folder), *sys.argv[1:]], cwd=ROOT, env=environment
        )
        if done.returncode:
            failed.append(sanitizer)
    print(f"failed: {', '.join(failed)}" if failed else "clean")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
