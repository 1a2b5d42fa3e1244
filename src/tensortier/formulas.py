"""Bytes by formula, for machines that are not here and questions that must be answered at once.

Where llama.cpp can be asked, ask it (``memory.py``). These follow its sources: llama-kv-cache.cpp,
llama-memory-recurrent.cpp and the shapes of its graphs; the tests compare them with its answers.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensortier.types import ModelInfo, Settings

CELLS_PADDING = 256  # llama.cpp rounds the context and every window up to this
# bytes per 32 values
KV_BYTES_PER_32 = {
    "f32": 128,
    "f16": 64,
    "bf16": 64,
    "q8_0": 34,
    "q5_1": 24,
    "q5_0": 22,
    "q4_1": 20,
    "q4_0": 18,
    "iq4_nl": 18,
}


def padded(cells: int) -> int:
    return -(-cells // CELLS_PADDING) * CELLS_PADDING


def context_of(model: ModelInfo, settings: Settings) -> int:
    """Tokens of context the settings mean, all sequences together, which share them: 0 stands for what the model was
    trained for."""
    return padded(settings.n_ctx or model.context_length)


def ubatch_of(model: ModelInfo, settings: Settings) -> int:
    return min(settings.n_ubatch, settings.n_batch, context_of(model, settings))


def kv_bytes(model: ModelInfo, settings: Settings) -> tuple[int, ...]:
    """Bytes of KV cache or recurrent state of each layer.

    A sliding window keeps its own number of cells for each sequence, plus one micro-batch. A recurrent layer keeps an
    f32 state per sequence, whatever the context.
    """
    context, windowed = context_of(model, settings), _window_cells(model, settings)
    state = _recurrent_state_bytes(model) * settings.n_seq_max
    sizes = []
    for layer, per_32 in enumerate(_values_per_32_cells(model, settings)):
        if model.recurrent_layers and model.recurrent_layers[layer]:
            sizes.append(state)
        else:
            cells = windowed if _is_windowed(model, layer) and not settings.swa_full else context
            sizes.append(cells * per_32 // 32)
    return tuple(sizes)


def cell_bytes(model: ModelInfo, settings: Settings) -> tuple[float, ...]:
    """Of one token's keys and values in each layer; 0 in recurrent ones.

    GQA: KV heads x (key width x bytes + value width x bytes). MLA keeps keys only, of the latent vector and the rotary
    part.
    """
    recurrent = model.recurrent_layers or (False,) * model.n_layers
    values = _values_per_32_cells(model, settings)
    return tuple(0.0 if skip else value / 32 for skip, value in zip(recurrent, values, strict=True))


def _values_per_32_cells(model: ModelInfo, settings: Settings) -> Iterator[int]:
    """Bytes, of each layer as if it had attention."""
    per_k = KV_BYTES_PER_32[settings.type_k]
    per_v = KV_BYTES_PER_32[settings.type_v]
    for layer in range(model.n_layers):
        heads = model.n_head_kv[layer]
        if model.kv_lora_rank:
            yield (model.kv_lora_rank + model.n_rot) * per_k if heads else 0
        else:
            swa = _is_windowed(model, layer)
            width_k = model.head_dim_k_swa if swa and model.head_dim_k_swa else model.head_dim_k
            width_v = model.head_dim_v_swa if swa and model.head_dim_v_swa else model.head_dim_v
            yield heads * (width_k * per_k + width_v * per_v)


def _is_windowed(model: ModelInfo, layer: int) -> bool:
    return bool(model.swa_layers) and model.swa_layers[layer] and model.sliding_window > 0


def _window_cells(model: ModelInfo, settings: Settings) -> int:
    window = model.sliding_window * settings.n_seq_max + ubatch_of(model, settings)
    return padded(min(context_of(model, settings), window))


def _recurrent_state_bytes(model: ModelInfo) -> int:
    """Of one layer and one sequence, f32: the convolution's last columns and the state-space matrix, in the
    terms of Mamba (llama_hparams::n_embd_r, n_embd_s). RWKV: two shifted tokens and a matrix per head."""

    def value(key: str) -> int:
        return int(model.metadata.get(f"{model.architecture}.{key}", 0))

    if head := value("wkv.head_size"):
        return 4 * (value("token_shift_count") or 2) * model.n_embd + 4 * model.n_embd * head
    if cache := value("shortconv.l_cache"):
        return 4 * model.n_embd * (cache - 1)
    inner, size = value("ssm.inner_size"), value("ssm.state_size")
    columns = max(0, value("ssm.conv_kernel") - 1)
    return 4 * (columns * (inner + 2 * value("ssm.group_count") * size) + size * inner)


def compute_bytes(
    model: ModelInfo,
    settings: Settings,
    *,
    attention: bool = True,
    ffn: bool = True,
    output: bool = True,
    inputs: bool = True,
    staged: int = 0,
    staged_output: int = 0,
) -> int:
    """The compute buffer of a device, by what it computes of a whole micro-batch: an estimate, usually within a
    few MiB with flash attention.

    The larger of two moments: the output (logits of every token beside the hidden states), and a layer (the
    attention mask, hidden states, and the widest of feed-forward and attention). ``inputs``: it also looks up the
    embedding, as the CPU does; the mask is made there too.

    ``staged``: bytes of the largest matrix that is copied here for wide batches (op offload), ``staged_output``
    those of the output's where that is one. llama.cpp begins a new piece of the graph for each such matrix, so no
    two are there at once (ggml_backend_sched_split_graph); not compared with a device yet.
    """
    ffn = ffn or staged > 0
    output = output or staged_output > 0
    batch = ubatch_of(model, settings)
    context = context_of(model, settings)
    flash = settings.flash_attention != "off"
    state = 4 * batch * model.n_embd
    logits = 4 * batch * model.n_vocab + state * (2 if inputs else 1) if output else 0
    masked = context
    if any(model.swa_layers) and model.sliding_window:
        masked += _window_cells(model, settings)
    mask = (2 if flash else 4) * masked * batch
    logits += staged_output
    if not (attention or ffn):
        return max(logits, mask + 2 * state if inputs else 0)
    wide = 0
    if ffn:
        neurons = 4 * batch * max(model.n_ff, default=0)
        wide = 3 * neurons  # up, gate and their product
        if model.is_moe:
            neurons = 4 * batch * model.n_expert_used * (_expert_width(model) or max(model.n_ff, default=0))
            wide = max(3 * neurons, (2 * model.n_expert_used + 1) * state)
    if attention and not flash:
        wide = max(wide, 4 * batch * max(model.n_head, default=0) * context)
    return max(logits, mask + wide + staged + state * (4 if attention else 1))


def _expert_width(model: ModelInfo) -> int:
    """Neurons of one routed expert."""
    key = f"{model.architecture}.expert_feed_forward_length"
    value = model.metadata.get(key, 0)
    return int(value) if isinstance(value, int) else 0
