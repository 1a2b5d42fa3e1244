"""Experiment, not used by the program: how fast a plan will be, as measured speeds of this machine's parts added
up over what a token touches. ``bench/validate_time.py`` compares it with what is measured; docs/lab-log.md has the
result, which is not good enough yet.

Decode of one token takes the sum over weights of bytes read / achieved bytes per second of their type, attention
over the live cache, and a fixed cost for each operation in the graph. Prefill is the same with the speeds of wide
products. Only what was calibrated is predicted: for anything else the answer is None, never a guess.

So far for plans that compute on the CPU alone; a plan that uses another device gets None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from tensortier.calibrate import Attention, Calibration, Overhead, Product
from tensortier.types import ModelInfo, Plan, Role, Tensor


@dataclasses.dataclass(frozen=True)
class Workload:
    """What the model will be asked to do, in tokens."""

    prompt: int = 512  # computed per request
    output: int = 256  # generated per request
    depth: int = 0  # already in the context when the request begins


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Predicted speed of a plan for a workload. Intervals are (low, high), from the calibration's own scatter."""

    prefill_tokens_per_second: float
    prefill_interval: tuple[float, float]
    decode_tokens_per_second: float
    decode_interval: tuple[float, float]
    seconds_per_token: Mapping[str, float]  # of decode, by what it is spent on


# Operations besides the products with weights, per layer: norms, rotary embeddings, cache writes, attention,
# activation, residual sums. Counted in llama.cpp's graphs; views and reshapes cost nothing.
_OPERATIONS_PER_LAYER = 13
_OPERATIONS_PER_MOE_LAYER = 24  # more for choosing, weighing and summing experts
_CALIBRATED_BATCH = 128  # tokens of the wide products and attention that were measured


@dataclasses.dataclass(frozen=True)
class _Spent:
    """Seconds, and how far they may be off (relative)."""

    seconds: float = 0.0
    slack: float = 0.0  # seconds


