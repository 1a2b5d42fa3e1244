"""Graphs that llama.cpp does not make today, given to the backend itself: products of experts of several layers, and of
two models, one right after the other. What they give is compared with the CPU backend's product of the whole weights.

Whatever was gathered to be computed has to be computed before its slots go to others.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import gguf as oracle
import llama_cpp
import numpy as np
import pytest

from tensortier import gguf
from tensortier._llama.libs import ggml_function
from tests import tier_runs as runs
from tests.native.test_tier_held import ORDERS, hold, nothing_misused

F32, I32 = 0, 26  # ggml_type
pointer, size, dim = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64


class InitParams(ctypes.Structure):
    _fields_ = (("size", size), ("memory", pointer), ("no_alloc", ctypes.c_bool))


init = ggml_function("ggml_init", pointer, InitParams)
free = ggml_function("ggml_free", None, pointer)
new_tensor = ggml_function("ggml_new_tensor_3d", pointer, pointer, ctypes.c_int, dim, dim, dim)
data_of = ggml_function("ggml_get_data", pointer, pointer)
mul_mat_id = ggml_function("ggml_mul_mat_id", pointer, pointer, pointer, pointer, pointer)
mul_mat = ggml_function("ggml_mul_mat", pointer, pointer, pointer, pointer)
new_graph = ggml_function("ggml_new_graph", pointer, pointer)
expand = ggml_function("ggml_build_forward_expand", None, pointer, pointer)
device_by_name = ggml_function("ggml_backend_dev_by_name", pointer, ctypes.c_char_p)
make_backend = ggml_function("ggml_backend_dev_init", pointer, pointer, ctypes.c_char_p)
free_backend = ggml_function("ggml_backend_free", None, pointer)
compute = ggml_function("ggml_backend_graph_compute", ctypes.c_int, pointer, pointer)
tensor_get = ggml_function("ggml_backend_tensor_get", None, pointer, pointer, size, size)

Weight = tuple[int, tuple[int, ...], int]  # the tensor, its shape, its ggml_type


@contextmanager
def weights(path: Path, order: int, pattern: str = runs.EXPERTS, **room: int) -> Iterator[dict[str, Weight]]:
    """The weights of a model that are on the drive, as the backend knows them; ``room``: fields of ``Tier``."""
    found: dict[str, int] = {}

    def observe(tensor: int, ask: bool, _: object) -> bool:
        source = pointer.from_address(tensor + 152).value  # ggml_tensor.src[0]
        if ask and source:
            found[ctypes.string_at(source + 256).decode()] = source  # ggml_tensor.name
        return not ask

    callback = llama_cpp.ggml_backend_sched_eval_callback(observe)
    plan = runs.tier_plan(path, pattern, **room)
    with nothing_misused(), runs.tiered(plan, cb_eval=callback) as (_, ctx, paged):
        assert runs.decode(ctx, runs.PROMPT[:2]) == 0
        hold(paged, order)
        tensors = [t for t in gguf.read(path).tensors if re.search(pattern, t.name)]
        kinds = oracle.GGMLQuantizationType
        yield {t.name: (found[t.name], t.shape, int(kinds[t.qtype])) for t in tensors}


class Product:
    """A product, of experts or of a whole weight, for tokens and a choice of experts that a seed gives."""

    def __init__(self, weight: Weight, data: bytes, tokens: int, seed: int) -> None:
        self.weight, self.data = weight, data
        _, (width, self.rows, *rest), _ = weight
        self.experts = experts = rest[0] if rest else 0
        rng = np.random.default_rng(seed)
        self.used, self.tokens = 2 if experts else 1, tokens
        # the choice first: parts of the same experts have inputs of different widths
        self.ids = np.array([rng.permutation(max(experts, 1))[: self.used] for _ in range(tokens)], np.int32)
        self.input = rng.standard_normal((tokens, 1, width)).astype(np.float32)

    def node(self, ctx: int, weight: int) -> int:
        width = self.input.shape[-1]
        x = new_tensor(ctx, F32, width, *((1, self.tokens) if self.experts else (self.tokens, 1)))
        ctypes.memmove(data_of(x), self.input.tobytes(), self.input.nbytes)
        if not self.experts:
            return int(mul_mat(ctx, weight, x))
        ids = new_tensor(ctx, I32, self.used, self.tokens, 1)
        ctypes.memmove(data_of(ids), self.ids.tobytes(), self.ids.nbytes)
        return int(mul_mat_id(ctx, weight, x, ids))

    def whole(self, ctx: int) -> int:
        """With all experts in memory."""
        _, shape, kind = self.weight
        tensor = new_tensor(ctx, kind, *shape, *[1] * (3 - len(shape)))
        ctypes.memmove(data_of(tensor), self.data, len(self.data))
        return int(tensor)


def results(device: bytes, products: Sequence[Product], *, paged: bool) -> list[runs.Floats]:
    """All products in one graph."""
    ctx = init(InitParams(64 << 20, None, False))
    backend = make_backend(device_by_name(device), None)
    try:
        graph, nodes = new_graph(ctx), []
        for product in products:
            nodes.append(product.node(ctx, product.weight[0] if paged else product.whole(ctx)))
            expand(graph, nodes[-1])
        for node, product in zip(nodes, products, strict=True):
            nbytes = 4 * product.rows * product.used * product.tokens
            ctypes.memset(data_of(node), 0, nbytes)
        assert compute(backend, graph) == 0
        return [
            np.frombuffer(ctypes.string_at(data_of(node), 4 * p.rows * p.used * p.tokens), np.float32)
            for node, p in zip(nodes, products, strict=True)
        ]
    finally:
        free_backend(backend)
        free(ctx)


def check(products: Sequence[Product]) -> None:
    """Against the CPU backend; several times, for what one run leaves under way the next one meets."""
    expected = results(b"CPU", products, paged=False)
    for _ in range(3):
        for i, (one, other) in enumerate(zip(results(b"TIER", products, paged=True), expected, strict=True)):
            assert np.array_equal(one, other), i


@pytest.fixture(scope="module")
def models(synthetic: Callable[..., Path]) -> list[Path]:
    return [synthetic(layers=3, experts=8, used=2, vocab=512, qtype=qtype) for qtype in ("Q4_0", "Q4_K")]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("room", "tokens"), [(1, 3), (4, 1)])
@pytest.mark.parametrize("count", [1, 2])
def test_layers_one_right_after_the_other(
    order: int, room: int, tokens: int, count: int, models: list[Path]
) -> None:
    """Also the same layer again with other experts, whose slots are those of the first, and layers of two models in
    turn. With room for two experts of each layer those of the last product are there when the first one comes again."""
    sequence = [(0, "gate", 1), (0, "gate", 2), (0, "up", 2), (1, "gate", 3), (2, "down", 4), (1, "up", 5)]
    sequence.append(sequence[0])
    with ExitStack() as stack:
        products: list[Product] = []
        for path in models[:count]:
            known = stack.enter_context(weights(path, order, expert_bytes=room * runs.expert_bytes(path)[0]))
            content = path.read_bytes()
            data = {t.name: content[t.offset : t.offset + t.nbytes] for t in gguf.read(path).tensors}
            for layer, part, seed in sequence:
                name = f"blk.{layer}.ffn_{part}_exps.weight"
                products.append(Product(known[name], data[name], tokens, seed))
        if count == 2:
            products = [
                p
                for pair in zip(products[: len(sequence)], products[len(sequence) :], strict=True)
                for p in pair
            ]
        check(products)


@pytest.mark.parametrize("order", ORDERS)
def test_a_weight_is_looked_at(order: int, models: list[Path]) -> None:
    """Its bytes are read for that, and are there when the call returns."""
    content = models[0].read_bytes()
    with weights(models[0], order, expert_bytes=runs.expert_bytes(models[0])[0]) as known:
        for t in gguf.read(models[0]).tensors:
            if t.name in known:
                buffer = ctypes.create_string_buffer(1000)
                tensor_get(known[t.name][0], buffer, 777, 1000)
                assert buffer.raw == content[t.offset + 777 : t.offset + 1777]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [2, 3, 5])
def test_parts_in_another_order(order: int, tokens: int, models: list[Path]) -> None:
    """What was read for a later part gives way to a part that comes before it for once."""
    path, room = models[0], runs.expert_bytes(models[0])[0]
    content = path.read_bytes()
    with weights(path, order, expert_bytes=room) as known:
        where = {t.name: t for t in gguf.read(path).tensors}
        products = []
        for seed, parts in enumerate(
            [("up", "gate", "down"), ("gate", "up", "down"), ("down", "up", "gate")]
        ):
            for part in parts:
                tensor = where[f"blk.0.ffn_{part}_exps.weight"]
                data = content[tensor.offset : tensor.offset + tensor.nbytes]
                products.append(Product(known[tensor.name], data, tokens, seed))
        check(products)


@pytest.mark.parametrize("order", ORDERS)
def test_whole_weights_of_two_models_in_turn(order: int, models: list[Path]) -> None:
    """What one gives back when the other has its turn is read into at once."""
    with ExitStack() as stack:
        rows: list[list[Product]] = []
        for path in models:
            known = stack.enter_context(
                weights(path, order, r"attn_(q|k|v|output)\.weight", dense_bytes=96 << 10)
            )
            content = path.read_bytes()
            tensors = sorted(
                (t for t in gguf.read(path).tensors if t.name in known), key=lambda t: t.layer or 0
            )
            rows.append(
                [
                    Product(known[t.name], content[t.offset : t.offset + t.nbytes], 2, seed)
                    for seed, t in enumerate(tensors)
                ]
            )
        check([product for pair in zip(*rows, strict=True) for product in pair])
