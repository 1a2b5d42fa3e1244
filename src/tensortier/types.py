"""The vocabulary of the project: frozen dataclasses that every part shares. Standard library only.

Sizes are in bytes, speeds in tokens/s or bytes/s, times in seconds unless a name says otherwise. Tensor
shapes are in ggml's order: ``shape[0]`` is the contiguous dimension (the input width of a weight matrix).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Role(StrEnum):
    """What a tensor does, as far as placement is concerned."""

    ATTENTION = "attention"
    FFN_UP = "ffn_up"
    FFN_GATE = "ffn_gate"
    FFN_DOWN = "ffn_down"
    EXPERT_UP = "expert_up"
    EXPERT_GATE = "expert_gate"
    EXPERT_DOWN = "expert_down"
    EXPERT_GATE_UP = "expert_gate_up"  # gate and up merged into one tensor
    SHARED_EXPERT = "shared_expert"
    ROUTER = "router"
    EMBEDDING = "embedding"
    OUTPUT = "output"
    NORM = "norm"
    RECURRENT = "recurrent"  # state-space and linear-attention weights
    OTHER = "other"

    @property
    def is_routed_expert(self) -> bool:
        """True for weights of which a token uses only the experts it is routed to."""
        return self.value.startswith("expert_")

    @property
    def is_dense_ffn(self) -> bool:
        return self.value.startswith("ffn_")


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    role: Role
    layer: int | None  # None for tensors outside the blocks
    shape: tuple[int, ...]
    qtype: str  # ggml's name of the type: "F16", "Q4_K", "MXFP4", ...
    nbytes: int
    file: int  # index into ModelInfo.files
    offset: int  # of the data, from the start of that file

    @property
    def n_elements(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n


@dataclass(frozen=True)
class ModelInfo:
    """What planning needs to know of a model. Built by ``gguf.read``."""

    files: tuple[str, ...]  # paths or URLs, in split order
    file_sizes: tuple[int, ...]
    architecture: str
    name: str
    quantization: str  # the file's own label ("Q4_K_M"), else the type that holds most bytes
    tensors: tuple[Tensor, ...]
    n_layers: int
    n_embd: int
    n_vocab: int
    context_length: int  # that the model was trained for; 0 when the file does not say
    n_head: tuple[int, ...]  # per layer
    n_head_kv: tuple[int, ...]  # per layer; 0 where a layer has no KV cache
    head_dim_k: int
    head_dim_v: int
    n_ff: tuple[int, ...]  # per layer
    n_expert: int = 0
    n_expert_used: int = 0
    n_expert_shared: int = 0
    sliding_window: int = 0  # 0: none
    swa_layers: tuple[bool, ...] = ()  # per layer, True where the window applies
    head_dim_k_swa: int = 0
    head_dim_v_swa: int = 0
    recurrent_layers: tuple[bool, ...] = ()  # per layer
    kv_lora_rank: int = 0  # MLA when not 0
    n_rot: int = 0
    n_layers_nextn: int = 0  # the last of n_layers that only draft tokens (MTP) and do not run otherwise
    tied_output: bool = (
        False  # no output.weight: llama.cpp loads token_embd a second time as the output layer
    )
    chat_template: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def path(self) -> str:
        """The first (or only) file: what llama.cpp is given to load."""
        return self.files[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def n_params(self) -> int:
        return sum(t.n_elements for t in self.tensors)

    @property
    def is_moe(self) -> bool:
        return self.n_expert > 0


@dataclass(frozen=True)
class Device:
    """One ggml device, or the CPU with main memory."""

    name: str  # ggml's name: "CPU", "CUDA0", "RPC0"
    kind: str  # "cpu", "gpu", "igpu", "accel"
    description: str
    memory_total: int
    memory_free: int
    backend: str  # ggml's name of the registry: "CPU", "CUDA", "Vulkan", "RPC"
    buffer_type: str = ""  # what llama.cpp's -ot calls it, where that differs: "RPC0[127.0.0.1:50052]"
    details: Mapping[str, Any] = field(default_factory=dict)  # NVML's answers, where there are any
    device_id: str = ""  # PCI address, the same for one card under two backends; empty where ggml has none


@dataclass(frozen=True)
class Drive:
    path: str  # the path that was asked about
    mount_point: str
    device: str
    filesystem: str
    kind: str  # "nvme", "ssd", "hdd", "network", "memory", "unknown"
    total: int
    free: int
    details: Mapping[str, Any] = field(default_factory=dict)  # published speeds; on Linux the read-ahead


@dataclass(frozen=True)
class Hardware:
    cpu_model: str
    architecture: str
    physical_cores: int
    logical_cores: int
    performance_cores: int  # equals physical_cores where all cores are alike
    usable_cpus: int  # after affinity and control-group limits
    cpu_features: tuple[str, ...]
    ram_total: int  # of the machine
    ram_limit: int  # what this process may use: control-group limit or ram_total
    ram_available: int  # now, within ram_limit
    swap_total: int
    os: str
    devices: tuple[Device, ...]
    drives: tuple[Drive, ...]
    cards: tuple[Mapping[str, Any], ...] = ()  # NVML's answers for every NVIDIA card, in use or not
    warnings: tuple[str, ...] = ()  # such as a backend module that does not load here


@dataclass(frozen=True, slots=True)
class Override:
    """Weights whose name the pattern finds (unanchored, first match wins) go to ``device``."""

    pattern: str
    device: str  # a ggml device name, or the name of one of its buffer types


@dataclass(frozen=True)
class Placement:
    """Where everything goes, in the terms llama.cpp takes it."""

    devices: tuple[str, ...] = ()  # that layers are offloaded to, in order; empty: all on the CPU
    n_gpu_layers: int = 0  # -1: all, the output layer included
    tensor_split: tuple[float, ...] = ()  # shares of the offloaded layers per device; empty: by free memory
    overrides: tuple[Override, ...] = ()
    kv_on_device: bool = True  # False keeps the KV cache in RAM


@dataclass(frozen=True)
class Settings:
    """How the context is made and computed. The command line's defaults are these."""

    n_ctx: int = 4096  # 0: what the model was trained for
    n_batch: int = 2048
    n_ubatch: int = 512
    n_seq_max: int = 1
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attention: str = "auto"  # "auto", "on", "off"
    threads: int = 0  # 0: one per physical core that this process may use
    threads_batch: int = 0  # 0: as threads
    load_mode: str = "auto"  # "auto", "mmap", "none", "mlock", "mmap+mlock", "direct"
    repack: bool = True  # let the CPU backend reorder weights for faster kernels
    op_offload: bool = True
    swa_full: bool = False