def estimate(
    model: ModelInfo, calibration: Calibration, plan: Plan, workload: Workload | None = None
) -> Estimate | None:
    """The speed of ``plan``, or None where a part of it was not calibrated.

    Decode is at the middle of the output: ``depth + prompt + output / 2`` tokens live.
    """
    workload = workload or Workload()
    if plan.placement.devices and plan.placement.n_gpu_layers != 0:
        return None
    speeds = _Speeds(calibration, plan)
    live = workload.depth + workload.prompt + workload.output // 2
    decode = {
        "weights": speeds.weights(model, tokens=1),
        "attention": speeds.attention(model, live, tokens=1),
        "operations": speeds.operations(model),
    }
    batch = max(1, min(workload.prompt, plan.settings.n_ubatch))
    prefill = (
        speeds.weights(model, tokens=batch),
        speeds.attention(model, workload.depth + workload.prompt // 2, tokens=batch),
        speeds.operations(model),
    )
    if any(part is None for part in (*decode.values(), *prefill)):
        return None
    decode_low, decode_mid, decode_high = _speeds_of(decode.values(), 1)
    prefill_low, prefill_mid, prefill_high = _speeds_of(prefill, batch)
    return Estimate(
        prefill_mid,
        (prefill_low, prefill_high),
        decode_mid,
        (decode_low, decode_high),
        {name: part.seconds for name, part in decode.items() if part is not None},
    )


def _speeds_of(parts: Iterable[_Spent | None], tokens: int) -> tuple[float, float, float]:
    spent = [p for p in parts if p is not None]
    middle = sum(p.seconds for p in spent)
    slack = sum(p.slack for p in spent)
    return tokens / (middle + slack), tokens / middle, tokens / max(middle - slack, middle / 2)


def read_per_token(model: ModelInfo, tensor: Tensor) -> float:
    """Share of a tensor's bytes that one token reads: experts by how many are used, the embedding one row, unless
    it is the output too."""
    if tensor.role is Role.EMBEDDING:
        return 1.0 if model.tied_output and tensor.name == "token_embd.weight" else 0.0
    if tensor.role.is_routed_expert:
        return model.n_expert_used / max(1, model.n_expert)
    return 1.0


class _Speeds:
    """Look-ups in a calibration for one plan on the CPU."""

    def __init__(self, calibration: Calibration, plan: Plan) -> None:
        self.threads = plan.settings.threads
        self.repack = plan.settings.repack
        self.type_k = plan.settings.type_k.upper()
        self.products = [p for p in calibration.products if p.device == "CPU"]
        self.attentions = [a for a in calibration.attention if a.device == "CPU"]
        self.overheads = [o for o in calibration.overheads if o.device == "CPU"]

    def _scale(self, measured_threads: int) -> float | None:
        """From the threads that were measured to the plan's: by the types that were measured with both."""
        if self.threads in (0, measured_threads):
            return 1.0
        q4 = {p.threads: p.bytes_per_second for p in self.products if p.type == "Q4_K" and p.batch == 1}
        if self.threads in q4 and measured_threads in q4:
            return q4[self.threads] / q4[measured_threads]
        return None

    def product(self, kind: str, batch: int) -> Product | None:
        """The figure for a type, with the kernel that llama.cpp will choose."""
        rows = [p for p in self.products if p.type == kind and p.batch == batch]
        exact = [p for p in rows if p.threads == self.threads] or rows[-1:]
        repacked = [p for p in rows if p.repacked and p.threads == exact[0].threads] if exact else []
        plain = [p for p in rows if not p.repacked and p.threads == exact[0].threads] if exact else []
        chosen = repacked if self.repack and repacked else plain
        return chosen[0] if chosen else None

    def weights(self, model: ModelInfo, tokens: int) -> _Spent | None:
        """Reading all weights once for ``tokens`` tokens that are computed together."""
        seconds = slack = 0.0
        for tensor in model.tensors:
            share = read_per_token(model, tensor)
            if len(tensor.shape) < 2 or not share:
                continue
            kind = "F16" if tensor.qtype == "F32" else tensor.qtype
            narrow, wide = self.product(kind, 1), self.product(kind, _CALIBRATED_BATCH)
            if narrow is None or wide is None or (scale := self._scale(narrow.threads)) is None:
                return None
            nbytes = tensor.nbytes / (2 if tensor.qtype == "F32" else 1)
            once = nbytes / narrow.bytes_per_second
            if tokens == 1:
                part, spread = once * share, narrow.spread
            else:
                # a few tokens wait for memory like one; many are arithmetic
                if tensor.role.is_routed_expert:
                    once *= 1 - (1 - share) ** tokens  # experts that any of them uses
                arithmetic = nbytes * share * tokens / (wide.bytes_per_second * _CALIBRATED_BATCH)
                part, spread = max(once, arithmetic), wide.spread
            seconds += part / scale
            slack += part / scale * spread
        return _Spent(seconds, slack)

    def attention(self, model: ModelInfo, live: int, tokens: int) -> _Spent | None:
        """Attention of ``tokens`` tokens over ``live`` cached ones. On a CPU it is arithmetic over query heads:
        the calibration's four to a KV head are scaled to the model's."""
        batch = 1 if tokens == 1 else _CALIBRATED_BATCH
        row: Attention | None = next(
            (a for a in self.attentions if a.type == self.type_k and a.batch == batch), None
        )
        if row is None or model.kv_lora_rank:
            return None
        scale = self._scale(row.threads)
        if scale is None:
            return None
        per_element = {"F16": 2.0, "Q8_0": 34 / 32, "Q4_0": 18 / 32}[self.type_k]
        elements_per_second = row.bytes_per_second / per_element * 4 * scale  # of query heads
        elements = 0.0
        for layer in range(model.n_layers):
            if not model.n_head_kv[layer]:
                continue
            swa = bool(model.swa_layers) and model.swa_layers[layer] and model.sliding_window > 0
            cells = min(live, model.sliding_window) if swa else live
            elements += model.n_head[layer] * (model.head_dim_k + model.head_dim_v) * cells
        seconds = elements / elements_per_second * (1 if tokens == 1 else tokens / _CALIBRATED_BATCH)
        return _Spent(seconds, seconds * row.spread)

    def operations(self, model: ModelInfo) -> _Spent | None:
        """The fixed cost of every operation of one graph."""
        rows = [o for o in self.overheads if o.threads == self.threads] or self.overheads[-1:]
        if not rows:
            return None
        row: Overhead = rows[0]
        per_layer = _OPERATIONS_PER_MOE_LAYER if model.is_moe else _OPERATIONS_PER_LAYER
        products = sum(1 for t in model.tensors if len(t.shape) >= 2)
        count = model.n_layers * per_layer + products
        return _Spent(count * row.seconds, count * row.seconds * row.spread)
