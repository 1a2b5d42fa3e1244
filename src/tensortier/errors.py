"""The exception tree.

::

    TensortierError                    every error this package raises on purpose
    ├── UsageError                     the request makes no sense as written         (exit code 2)
    │   ├── ModelNotFound              no such file, and no model of that name
    │   ├── PatternError               a tensor override that is not a regular expression, or names no device
    │   └── PlanError                  a plan that is corrupt, or for another model
    ├── ModelFileError                 the file is not a GGUF that can be read       (exit code 1)
    │   └── RemoteError                the remote file could not be reached
    ├── DownloadError                  a download could not be finished, or is not what was promised
    ├── LibraryError                   llama.cpp or our plug-in is missing or does not match
    │   └── BackendError               a ggml backend module could not be built, loaded or reached
    ├── LoadError                      llama.cpp refused to load the model
    │   └── OutOfMemory                ... because a device has too little memory
    ├── GenerationError                llama.cpp failed while it computed
    │   └── ContextFull                the prompt does not fit in the context
    └── Cancelled                      the caller asked to stop                      (exit code 130)

Messages are one line, say what is wrong and what to do. Foreign errors are translated once, where they
enter, with ``raise ... from exc``.
"""

from __future__ import annotations


class TensortierError(Exception):
    """Base of the tree. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class UsageError(TensortierError):
    exit_code = 2


class ModelNotFound(UsageError):
    pass


class PatternError(UsageError):
    pass


class PlanError(UsageError):
    pass


class ModelFileError(TensortierError):
    pass


class RemoteError(ModelFileError):
    pass


class DownloadError(TensortierError):
    pass


class LibraryError(TensortierError):
    pass


class BackendError(LibraryError):
    pass


class LoadError(TensortierError):
    pass


class OutOfMemory(LoadError):
    pass


class GenerationError(TensortierError):
    pass


class ContextFull(GenerationError):
    pass


class Cancelled(TensortierError):
    exit_code = 130