@dataclass(frozen=True)
class Tier:
    """How weights that an override sends to the device "TIER" are read from the drive while the model runs."""

    expert_bytes: int = 0  # RAM for routed experts; at least those that one token uses in one layer
    dense_bytes: int = 0  # RAM for the other such weights: those that stay, and a ring for the rest
    policy: str = "lru"  # which experts stay: "lru", "global-lru", "lfu", "static", "second-touch"
    profile: str | None = None  # a routing trace with the frequencies that policy "static" goes by
    reader: str = "auto"  # "io_uring", "threads"
    queue_depth: int = 24  # reads under way at a time: the fewer, the sooner the first of them is there
    read_bytes: int = 2 << 20  # of the largest single read
    guesses: int = (
        -1
    )  # experts of the next layer read ahead, by its router; 0: none, -1: where it proves faster
    warm_start: bool = True  # experts that stayed when the model was last closed are read when it is loaded


@dataclass(frozen=True)
class DeviceMemory:
    """What one device holds for a loaded model."""

    device: str
    weights_bytes: int
    kv_bytes: int  # KV cache and recurrent state
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True)
class Workload:
    """What the model is asked to do, in tokens. The default is ``chat``."""

    name: str = "chat"
    prompt: int = 256  # computed per request
    output: int = 300  # generated per request
    depth: int = 2048  # already in the context when the request begins

    @property
    def context(self) -> int:
        """Cells of context it needs."""
        return self.depth + self.prompt + self.output


@dataclass(frozen=True)
class Estimate:
    """Predicted speed of a plan for a workload. Intervals are (low, high)."""

    prefill_tokens_per_second: float
    prefill_interval: tuple[float, float]
    decode_tokens_per_second: float  # at the middle of the output
    decode_interval: tuple[float, float]
    seconds: float  # that one request takes, prompt and output
    prefill_seconds: Mapping[str, float]  # of the whole prompt, by what it is spent on
    decode_seconds: Mapping[
        str, float
    ]  # of one token, by what it is spent on: "weights on CPU", "splits", ...
    provenance: Mapping[str, str]  # device -> "measured", "catalogue"
    notes: tuple[str, ...] = ()  # one sentence for each thing that was assumed


@dataclass(frozen=True)
class Candidate:
    """A placement that was compared with the chosen one."""

    name: str  # "optimal", "everything on the GPU", "llama.cpp --fit", "whole layers", ...
    fits: bool
    placement: Placement
    settings: Settings
    memory: tuple[DeviceMemory, ...] = ()
    estimate: Estimate | None = None
    note: str = ""  # why it lost or does not fit


@dataclass(frozen=True)
class Plan:
    """The one artefact that the engine consumes."""

    model: str  # path of the first file
    placement: Placement = Placement()
    settings: Settings = Settings()
    memory: tuple[DeviceMemory, ...] = ()  # predicted; empty where nothing was asked
    rpc: tuple[str, ...] = ()  # host:port of remote servers that must be registered first
    tier: Tier | None = None  # needed by overrides to "TIER"
    reasons: tuple[str, ...] = ()  # one sentence each: why it is so
    warnings: tuple[str, ...] = ()
    model_id: str = ""  # fingerprint of the model's tensors; empty: any
    machine_id: str = ""  # fingerprint of the machine's devices and memory; empty: any
    workload: Workload | None = None
    estimate: Estimate | None = None
    candidates: tuple[Candidate, ...] = ()  # that were compared, the chosen one first


