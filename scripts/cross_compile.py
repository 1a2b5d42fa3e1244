"""Compiles and links the plug-in for systems that are not here, with the warnings of the build: what does not compile
there is found, but nothing is run.

    pip install ziglang
    python scripts/cross_compile.py [TARGET ...]

Targets are those of zig's C++ compiler; without any: Windows, macOS on both processors, and Linux with another C
library. What is compiled is kept in build/cross and made anew when a source has changed. Exits with 1 where a target
does not compile without a warning.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "build" / "cross"
TARGETS = ("x86_64-windows-gnu", "aarch64-macos", "x86_64-macos", "x86_64-linux-musl")
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"),
)


def sources() -> list[Path]:
    """The files that CMakeLists.txt builds the plug-in of."""
    listed = re.findall(r"native/\w+\.cpp", (ROOT / "CMakeLists.txt").read_text())
    return [ROOT / name for name in listed]


def compiler(target: str) -> list[str]:
    flags = [flag for flag in FLAGS if flag != "-fPIC" or "windows" not in target]
    return [sys.executable, "-m", "ziglang", "c++", "-target", target, *flags]


def build(target: str, environment: dict[str, str]) -> bool:
    """Whether all compiles and links; what the compiler says goes to standard error."""
    folder = OUTPUT / target
    folder.mkdir(parents=True, exist_ok=True)
    headers = max(path.stat().st_mtime for path in (ROOT / "native").glob("*.h"))
    objects, fine = [], True
    for source in sources():
        made = folder / f"{source.stem}.o"
        objects.append(str(made))
        if made.exists() and made.stat().st_mtime > max(headers, source.stat().st_mtime):
            continue
        done = subprocess.run([*compiler(target), "-c", str(source), "-o", str(made)], env=environment)
        fine = fine and done.returncode == 0
    if not fine:
        return False
    library = folder / ("_native.dll" if "windows" in target else "_native.lib.so")
    return (
        subprocess.run(
            [*compiler(target), "-shared", *objects, "-o", str(library)], env=environment
        ).returncode
        == 0
    )


def main() -> int:
    environment = {
        **os.environ,
        "ZIG_GLOBAL_CACHE_DIR": str(OUTPUT / "cache"),
        "ZIG_LOCAL_CACHE_DIR": str(OUTPUT / "cache"),
    }
    failed = [target for target in sys.argv[1:] or TARGETS if not build(target, environment)]
    print(f"does not compile: {', '.join(failed)}" if failed else "compiles everywhere")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
