"""How long a plan takes: the time of every part a token passes through, added up.

    decode of one token = sum over weights of bytes read / achieved bytes per second of their type and device
                        + attention over the live cache + a fixed time per layer
                        + crossings from device to device + a fixed time per token

Prefill is the same with the speeds of wide products, where each micro-batch reads all weights once; a product whose
weights are in main memory may be given to a GPU, which then copies them over its link first (op offload).

Times of layers are independent of each other, which is what makes the search of ``optimizer`` exact: it adds up
the same ``Costs.layer`` that ``estimate`` does.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tensortier import formulas, mapped, placement
from tensortier.pageable import DEVICE
from tensortier.rates import AttentionSpeed, DeviceRates, Rates, Speed
from tensortier.types import Estimate, ModelInfo, Plan, Role, Settings, Tensor, Workload

OFFLOAD_BATCH = 32  # tokens from which on llama.cpp gives products to a GPU
ASSUMED_DRIVE = Speed(1.5e9, 0.5)  # bytes/s, where nothing is known of the drive
ASSUMED_LATENCY = 100e-6  # seconds until a read of a flash drive arrives, where it was not measured
FAULT_SPREAD = 0.5  # of the time of page faults (``mapped``): bench/validate_mapped.py
CPU = "CPU"
_F32_BYTES = 4
MODEL_ERROR = (
    0.10  # relative, besides the scatter of what it adds up: most of bench/validate_time.py lies within
)


@dataclass(frozen=True)
class Spent:
    """Seconds by what they are spent on, and how far their sum may be off (seconds)."""

    parts: Mapping[str, float]
    slack: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def times(self, n: float) -> Spent:
        return Spent({k: v * n for k, v in self.parts.items()}, self.slack * n)


@dataclass(frozen=True)
class Both:
    """Of the whole prompt, and of one token of output at the middle of the output."""

    prefill: Spent
    decode: Spent

    def seconds(self, workload: Workload) -> float:
        """That a whole request spends here."""
        return self.prefill.seconds + workload.output * self.decode.seconds


def total(spent: Iterable[Spent]) -> Spent:
    """Their sum. Slacks add up too: a calibration that is off is off for all of them."""
    parts: dict[str, float] = {}
    slack = 0.0
    for one in spent:
        for key, value in one.parts.items():
            parts[key] = parts.get(key, 0.0) + value
        slack += one.slack
    return Spent(parts, slack)


def read_per_token(model: ModelInfo, tensor: Tensor) -> float:
    """Share of a matrix' bytes that one token is multiplied with: of experts as many as are used."""
    if tensor.role.is_routed_expert:
        return model.n_expert_used / max(1, model.n_expert)
    return 1.0


_ORDER = {
    Role.EXPERT_GATE_UP: 0,
    Role.FFN_UP: 0,
    Role.EXPERT_UP: 0,
    Role.FFN_GATE: 1,
    Role.EXPERT_GATE: 1,
    Role.FFN_DOWN: 2,
    Role.EXPERT_DOWN: 2,
}


