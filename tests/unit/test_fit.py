"""The emulated ``--fit`` against llama.cpp's own, which was run once on the skeletons (tests/golden/fit)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tensortier import fit, gguf, memory, placement
from tensortier.types import Override, Placement, Plan, Settings
from tests.backend_fixtures import rpc_server

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "fit" / "fit.json").read_text())["cases"]
MIB = 1 << 20


@pytest.fixture(scope="module")
def servers(rpc_module: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("servers")
    with rpc_server(folder / "a.log") as a, rpc_server(folder / "b.log") as b:
        yield a, b


@pytest.fixture(scope="module")
def probe() -> Iterator[memory.Probe]:
    with memory.Probe() as probe:
        yield probe


def name(case: dict[str, Any]) -> str:
    return f"{case['model']}-{case['n_ctx']}-{'-'.join(map(str, case['free_mib']))}"


@pytest.mark.parametrize("case", GOLDEN, ids=name)
def test_same_as_llama_cpp(
    case: dict[str, Any],
    skeleton: Callable[[str], Path],
    servers: tuple[str, str],
    probe: memory.Probe,
) -> None:
    """Every tensor on the same device and the same context, where both ask llama.cpp for the bytes."""
    path = skeleton(case["model"])
    model = gguf.read(path)
    free = {f"RPC{i}": size * MIB for i, size in enumerate(case["free_mib"])}
    settings = Settings(n_ctx=case["n_ctx"], n_ubatch=case["n_ubatch"], flash_attention="on")
    plan = Plan(str(path), settings=settings, rpc=servers[: len(free)])
    found = fit.fit(plan, model, probe, free)
    told = case["answer"]
    overrides = tuple(Override(p, d) for p, d in told["overrides"])
    wanted = Placement(tuple(free), told["n_gpu_layers"], tuple(told["split"]), overrides)
    assert placement.layer_devices(model, found.placement, free) == placement.layer_devices(
        model, wanted, free
    )
    assert placement.resolve(model, found.placement, free) == placement.resolve(model, wanted, free)
    assert found.settings.n_ctx == told["n_ctx"]
