"""Per-layer facts that llama.cpp derives from metadata: which layers slide, recur, or have a KV cache.

Source: ``load_hparams`` in ``src/llama-model.cpp`` and ``load_arch_hparams`` of each file in ``src/models/``.
An architecture that is not in these tables has full attention with a KV cache in every layer, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensortier.errors import ModelFileError

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
UINT32_MAX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class _Window:
    """One call of ``load_swa_pattern``: every ``period``-th layer attends to everything, the others slide."""

    period: int  # unless the file gives another, or one flag per layer
    full_first: bool = False  # the full layer is the first of each period instead of the last
    default: int = 0  # tokens, where the file does not say
    fixed: int = 0  # tokens, whatever the file says (unless it says 0)


_WINDOWS: dict[str, _Window] = {
    "afmoe": _Window(4),
    "cohere2": _Window(4),
    "cohere2moe": _Window(4, full_first=True),
    "exaone-moe": _Window(4, default=128),
    "exaone4": _Window(4, default=4096),  # only the one with 64 layers
    "gemma-embedding": _Window(6),
    "gemma2": _Window(2, default=4096),
    "gemma3": _Window(6),
    "gemma3n": _Window(5),
    "gpt-oss": _Window(2),
    "laguna": _Window(4, full_first=True),
    "llama4": _Window(4, default=8192, fixed=8192),
    "mellum": _Window(4),
    "modern-bert": _Window(3, full_first=True),
    "muse-glimmer": _Window(4),
    "olmo2": _Window(4),
    "plamo3": _Window(8),
    "smallthinker": _Window(4, full_first=True, fixed=4096),
}
# These take one flag per layer from the file and have no default pattern.
_WINDOW_FLAGS = frozenset(
    {
        "dflash",
        "dots3note",
        "gemma4",
        "gemma4-assistant",
        "granite_swa",
        "maple",
        "mimo2",
        "spark2_5",
        "step35",
    }
)
_ALL_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
_RECURRENT_WITHOUT_KV_HEADS = frozenset(
    {
        "bailingmoe3",
        "glm5-next",
        "granitehybrid",
        "jamba",
        "kimi-k3",
        "kimi-linear",
        "lfm2",
        "lfm2moe",
        "nemotron_h",
        "nemotron_h_moe",
        "plamo2",
    }
)
_RECURRENT_INTERVAL = {"minimax-01": 8, "qwen35": 4, "qwen35moe": 4, "qwen3next": 4, "qwen4exp": 4}
# Both a recurrent state and a KV cache in every layer.
PARALLEL_HYBRIDS = frozenset({"falcon-h1"})
# llama_model::create_memory gives these no cache at all.
_NO_CACHE = frozenset(
    {
        "bert",
        "dream",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llada",
        "llada-moe",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "rnd1",
        "wavtokenizer-dec",
    }
)


class Keys:
    """Typed access to the metadata of one file; keys are given without the architecture's prefix."""

    def __init__(self, source: str, architecture: str, metadata: dict[str, Any]) -> None:
        self.source = source
        self.architecture = architecture
        self.metadata = metadata

    def fail(self, key: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.source}: {key!r} {problem}; the file is corrupt")

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def is_array(self, key: str) -> bool:
        return _is_array(self.metadata.get(f"{self.architecture}.{key}"))

    def integer(self, key: str, default: int = 0) -> int:
        """A whole number of 0 to 2^32 - 1."""
        full = f"{self.architecture}.{key}"
        value = self.metadata.get(full, default)
        return self._checked(full, value)

    def per_layer(self, key: str, n: int, default: Sequence[int]) -> tuple[int, ...]:
        """One number for all ``n`` layers, or an array of exactly ``n`` (``get_key_or_arr``)."""
        full = f"{self.architecture}.{key}"
        value = self.metadata.get(full)
        if value is None:
            return tuple(default)
        if not _is_array(value):
            return (self._checked(full, value),) * n
        if len(value) != n:
            raise self.fail(full, f"has {len(value)} elements, but there are {n} layers")
        return tuple(self._checked(full, v) for v in value)

    def flags(self, key: str, n: int) -> tuple[bool, ...]:
        """An array of flags for the first layers; the rest of the ``n`` are False (``get_arr``)."""
        full = f"{self.architecture}.{key}"
        value = self.metadata.get(full, ())
        if not _is_array(value) or len(value) > MAX_LAYERS:
            raise self.fail(full, f"must be an array of at most {MAX_LAYERS} flags")
        found = [self._checked(full, v) != 0 for v in value][:n]
        return tuple(found + [False] * (n - len(found)))

    def _checked(self, full: str, value: Any) -> int:
        if not isinstance(value, int) or not 0 <= value <= UINT32_MAX:
            shown = repr(value) if isinstance(value, int | float) else f"a {type(value).__name__}"
            raise self.fail(full, f"is {shown}, it must be a whole number from 0 to {UINT32_MAX}")
        return int(value)


