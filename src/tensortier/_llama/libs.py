"""Loads llama.cpp (through its Python bindings) and the native plug-in, once per process."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

from tensortier.errors import LibraryError


class MemoryRow(ctypes.Structure):
    """``tt_memory_row`` of native/tensortier.h; sizes in bytes."""

    _fields_ = (
        ("buffer_type", ctypes.c_char * 64),
        ("device", ctypes.c_char * 128),
        ("weights", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("compute", ctypes.c_uint64),
    )


@functools.cache
def llama() -> Any:
    """The low-level bindings (module ``llama_cpp.llama_cpp``), initialised and with their log captured.

    Raises:
        LibraryError: the bindings are not installed, or their library does not load.
    """
    try:
        import llama_cpp.llama_cpp as bindings
    except (ImportError, OSError, RuntimeError) as exc:
        raise LibraryError(f"llama-cpp-python does not load: {exc}; reinstall tensortier") from exc
    from tensortier._llama import log

    # a failed assertion would otherwise start a debugger, which writes to standard output
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    log.install(bindings)
    bindings.llama_backend_init()
    return bindings


@functools.cache
def _libraries() -> tuple[Any, ...]:
    """libllama; its handle reaches the libraries it depends on too, but not on Windows, where each is asked."""
    main = llama()._lib
    if sys.platform != "win32":
        return (main,)
    folder = Path(main._name).parent
    return (main, *(ctypes.CDLL(str(folder / f"{name}.dll")) for name in ("ggml", "ggml-base", "ggml-cpu")))


def ggml_function(name: str, restype: Any, *argtypes: Any) -> Any:
    """A function of ggml, from the very copy of the library that llama.cpp uses."""
    for library in _libraries():
        try:
            function = library[name]  # one of its own, where getattr gives everybody the same, with its types
        except AttributeError:
            continue
        break
    else:
        raise LibraryError(f"the installed llama.cpp has no function {name}")
    function.restype = restype
    function.argtypes = list(argtypes)
    return function


@functools.cache
def native() -> ctypes.CDLL:
    """The native plug-in, bound to the loaded llama.cpp and checked against it.

    Raises:
        LibraryError: it is not installed, or was built for another version of ggml.
    """
    import tensortier._llama as package

    name = "_native.dll" if sys.platform == "win32" else "_native.lib.so"
    # Two folders where the package is installed for editing: the sources and the built files.
    found = [path for folder in package.__path__ if (path := Path(folder) / name).exists()]
    if not found:
        raise LibraryError(f"the native plug-in ({name}) is missing; reinstall tensortier")
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as exc:
        raise LibraryError(f"the native plug-in does not load: {exc}") from exc
    library.tt_bind.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    library.tt_ggml_version.restype = ctypes.c_char_p
    library.tt_memory_breakdown.argtypes = [ctypes.c_void_p, ctypes.POINTER(MemoryRow), ctypes.c_int]
    library.tt_should_abort.argtypes = [ctypes.c_void_p]
    library.tt_should_abort.restype = ctypes.c_bool
    library.tt_set_flag.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    library.tt_set_flag.restype = None
    error = ctypes.create_string_buffer(512)
    if library.tt_bind(str(llama()._lib._name).encode(), error, len(error)) != 0:
        raise LibraryError(f"the native plug-in refuses: {error.value.decode(errors='replace')}")
    return library
