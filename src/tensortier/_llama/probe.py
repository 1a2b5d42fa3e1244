"""A process that answers memory questions: one JSON plan per line in, one JSON answer per line out.

llama.cpp lays everything out with ``no_alloc``, so an answer takes milliseconds and no memory, whatever the
model's size. It is a process of its own because a header that llama.cpp does not like may end it.

Answer: ``{"memory": [{"device", "weights_bytes", "kv_bytes", "compute_bytes"}, ...], "n_ctx": int}`` or
``{"error": text, "kind": name of the exception}``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

from tensortier import planfile
from tensortier._llama import devices, log, memory
from tensortier._llama.libs import llama
from tensortier._llama.params import LOAD_MODES, Parameters
from tensortier.errors import LoadError, ModelFileError, TensortierError
from tensortier.types import Plan


def ask(plan: Plan) -> dict[str, Any]:
    """Lays a plan out without allocating. Raises the exceptions that loading it would raise."""
    bindings = llama()
    devices.load_modules(plan.rpc)
    parameters = Parameters(plan)
    record = log.Recording()

    model_params = bindings.llama_model_default_params()
    parameters.edit_model(model_params)
    model_params.no_alloc = True
    model_params.load_mode = LOAD_MODES["none"]
    model = bindings.llama_model_load_from_file(os.fsencode(plan.model), model_params)
    if not model:
        raise ModelFileError(f"llama.cpp does not load {plan.model}: {record.reason('no reason given')}")
    try:
        context_params = bindings.llama_context_default_params()
        context_params.n_ctx = plan.settings.n_ctx or bindings.llama_model_n_ctx_train(model)
        parameters.edit_context(context_params)
        context = bindings.llama_init_from_model(model, context_params)
        if not context:
            raise LoadError(f"llama.cpp makes no context: {record.reason('no reason given')}")
        try:
            return {
                "memory": [dataclasses.asdict(row) for row in memory.allocated(context)],
                "n_ctx": bindings.llama_n_ctx(context),
            }
        finally:
            bindings.llama_free(context)
    finally:
        bindings.llama_model_free(model)


def _main() -> int:
    # Libraries print what they like on standard output; the answers have it to themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = ask(planfile.from_dict(json.loads(line)))
        except TensortierError as exc:
            answer = {"error": str(exc), "kind": type(exc).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(_main())
