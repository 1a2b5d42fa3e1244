"""What llama.cpp spends on a layer besides its large products, and on handing a graph from device to device.

Measured through llama.cpp itself, on models made for it: their matrices are so small that what is left is the
other operations, the barriers between them and the bookkeeping. The difference between a deep and a shallow one,
divided by the layers between them, is the cost of a layer; what remains is the cost of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tensortier.calibrate.kernels import robust
from tensortier.calibrate.records import LayerCost, Split
from tensortier.types import Override, Placement, Plan, Settings

SHALLOW, DEEP = 2, 26  # layers
_WIDTH, _NEURONS, _HEADS, _KV_HEADS = 256, 512, 4, 2
_EXPERTS, _USED = 8, 2
_VOCABULARY = 512
_FFN = r"\.ffn_(up|down|gate)(_exps)?\."


def write_model(path: Path, layers: int, *, experts: bool = False) -> None:
    """A llama of ``layers`` layers and random Q8_0 weights, dense or a mixture; no tokenizer."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_NEURONS)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_vocab_size(_VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    if experts:
        writer.add_expert_count(_EXPERTS)
        writer.add_expert_used_count(_USED)

    def matrix(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, np.float32) * np.float32(0.5 / np.sqrt(shape[-1]))
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def ones(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))

    matrix("token_embd", _VOCABULARY, _WIDTH)
    matrix("output", _VOCABULARY, _WIDTH)
    ones("output_norm")
    kv = _WIDTH // _HEADS * _KV_HEADS
    for i in range(layers):
        block = f"blk.{i}"
        ones(f"{block}.attn_norm")
        ones(f"{block}.ffn_norm")
        matrix(f"{block}.attn_q", _WIDTH, _WIDTH)
        matrix(f"{block}.attn_k", kv, _WIDTH)
        matrix(f"{block}.attn_v", kv, _WIDTH)
        matrix(f"{block}.attn_output", _WIDTH, _WIDTH)
        if experts:
            router = rng.standard_normal((_EXPERTS, _WIDTH), np.float32)
            writer.add_tensor(f"{block}.ffn_gate_inp.weight", router)
            matrix(f"{block}.ffn_up_exps", _EXPERTS, _NEURONS, _WIDTH)
            matrix(f"{block}.ffn_gate_exps", _EXPERTS, _NEURONS, _WIDTH)
            matrix(f"{block}.ffn_down_exps", _EXPERTS, _WIDTH, _NEURONS)
        else:
            matrix(f"{block}.ffn_up", _NEURONS, _WIDTH)
            matrix(f"{block}.ffn_gate", _NEURONS, _WIDTH)
            matrix(f"{block}.ffn_down", _WIDTH, _NEURONS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Models:
    """The files, for as long as they are needed."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[tuple[int, bool], Path] = {}
        for layers in (SHALLOW, DEEP):
            for experts in (False, True):
                path = folder / f"{layers}-{'moe' if experts else 'dense'}.gguf"
                write_model(path, layers, experts=experts)
                self._files[layers, experts] = path

    def plan(
        self,
        layers: int,
        *,
        experts: bool = False,
        device: str = "CPU",
        threads: int,
        split: bool = False,
        rpc: Sequence[str] = (),
    ) -> Plan:
        """One of them on one device, with its feed-forward weights on the CPU where ``split``."""
        place = Placement() if device == "CPU" else Placement((device,), -1)
        if split:
            place = Placement((device,), -1, overrides=(Override(_FFN, "CPU"),))
        settings = Settings(n_ctx=512, n_batch=64, n_ubatch=64, threads=threads, flash_attention="on")
        return Plan(str(self._files[layers, experts]), place, settings, rpc=tuple(rpc))


@contextmanager
def models() -> Iterator[Models]:
    with TemporaryDirectory(prefix="tensortier-") as folder:
        yield Models(Path(folder))


def _seconds(plan: Plan) -> tuple[float, float]:
    from tensortier._llama import decode

    return robust(decode.per_token(plan, depth=32, tokens=24, runs=9))


def measure_layers(found: Models, device: str, *, threads: int, rpc: Sequence[str] = ()) -> LayerCost:
    """Seconds per layer, per layer with experts, and per token, of a device that holds the whole model."""

    def at(layers: int, experts: bool) -> tuple[float, float]:
        return _seconds(found.plan(layers, experts=experts, device=device, threads=threads, rpc=rpc))

    shallow, deep, mixture = at(SHALLOW, False), at(DEEP, False), at(DEEP, True)
    layer = max(0.0, (deep[0] - shallow[0]) / (DEEP - SHALLOW))
    more = max(0.0, (mixture[0] - deep[0]) / DEEP)
    token = max(0.0, shallow[0] - SHALLOW * layer)
    return LayerCost(device, threads, layer, more, token, max(deep[1], mixture[1]))


def measure_split(
    found: Models, device: str, *, experts: bool, threads: int, rpc: Sequence[str] = ()
) -> Split:
    """Seconds for leaving ``device`` for the CPU and coming back, with the hidden state of one token: what a layer
    takes more when its feed-forward weights (its ``experts``) are on the CPU. From two depths."""
    added = []
    for layers in (SHALLOW, DEEP):
        whole = found.plan(layers, experts=experts, device=device, threads=threads, rpc=rpc)
        away = found.plan(layers, experts=experts, device=device, threads=threads, split=True, rpc=rpc)
        (before, spread), (after, more) = _seconds(whole), _seconds(away)
        added.append((after - before, max(spread, more)))
    seconds = (added[1][0] - added[0][0]) / (DEEP - SHALLOW)
    return Split(device, experts, max(0.0, seconds), max(a[1] for a in added))