@dataclass(frozen=True)
class Export:
    """A plan in the terms of another engine."""

    target: str  # one of export.TARGETS
    argv: tuple[str, ...]  # the command, unquoted; empty where the engine is not started by one
    files: Mapping[str, str]  # name -> content, to be written beside where the command runs
    lost: tuple[str, ...] = ()  # one sentence for each thing the engine cannot be told


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Defaults are llama.cpp's own."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = -1  # -1: until the model stops or the context is full
    stop: tuple[str, ...] = ()
    grammar: str | None = None  # GBNF
    logprobs: int | None = None  # None: none; else those of the tokens, and of so many alternatives (0 to 20)
    logit_bias: tuple[tuple[int, float], ...] = ()  # token, what is added to its logit


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How probable a token was, by the model alone: natural logarithms, before any sampler."""

    token_id: int
    token_bytes: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()  # the most probable: id, bytes, logprob


@dataclass(frozen=True, slots=True)
class Piece:
    """One step of a streamed answer."""

    text: str
    finish_reason: str | None = None  # "stop", "length", "tool_calls"; None while it goes on
    delta: Mapping[str, Any] | None = None  # the OpenAI delta, for tool calls
    logprobs: tuple[TokenLogprob, ...] = ()  # of the text's tokens, where they were asked for


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vector of a text, as the model gives it (not normalised)."""

    vector: tuple[float, ...]
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Activity:
    """What an engine does at the moment."""

    active: int  # requests that have a sequence
    waiting: int  # requests that wait for one
    prompt_tokens_total: int  # computed since the model was loaded
    completion_tokens_total: int
    decode_tokens_per_second: float  # of all requests together, over the last second
    kv_used_cells: int  # kept prefixes of earlier requests included
    n_ctx: int


@dataclass(frozen=True)
class TierLayerStats:
    """Routed experts of one layer, since the model was loaded."""

    layer: int
    capacity: int  # experts that stay in RAM; of all layers together for policy "global-lru"
    passes: int  # tokens, or micro-batches of them
    uses: int  # distinct experts, summed over passes
    hits: int  # of these, in RAM when the pass began; not those that were read ahead
    bytes_read: int
    stall_seconds: float  # waited for the drive with nothing to compute
    guess_uses: int = 0  # uses of passes for which the layer before had made a guess
    guess_named: int = 0  # of these, named by it
    guess_reads: int = 0  # experts read ahead
    guess_found: int = 0  # of these, used in the pass that they were read for


@dataclass(frozen=True)
class TierStats:
    """What reading weights from the drive took and gave, since the model was loaded."""

    layers: tuple[TierLayerStats, ...]  # with routed experts on the drive
    memory_bytes: int  # allocated for weights from the drive
    scratch_bytes: int  # the most that computing took beside it
    expert_slots: int  # for experts that stay
    passing_slots: int  # for those that do not
    resident_bytes: int  # other weights that stay
    ring_bytes: int  # through which the rest of them passes
    dense_uses: int  # of the other weights
    dense_hits: int
    dense_bytes_read: int
    dense_stall_seconds: float
    drive_bytes: int  # whole sectors
    drive_reads: int
    drive_busy_seconds: float  # with at least one read under way
    reader: str  # "io_uring", "threads"
    direct: bool  # past the page cache
    locked: bool  # the memory cannot be swapped out
    guessing: bool = False  # experts are read ahead now
    warm_experts: int = 0  # read when the model was loaded, because they stayed the last time

    @property
    def guess_recall(self) -> float:
        """Of the experts used where there was a guess, the share that it named; 0 where there was none."""
        uses = sum(layer.guess_uses for layer in self.layers)
        return sum(layer.guess_named for layer in self.layers) / uses if uses else 0.0

    @property
    def guess_precision(self) -> float:
        """Of the experts read ahead, the share that was used; 0 where there was none."""
        reads = sum(layer.guess_reads for layer in self.layers)
        return sum(layer.guess_found for layer in self.layers) / reads if reads else 0.0

    @property
    def hit_rate(self) -> float:
        """Of experts, 0 to 1; 0 where none was used."""
        uses = sum(layer.uses for layer in self.layers)
        return sum(layer.hits for layer in self.layers) / uses if uses else 0.0

    @property
    def stall_seconds(self) -> float:
        return self.dense_stall_seconds + sum(layer.stall_seconds for layer in self.layers)

    @property
    def drive_bytes_per_second(self) -> float:
        """While it was busy."""
        return self.drive_bytes / self.drive_busy_seconds if self.drive_busy_seconds else 0.0


@dataclass(frozen=True)
class GenerationStats:
    """Of one request. Speeds are 0.0 where nothing was computed."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt: already in the KV cache
    completion_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0  # tokens chosen after the first, the end-of-text token included
    finish_reason: str | None = None

    @property
    def prompt_tokens_per_second(self) -> float:
        n = self.prompt_tokens - self.cached_tokens
        return n / self.prompt_seconds if self.prompt_seconds > 0 and n > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """The first token comes out of the prompt's computation, so it is no decode step."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds > 0 else 0.0