def _is_array(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def sliding_window(
    keys: Keys, n_layers: int, n_nextn: int, recurrent: Sequence[bool]
) -> tuple[int, tuple[bool, ...]]:
    """Tokens of the sliding window (0: none) and the layers it applies to."""
    arch = keys.architecture
    none = (0, (False,) * n_layers)
    size = keys.integer("attention.sliding_window")
    trunk = n_layers - n_nextn
    if arch == "deepseek4":
        layers: tuple[bool, ...] = (True,) * n_layers
    elif arch == "lfm2":
        layers = tuple(not recurrent[i] and i < trunk for i in range(n_layers))
    elif arch in _WINDOW_FLAGS:
        layers = keys.flags("attention.sliding_window_pattern", n_layers)
    elif arch in _WINDOWS and not (arch == "exaone4" and trunk != 64):
        window = _WINDOWS[arch]
        if not keys.has("attention.sliding_window"):
            size = window.default
        elif size and window.fixed:
            size = window.fixed
        layers = _pattern(keys, window, n_layers, trunk)
    else:
        return none
    return (size, layers) if size and any(layers) else none


def _pattern(keys: Keys, window: _Window, n_layers: int, trunk: int) -> tuple[bool, ...]:
    """``load_swa_pattern`` and ``llama_hparams::set_swa_pattern``."""
    key = "attention.sliding_window_pattern"
    if keys.is_array(key):
        return keys.flags(key, n_layers)
    n = keys.integer(key, window.period)
    full_at = 0 if window.full_first else n - 1
    return tuple(i < trunk and (n == 0 or i % n != full_at) for i in range(n_layers))


def recurrent_layers(
    keys: Keys, n_layers: int, n_nextn: int, n_head_kv: Sequence[int], n_ff: Sequence[int]
) -> tuple[bool, ...]:
    """True for the layers that keep a state instead of (in ``PARALLEL_HYBRIDS``: besides) a KV cache."""
    arch = keys.architecture
    trunk = n_layers - n_nextn
    if arch in _ALL_RECURRENT or arch in PARALLEL_HYBRIDS:
        return (True,) * n_layers
    if arch in _RECURRENT_WITHOUT_KV_HEADS:
        # In Nemotron-H a layer without KV heads is either recurrent or only a feed-forward network.
        nemotron = arch.startswith("nemotron_h")
        return tuple(i < trunk and n_head_kv[i] == 0 and not (nemotron and n_ff[i]) for i in range(n_layers))
    if arch in _RECURRENT_INTERVAL:
        if keys.has("attention.recurrent_layers"):
            flags = keys.per_layer("attention.recurrent_layers", n_layers, ())
            return tuple(i < trunk and f != 0 for i, f in enumerate(flags))
        every = keys.integer("full_attention_interval", _RECURRENT_INTERVAL[arch])
        if every == 0:
            raise keys.fail(f"{arch}.full_attention_interval", "is 0, it must be at least 1")
        return tuple(i < trunk and (i + 1) % every != 0 for i in range(n_layers))
    return (False,) * n_layers


def kv_heads(
    keys: Keys,
    n_layers: int,
    n_nextn: int,
    n_head_kv: Sequence[int],
    n_ff: Sequence[int],
    recurrent: Sequence[bool],
) -> tuple[int, ...]:
    """KV heads of each layer that has a KV cache of its own in the main context, 0 for the others."""
    arch = keys.architecture
    if arch in _NO_CACHE:
        return (0,) * n_layers
    cached = n_layers - n_nextn
    if arch == "gemma3n":
        cached = min(cached, 20)  # later layers use the cache of an earlier one
    elif arch == "gemma4":
        cached = min(cached, n_layers - keys.integer("attention.shared_kv_layers"))

    def has_cache(i: int) -> bool:
        if i >= cached or (recurrent[i] and arch not in PARALLEL_HYBRIDS):
            return False
        return not (arch.startswith("nemotron_h") and n_ff[i])

    return tuple(n_head_kv[i] if has_cache(i) else 0 for i in range(n_layers))