def movable(layer: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Of a layer's tensors (``by_layer``) those that are worth a place of their own: large feed-forward matrices, in
    the order in which llama.cpp computes them (up, gate, down)."""
    found = [t for t in layer if t.role in _ORDER and len(t.shape) >= 2]
    return tuple(sorted(found, key=lambda t: _ORDER[t.role]))


def by_layer(model: ModelInfo) -> tuple[tuple[Tensor, ...], ...]:
    """The tensors of each layer."""
    found: list[list[Tensor]] = [[] for _ in range(model.n_layers)]
    for tensor in model.tensors:
        if tensor.layer is not None and tensor.layer < model.n_layers:
            found[tensor.layer].append(tensor)
    return tuple(tuple(row) for row in found)


class Costs:
    """Times of the parts of one model on one machine, for a workload.

    ``settings`` decide the micro-batch, the KV type and whether op offload is on; threads are those the rates
    were made for. ``devices``: that layers may be offloaded to, in order: the first that can takes op offload.
    """

    def __init__(
        self,
        model: ModelInfo,
        rates: Rates,
        settings: Settings,
        workload: Workload,
        devices: Sequence[str] = (),
        *,
        kv_on_device: bool = True,
    ) -> None:
        self.model = model
        self.rates = rates.kernels(repack=settings.repack)
        self.settings = settings
        self.workload = workload
        self.kv_on_device = kv_on_device
        self._layers = by_layer(model)
        self._movable = tuple(movable(layer) for layer in self._layers)
        context = formulas.context_of(model, settings)
        self._batch = max(1, min(workload.prompt, formulas.ubatch_of(model, settings)))
        self._steps = math.ceil(workload.prompt / self._batch)
        # the middle of the output and of the prompt; a request longer than the context cannot be
        self._live = min(context, workload.depth + workload.prompt + workload.output // 2)
        self._prompt_live = min(context, workload.depth + workload.prompt // 2)
        self._helper = (
            next((d for d in devices if rates.of(d).offloads), None) if settings.op_offload else None
        )
        self._kv = formulas.cell_bytes(model, settings)
        self._memo: dict[tuple[object, ...], Both] = {}

    @property
    def helper(self) -> str | None:
        """The device that takes wide products whose weights are in main memory (op offload)."""
        return self._helper

    def tensors(self, layer: int) -> tuple[Tensor, ...]:
        return self._layers[layer]

    def movable(self, layer: int) -> tuple[Tensor, ...]:
        return self._movable[layer]

    def paging(self, nbytes: float) -> Both:
        """Reading what main memory does not hold of the weights on the CPU, ``nbytes`` of them, each byte at most once
        in a pass and only if it is used. Page faults read more (``faults``), but not in proportion."""
        model = self.model
        drive = self.rates.drive or ASSUMED_DRIVE
        share = model.n_expert_used / model.n_expert if model.is_moe else 1.0

        def once(read: float) -> Spent:
            seconds = read / drive.value
            return Spent({"drive": seconds}, seconds * max(drive.spread, FAULT_SPREAD))

        wide = nbytes * (1 - (1 - share) ** self._batch)
        return Both(once(wide).times(self._steps), once(nbytes * share))

    def faults(self, tensors: Sequence[Tensor], paged: int, prefill: float, decode: float) -> Both:
        """What the mapped ``tensors``, of which main memory does not hold ``paged`` bytes, add to a prompt of
        ``prefill`` seconds and a token of ``decode`` seconds with everything in memory."""
        drive = self.rates.drive or ASSUMED_DRIVE
        room = sum(t.nbytes for t in tensors) - paged
        ahead = self.rates.read_ahead or mapped.DEFAULT_READ_AHEAD
        latency = self.rates.drive_latency or ASSUMED_LATENCY

        def once(compute: float, tokens: int) -> Spent:
            read = mapped.reads(self.model, tensors, room, ahead, tokens=tokens)
            more = max(0.0, read.seconds(compute, drive.value, latency) - compute)
            return Spent({"drive": more}, more * max(drive.spread, FAULT_SPREAD))

        return Both(once(prefill / self._steps, self._batch).times(self._steps), once(decode, 1))

    def signature(self, layer: int) -> tuple[object, ...]:
        """Layers with the same signature take the same time and bytes wherever they are."""
        tensors = tuple((t.role, t.qtype, t.shape) for t in self._layers[layer])
        return (tensors, self.model.n_head[layer], self.model.n_head_kv[layer], self._cells(layer, 1 << 40))

    def layer(self, layer: int, device: str, where: Sequence[str]) -> Both:
        """One layer whose attention, norms, router and KV cache are on ``device`` and whose movable tensors
        (``movable``) are on the devices ``where``, in that order."""
        key = (self.signature_id(layer), device, *where)
        if key not in self._memo:
            self._memo[key] = Both(
                self._layer(layer, device, where, self._batch).times(self._steps),
                self._layer(layer, device, where, 1),
            )
        return self._memo[key]

    def signature_id(self, layer: int) -> int:
        """A small number for ``signature``."""
        return self._ids[layer]

    @functools.cached_property
    def _ids(self) -> tuple[int, ...]:
        numbers: dict[tuple[object, ...], int] = {}
        return tuple(numbers.setdefault(self.signature(i), len(numbers)) for i in range(self.model.n_layers))

    def output(self, device: str, weights: str | None = None) -> Both:
        """The output layer on ``device`` (its matrix on ``weights``). Only the last token of a prompt has logits."""
        tensor = self.output_tensor()
        if tensor is None:
            return Both(Spent({}), Spent({}))
        parts = [self._product(tensor, weights or device, 1)]
        if weights is not None and weights != device:
            parts.append(self._crossings(device, weights, 2, 1, self.model.n_embd))
        once = total(parts)
        return Both(once, once)

    def output_tensor(self) -> Tensor | None:
        """The matrix that makes logits: the embedding where it is tied."""
        name = "token_embd.weight" if self.model.tied_output else "output.weight"
        return next((t for t in self.model.tensors if t.name == name), None)

    def boundary(self, before: str, after: str) -> Both:
        """Handing the hidden state from a layer on one device to the next on another."""
        if before == after:
            return Both(Spent({}), Spent({}))
        return Both(
            self._crossings(before, after, 1, self._batch, self.model.n_embd).times(self._steps),
            self._crossings(before, after, 1, 1, self.model.n_embd),
        )

    def fixed(self, devices: Iterable[str]) -> Both:
        """What a token costs besides its layers, with these devices at work."""
        found = [self.rates.of(d) for d in {CPU, *devices}]
        seconds = max((r.token_seconds for r in found), default=0.0)
        once = Spent({"fixed": seconds}, seconds * 0.2)
        return Both(once.times(self._steps), once)

    # --- one micro-batch of ``tokens`` through one layer

    def _layer(self, layer: int, device: str, where: Sequence[str], tokens: int) -> Spent:
        moved = self._movable[layer]
        assert len(where) == len(moved), (layer, where)
        if self.model.n_layers_nextn and layer >= self.model.n_layers - self.model.n_layers_nextn:
            return Spent({})  # only drafts tokens, which we do not ask for
        homes = dict(zip((t.name for t in moved), where, strict=True))
        parts = [
            self._product(t, homes.get(t.name, device), tokens)
            for t in self._layers[layer]
            if len(t.shape) >= 2
        ]
        parts.append(self._attention(layer, device, tokens))
        parts.append(self._operations(layer, device, tokens))
        parts.append(self._excursions(layer, device, where, tokens))
        return total(parts)

    def _product(self, tensor: Tensor, home: str, tokens: int) -> Spent:
        """A weight at ``home`` times ``tokens`` columns."""
        share = read_per_token(self.model, tensor)
        rates = self.rates.of(home)
        touched = share if tokens == 1 or not tensor.role.is_routed_expert else 1 - (1 - share) ** tokens
        nbytes = tensor.nbytes * touched
        macs = tensor.n_elements * share * tokens
        if home == CPU and self._helper is not None and tokens >= OFFLOAD_BATCH and _is_matrix(tensor):
            helper = self.rates.of(self._helper)
            link = helper.link or helper.memory
            copied = Spent({"link": nbytes / link.value}, nbytes / link.value * link.spread)
            return total([copied, _weights(helper, helper.device, tensor, touched, macs)])
        return _weights(rates, home, tensor, touched, macs if tokens > 1 else 0.0)

    def _attention(self, layer: int, device: str, tokens: int) -> Spent:
        model = self.model
        if not model.n_head_kv[layer]:
            return Spent({})
        home = device if self.kv_on_device else CPU
        rates = self.rates.of(home)
        live = self._cells(layer, self._live if tokens == 1 else self._prompt_live)
        width = model.head_dim_k + model.head_dim_v
        if model.kv_lora_rank:
            width = 2 * model.kv_lora_rank + model.n_rot  # keys are the latent vector and the rotary part
        elif _is_windowed(model, layer) and model.head_dim_k_swa:
            width = model.head_dim_k_swa + model.head_dim_v_swa
        elements: float = model.n_head[layer] * width * max(1, live) * tokens
        if tokens == 1 and rates.kind == "cpu" and self.settings.type_k in _SPLIT_TYPES:
            elements *= _imbalance(live, rates.threads)
        speed = attention_speed(rates, self.settings.type_k, width // 2, live, tokens > 1)
        seconds, slack = elements / speed.value, elements / speed.value * speed.spread
        # a device that shares keys and values among the query heads of a group is bound by reading them once
        read = self._kv[layer] * live / rates.memory.value
        if read > seconds:
            seconds, slack = read, read * rates.memory.spread
        spent = Spent({f"attention on {home}": seconds}, slack)
        if home == device:
            return spent
        return total([spent, self._crossings(device, home, 2, tokens, model.n_embd)])

    def _operations(self, layer: int, device: str, tokens: int) -> Spent:
        rates = self.rates.of(device)
        seconds = rates.layer_seconds
        if any(t.role.is_routed_expert for t in self._layers[layer]):
            seconds += rates.moe_layer_seconds
        if tokens > 1:
            seconds += rates.wide_layer_seconds * tokens * self.model.n_embd
        return Spent({f"operations on {device}": seconds}, seconds * 0.2)

    def _excursions(self, layer: int, device: str, where: Sequence[str], tokens: int) -> Spent:
        """Crossings inside a layer: every change of device along its weights in the order of computation. A wide
        batch whose product is done elsewhere by op offload changes there too."""
        path = [device]
        for tensor, home in zip(self._movable[layer], where, strict=True):
            if home == CPU and self._helper is not None and tokens >= OFFLOAD_BATCH and _is_matrix(tensor):
                home = self._helper
            path.append(home)
        path.append(device)
        width = self.model.n_embd
        experts = any(t.role.is_routed_expert for t in self._movable[layer])
        if experts:
            width *= max(1, self.model.n_expert_used)
        parts = [
            self._crossings(a, b, 1, tokens, width, experts=experts)
            for a, b in itertools.pairwise(path)
            if a != b
        ]
        return total(parts)

    def _crossings(
        self, a: str, b: str, times: int, tokens: int, width: int, *, experts: bool = False
    ) -> Spent:
        """Handing ``tokens`` rows of ``width`` f32 values from one device to another. By way of main memory."""
        seconds = slack = 0.0
        for end in {a, b} - {CPU, DEVICE}:
            rates = self.rates.of(end)
            link = rates.link or rates.memory
            copy = tokens * width * _F32_BYTES / link.value
            once = (rates.moe_split_seconds if experts else rates.split_seconds) / 2
            seconds += times * (once + copy)
            slack += times * (once * 0.3 + copy * link.spread)
        return Spent({"splits": seconds}, slack)

    def _cells(self, layer: int, live: int) -> int:
        return min(live, self.model.sliding_window) if _is_windowed(self.model, layer) else live


# Of the KV cache: for one token, ggml's CPU attention gives each thread an equal share of the cells it looks at,
# which llama.cpp rounds up; the cells beyond the live ones cost nothing, so the threads that have them wait.
_SPLIT_TYPES = ("f16", "f32")
_SPLIT_FROM = 512  # cells


def _imbalance(live: int, threads: int) -> float:
    """How many times longer attention takes than with equal live shares."""
    seen = formulas.padded(live + 1)
    if seen < _SPLIT_FROM:
        return 1.0
    share = math.ceil(seen / threads)
    return max(1.0, min(live, share) * threads / max(1, live))


def _is_windowed(model: ModelInfo, layer: int) -> bool:
    return bool(model.swa_layers) and model.swa_layers[layer] and model.sliding_window > 0


def _is_matrix(tensor: Tensor) -> bool:
    return len(tensor.shape) >= 2 and tensor.role is not Role.ROUTER


def _weights(rates: DeviceRates, home: str, tensor: Tensor, touched: float, macs: float) -> Spent:
    """At ``home``, whose rates are given: reading the share ``touched`` of a weight while it is multiplied, or
    ``macs`` multiply-adds where those take longer."""
    nbytes, rows = tensor.nbytes * touched, tensor.n_elements / tensor.shape[0] * touched
    narrow = rates.narrow.get(_read_as(tensor.qtype), rates.other_narrow)
    seconds = narrow.seconds(nbytes, rows)
    slack = seconds * narrow.spread
    if macs:
        # a few columns wait for memory like one; many are arithmetic
        table = rates.wide_experts if tensor.role.is_routed_expert else rates.wide
        wide = table.get(_read_as(tensor.qtype)) or rates.wide.get(tensor.qtype, rates.other_wide)
        arithmetic = macs / wide.value
        seconds, slack = max((nbytes / rates.memory.value, 0.0), (arithmetic, arithmetic * wide.spread))
    return Spent({f"weights on {home}": seconds}, slack)


def _read_as(qtype: str) -> str:
    """The type whose measured speed in bytes holds for it: plain numbers are all bound by memory."""
    return "F16" if qtype == "F32" else qtype


def attention_speed(rates: DeviceRates, kv_type: str, head_dim: int, cells: int, many: bool) -> Speed:
    """The measured speed nearest in width, between the two nearest lengths (over the logarithm of the length)."""
    kind = kv_type.upper()
    rows = [a for a in rates.attention if a.many == many]
    rows = [a for a in rows if a.type == kind] or [a for a in rows if a.type == "Q4_0"] or rows
    nearest = min(abs(math.log(a.head_dim / max(1, head_dim))) for a in rows)
    rows = [a for a in rows if abs(math.log(a.head_dim / max(1, head_dim))) == nearest]
    rows.sort(key=lambda a: a.cells)
    below: AttentionSpeed = max((a for a in rows if a.cells <= cells), key=lambda a: a.cells, default=rows[0])
    above: AttentionSpeed = min(
        (a for a in rows if a.cells >= cells), key=lambda a: a.cells, default=rows[-1]
    )
    if below.cells == above.cells:
        return below.speed
    t = math.log(cells / below.cells) / math.log(above.cells / below.cells)
    value = below.speed.value ** (1 - t) * above.speed.value**t
    return Speed(value, max(below.speed.spread, above.speed.spread))


def estimate(
    model: ModelInfo,
    plan: Plan,
    rates: Rates,
    workload: Workload,
    free: Mapping[str, int],
    *,
    paged: int = 0,
) -> Estimate:
    """The speed of ``plan`` for ``workload``. ``free``: bytes per device, by which layers are shared out where the
    plan gives no shares. ``paged``: bytes of weights on the CPU that main memory does not hold."""
    place = plan.placement
    costs = Costs(model, rates, plan.settings, workload, place.devices, kv_on_device=place.kv_on_device)
    layers = placement.layer_devices(model, place, free)
    where = placement.resolve(model, place, free)
    parts = [
        costs.layer(i, layers[i], [where[t.name] for t in costs.movable(i)]) for i in range(model.n_layers)
    ]
    parts += [costs.boundary(a, b) for a, b in zip((CPU, *layers), layers, strict=False)]
    output = costs.output_tensor()
    moved = None if output is None or model.tied_output else where[output.name]
    parts += [costs.output(layers[-1], moved), costs.fixed({*layers, *where.values()})]
    if paged:
        here = [t for t in model.tensors if where[t.name] == CPU]
        prefill, decode = total(p.prefill for p in parts), total(p.decode for p in parts)
        parts.append(costs.faults(here, paged, prefill.seconds, decode.seconds))
        rates = dataclasses.replace(rates, notes=(*rates.notes, *_assumed(rates)))
    return combine(parts, workload, rates, {*layers, *where.values()})


def _assumed(rates: Rates) -> Iterable[str]:
    """What is not known of the drive where weights come back by page faults."""
    if rates.drive is None:
        yield f"the drive's speed is not known: {ASSUMED_DRIVE.value / 1e9:.1f} GB/s are assumed"
    if rates.read_ahead is None:
        yield (
            f"the read-ahead of the drive is not known: {mapped.DEFAULT_READ_AHEAD >> 10} KiB are assumed where "
            "weights come back by page faults"
        )


def combine(parts: Iterable[Both], workload: Workload, rates: Rates, devices: Iterable[str]) -> Estimate:
    """An estimate of all parts of a plan."""
    found = list(parts)
    prefill, decode = total(p.prefill for p in found), total(p.decode for p in found)
    used = sorted({CPU, *devices} & set(rates.devices))

    def speed(spent: Spent, tokens: int) -> tuple[float, tuple[float, float]]:
        middle = max(spent.seconds, 1e-12)
        slack = min(spent.slack + MODEL_ERROR * middle, 0.9 * middle)
        return tokens / middle, (tokens / (middle + slack), tokens / (middle - slack))

    prefill_speed, prefill_interval = speed(prefill, workload.prompt)
    decode_speed, decode_interval = speed(decode, 1)
    return Estimate(
        prefill_speed,
        prefill_interval,
        decode_speed,
        decode_interval,
        prefill.seconds + workload.output * decode.seconds,
        {k: v for k, v in prefill.parts.items() if v > 0},
        {k: v for k, v in decode.parts.items() if v > 0},
        {d: rates.of(d).provenance for d in used},
        (*rates.notes, *(note for d in used for note in rates.of(d).notes)),
    )
