"""The native plug-in: it links to nothing, binds to the loaded llama.cpp, and refuses any other.

The refusals are shown with real libraries: small ones compiled here that stand before the real libllama and
answer one function differently, so the plug-in sees everything else as it is.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as bindings
import pytest

import tensortier._llama as package
from tensortier._llama.libs import native

PLUGIN = next(p for folder in package.__path__ for p in Path(folder).glob("_native.*"))
LIBLLAMA = Path(bindings._lib._name)


def bind_in_new_process(library: Path) -> tuple[int, str]:
    code = f"""
import ctypes
import re
ctypes.CDLL({str(library)!r})
plugin = ctypes.CDLL({str(PLUGIN)!r})
error = ctypes.create_string_buffer(512)
code = plugin.tt_bind({str(library).encode()!r}, error, ctypes.c_size_t(512))
assert code == 0 or plugin.tt_memory_breakdown(None, None, 0) == -1
print(code, error.value.decode())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    number, _, message = done.stdout.strip().partition(" ")
    return int(number), message


def impostor(tmp_path: Path, source: str) -> Path:
    """A library that defines the given functions and leaves the rest to the real libllama."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "a C compiler is needed, as for the plug-in itself"
    code = tmp_path / "impostor.c"
    code.write_text(source)
    target = tmp_path / "libimpostor.so"
    # the real library under the name that was asked for at build time, found again by its full path
    command = [compiler, "-shared", "-fPIC", "-o", str(target), str(code), "-Wl,--no-as-needed"]
    command += [f"-L{LIBLLAMA.parent}", "-l:" + LIBLLAMA.name, f"-Wl,-rpath,{LIBLLAMA.parent}"]
    subprocess.run(command, check=True)
    return target


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF with readelf")
def test_links_to_nothing_but_the_runtime() -> None:
    out = subprocess.run(["readelf", "-d", str(PLUGIN)], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in out.splitlines() if "NEEDED" in line}
    assert needed <= {
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libm.so.6",
        "libc.so.6",
        "libdl.so.2",
        "libpthread.so.0",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF with nm")
def test_exports_only_its_interface() -> None:
    out = subprocess.run(
        ["nm", "-D", "--defined-only", str(PLUGIN)], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in out.stdout.splitlines() if " T " in line}

    header = (Path(__file__).parents[2] / "native" / "tensortier.h").read_text()
    assert names == set(re.findall(r"^TT_API .*?\b(tt_\w+)\(", header, re.MULTILINE))
    assert len(names) >= 8


def test_binds_to_the_installed_library() -> None:
    assert bind_in_new_process(LIBLLAMA) == (0, "")


def test_version_is_that_of_the_bindings() -> None:
    version = bindings._lib.ggml_version
    version.restype = ctypes.c_char_p
    assert native().tt_ggml_version() == version()


def test_an_impostor_that_changes_nothing_is_accepted(tmp_path: Path) -> None:
    """Shows that the refusals below come from what the impostors change."""
    assert bind_in_new_process(impostor(tmp_path, "int harmless(void) { return 0; }")) == (0, "")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ('const char * ggml_version(void) { return "0.24.9"; }', "for ggml 0.25.3, loaded is 0.24.9"),
        ("#include <stddef.h>\nsize_t ggml_tensor_overhead(void) { return 384; }", "size of ggml_tensor"),
        ('const char * ggml_op_name(int op) { (void)op; return "ADD"; }', "(op)"),
        ("void * ggml_set_name(void * t, const char * n) { (void)n; return t; }", "(name)"),
        ("void ggml_set_input(void * t) { (void)t; }", "(flags)"),
        (
            "#include <stddef.h>\nint a = 3;\nvoid * ggml_backend_reg_get(size_t i) { (void)i; return &a; }",
            "API",
        ),
        # the tables of function pointers, through which our own device is made
        ("int a[64];\nvoid * ggml_backend_dev_backend_reg(void * d) { (void)d; return a; }", "(device)"),
        ("int a;\nvoid * ggml_backend_get_device(void * b) { (void)b; return &a; }", "(backend)"),
        ("void ggml_backend_buffer_set_usage(void * b, int u) { (void)b; (void)u; }", "(buffer usage)"),
    ],
)
def test_another_layout_is_refused(tmp_path: Path, source: str, told: str) -> None:
    code, message = bind_in_new_process(impostor(tmp_path, source))
    assert code == 1
    assert told in message
    assert "\n" not in message


def test_a_library_without_the_functions_is_refused() -> None:
    code, message = bind_in_new_process(PLUGIN)
    assert code == 1
    assert "has no function" in message


def test_a_library_that_is_not_loaded_is_refused() -> None:
    code = f"""
import ctypes
import re
plugin = ctypes.CDLL({str(PLUGIN)!r})
error = ctypes.create_string_buffer(512)
print(plugin.tt_bind(b"/nowhere/libllama.so", error, ctypes.c_size_t(512)), error.value.decode())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 llama.cpp is not loaded from /nowhere")


def test_abort_flag() -> None:
    flag = ctypes.c_int32(0)
    address = ctypes.addressof(flag)
    assert native().tt_should_abort(address) is False
    native().tt_set_flag(address, 1)
    assert flag.value == 1
    assert native().tt_should_abort(address) is True


def test_the_flag_is_seen_by_other_threads() -> None:
    """Set in one thread while another asks in a loop; under the thread sanitizer this shows there is no race."""
    import threading

    flag = ctypes.c_int32(0)
    address = ctypes.addressof(flag)
    asked = threading.Event()

    def ask() -> None:
        while not native().tt_should_abort(address):
            asked.set()

    thread = threading.Thread(target=ask)
    thread.start()
    asked.wait(60)
    native().tt_set_flag(address, 1)
    thread.join(60)
    assert not thread.is_alive()


def test_memory_breakdown_counts_rows_beyond_its_capacity(tiny_path: Path) -> None:
    """The count tells how many rows there are; only as many as fit are written."""
    from tensortier._llama.libs import MemoryRow

    model = bindings.llama_model_load_from_file(
        str(tiny_path).encode(), bindings.llama_model_default_params()
    )
    params = bindings.llama_context_default_params()
    params.n_ctx = 256
    context = bindings.llama_init_from_model(model, params)
    rows = (MemoryRow * 8)()
    guard = b"untouched"
    rows[0].buffer_type = guard
    count = native().tt_memory_breakdown(context, rows, 0)
    assert count >= 1
    assert rows[0].buffer_type == guard
    assert native().tt_memory_breakdown(context, rows, 8) == count
    tensors = gguf.GGUFReader(tiny_path).tensors
    assert sum(row.weights for row in rows) == sum(int(t.n_bytes) for t in tensors)
    assert {row.device for row in rows[:count]} == {b"CPU"}
    bindings.llama_free(context)
    bindings.llama_model_free(model)
