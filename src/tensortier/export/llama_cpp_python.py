"""llama-cpp-python: a program that loads the model as the plan says and answers one question.

The class ``Llama`` has no arguments for devices, tensor overrides, "auto" flash attention, sequences, load
modes and repacking. The program fills in those fields of llama.cpp's parameters just before they are used.
"""

from __future__ import annotations

import json

from tensortier.errors import PlanError
from tensortier.export import common
from tensortier.placement import load_mode
from tensortier.types import Export, ModelInfo, Plan

_FILE = "tensortier_plan.py"
# ggml's numbers of the types a KV cache may have; enum llama_flash_attn_type; enum llama_load_mode
_KV_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}
_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
_LOAD_MODES = {
    "mmap": "LLAMA_LOAD_MODE_MMAP",
    "none": "LLAMA_LOAD_MODE_NONE",
    "mlock": "LLAMA_LOAD_MODE_MLOCK",
    "mmap+mlock": "LLAMA_LOAD_MODE_MMAP_MLOCK",
    "direct": "LLAMA_LOAD_MODE_DIRECT_IO",
}

_HEAD = '''\
"""Loads a model where a plan puts it. Needs llama-cpp-python 0.3.36, built for the GPUs it names."""

import ctypes
import pathlib
import sys

import llama_cpp
from llama_cpp import llama_cpp as low

'''

_LOADER = """
low.llama_backend_init()
_libraries = [low._lib]
_folder = pathlib.Path(llama_cpp.__file__).parent / "lib"
for _pattern in ("*ggml-base.*", "*ggml.*"):
    _libraries += [ctypes.CDLL(str(path)) for path in sorted(_folder.glob(_pattern))[:1]]


def ggml(name, result, *arguments):
    for library in _libraries:
        if hasattr(library, name):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            return function
    sys.exit(f"this llama-cpp-python has no function {name}")


pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t

if RPC:
    registry = ggml("ggml_backend_reg_by_name", pointer, text)(b"RPC")
    if not registry:
        sys.exit("this llama-cpp-python was built without RPC")
    address = ggml("ggml_backend_reg_get_proc_address", pointer, pointer, text)
    add_server = ctypes.CFUNCTYPE(pointer, text)(address(registry, b"ggml_backend_rpc_add_server"))
    for endpoint in RPC:
        server = add_server(endpoint.encode())
        if not server:
            sys.exit(f"no RPC server at {endpoint}")
        ggml("ggml_backend_register", None, pointer)(server)

devices, buffer_types = {}, {}
for i in range(ggml("ggml_backend_dev_count", size)()):
    device = ggml("ggml_backend_dev_get", pointer, size)(i)
    buffer_type = ggml("ggml_backend_dev_buffer_type", pointer, pointer)(device)
    name = ggml("ggml_backend_dev_name", text, pointer)(device).decode()
    devices[name] = device
    if buffer_type:
        buffer_types[name] = buffer_type
        buffer_types[ggml("ggml_backend_buft_name", text, pointer)(buffer_type).decode()] = buffer_type
missing = [name for name in DEVICES if name not in devices]
missing += [name for _, name in OVERRIDES if name not in buffer_types]
if missing:
    sys.exit(f"not here: {', '.join(missing)}; there are: {', '.join(devices)}")


class Override(ctypes.Structure):
    _fields_ = [("pattern", text), ("buffer_type", pointer)]


# llama.cpp reads both until an empty entry; they must stay alive while the model loads.
device_list = (pointer * (len(DEVICES) + 1))(*(devices[name] for name in DEVICES))
override_list = (Override * (len(OVERRIDES) + 1))(*((p.encode(), buffer_types[d]) for p, d in OVERRIDES))

load, init = low.llama_model_load_from_file, low.llama_init_from_model


def load_as_planned(path, params):
    params.devices = ctypes.cast(device_list, pointer)
    if OVERRIDES:
        params.tensor_buft_overrides = ctypes.cast(override_list, pointer)
    params.load_mode = LOAD_MODE
    params.use_extra_bufts = REPACK
    return load(path, params)


def init_as_planned(model, params):
    params.flash_attn_type = FLASH_ATTENTION
    params.n_seq_max = SEQUENCES
    return init(model, params)


low.llama_model_load_from_file, low.llama_init_from_model = load_as_planned, init_as_planned
try:
    llm = llama_cpp.Llama(MODEL, **ARGUMENTS)
finally:
    low.llama_model_load_from_file, low.llama_init_from_model = load, init

if __name__ == "__main__":
    question = " ".join(sys.argv[1:]) or "What is the capital of France?"
    answer = llm.create_chat_completion([{"role": "user", "content": question}], max_tokens=200)
    print(answer["choices"][0]["message"]["content"])
"""


def export(plan: Plan, model: ModelInfo) -> Export:
    path, lost = common.model_file(model)
    place, settings = plan.placement, plan.settings
    for kind, table, what in (
        (settings.type_k, _KV_TYPES, "KV cache type"),
        (settings.type_v, _KV_TYPES, "KV cache type"),
        (settings.flash_attention, _FLASH_ATTENTION, "flash attention setting"),
        (load_mode(plan), _LOAD_MODES, "load mode"),
    ):
        if kind not in table:
            raise PlanError(f"unknown {what} {kind!r}; one of: {', '.join(table)}")
    arguments: dict[str, object] = {
        "n_ctx": settings.n_ctx,
        "n_batch": settings.n_batch,
        "n_ubatch": settings.n_ubatch,
        "n_gpu_layers": place.n_gpu_layers if place.devices else 0,
        "type_k": _KV_TYPES[settings.type_k],
        "type_v": _KV_TYPES[settings.type_v],
        "offload_kqv": place.kv_on_device,
        "op_offload": settings.op_offload,
        "swa_full": settings.swa_full,
        "verbose": False,
    }
    if place.tensor_split:
        arguments["tensor_split"] = list(place.tensor_split)
    if settings.threads:
        arguments["n_threads"] = settings.threads
        arguments["n_threads_batch"] = common.threads_batch(plan)
    else:
        lost.append(
            "The plan leaves threads open; the class takes half of the logical cores, and all for prompts."
        )
    found = common.overrides(plan, model, lambda device: common.buffer_type(plan, device))
    lines = [
        f"MODEL = {_python(path)}",
        f"RPC = {_python(list(plan.rpc))}",
        f"DEVICES = {_python(list(place.devices))}  # that layers are offloaded to",
        "OVERRIDES = [  # (pattern, device): the first that finds a tensor's name decides",
        *(f"    (r{_raw(o.pattern)}, {_python(o.device)})," for o in found),
        "]",
        f"LOAD_MODE = low.{_LOAD_MODES[load_mode(plan)]}",
        f"REPACK = {settings.repack}",
        f"FLASH_ATTENTION = {_FLASH_ATTENTION[settings.flash_attention]}  # {settings.flash_attention}",
        f"SEQUENCES = {settings.n_seq_max}",
        "ARGUMENTS = {",
        *(f"    {_python(key)}: {value!r}," for key, value in arguments.items()),
        "}",
    ]
    program = _HEAD + "\n".join(lines) + "\n" + _LOADER
    return Export("llama-cpp-python", ("python", _FILE), {_FILE: program}, tuple(lost))


def _python(value: object) -> str:
    """A literal; JSON's texts and lists are Python's too."""
    return json.dumps(value, ensure_ascii=False)


def _raw(pattern: str) -> str:
    """A pattern in quotes behind an ``r``. It holds no double quote and no newline (``patterns.escape``)."""
    return f'"{pattern}"'
