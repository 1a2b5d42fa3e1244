"""Every skeleton on every size of card for every workload: the plan is never predicted slower than llama.cpp's --fit.

    python -m bench.plan_grid            # 360 plans, about two minutes
    python -m bench.plan_grid --models qwq-32b-iq4_xs --cards 24

Expected: no line marked SLOWER. The last column is how many times longer --fit would take.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.models import skeletons

from tensortier import catalogue, cost, fit, gguf, memory, planner, rates, workloads
from tensortier.budget import budget_of
from tensortier.candidates import excess
from tensortier.errors import UsageError
from tensortier.types import Hardware, ModelInfo, Plan, Settings, Workload

GIB = 1 << 30
CARDS = {
    4: "GTX 1650 GDDR6",
    6: "GTX 1660",
    8: "RTX 4060",
    12: "RTX 3060 12GB",
    16: "RTX 4060 Ti 16GB",
    24: "RTX 3090",
    32: "RTX 5090",
    48: "A40",
    80: "A100 SXM 80GB",
}
RAM = 64 * GIB


@dataclasses.dataclass(frozen=True)
class Comparison:
    model: str
    gib: int
    workload: str
    plan: Plan | None  # None: it cannot run
    fit_seconds: float | None  # of the fastest of --fit's answers; None: it does not fit
    seconds: float  # that planning took

    @property
    def slower(self) -> bool:
        if self.plan is None or self.plan.estimate is None:
            return self.fit_seconds is not None
        return self.fit_seconds is not None and self.plan.estimate.seconds > self.fit_seconds * (1 + 1e-9)


def compare(
    name: str, model: ModelInfo, sizes: Iterable[int], loads: Iterable[Workload]
) -> Iterator[Comparison]:
    """Plans with context and micro-batch left open, against ``--fit`` for llama.cpp's own settings and the plan's."""
    for size in sizes:
        hardware = catalogue.hypothetical([CARDS[size]], RAM, memory="DDR5-5600 x2")
        for load in loads:
            started = time.perf_counter()
            made: Plan | None
            try:
                made = planner.plan(
                    model,
                    hardware,
                    Settings(flash_attention="on"),
                    workload=load,
                    rates=rates.from_catalogue(hardware),
                    open=planner.Open(context=True, ubatch=True),
                    answers=memory.Formulas(model, {}),
                )
            except UsageError:
                made = None
            seconds = time.perf_counter() - started
            yield Comparison(name, size, load.name, made, _fit_seconds(model, hardware, load, made), seconds)


def _fit_seconds(model: ModelInfo, hardware: Hardware, load: Workload, made: Plan | None) -> float | None:
    """Worked out apart from the planner: the emulation, the formulas and the time model only."""
    speeds = rates.from_catalogue(hardware)
    settings = Settings(
        n_ctx=planner.context_for(model, load), threads=hardware.performance_cores, flash_attention="on"
    )
    budget = budget_of(hardware, speeds, model, settings)
    answers = memory.Formulas(model, budget.free, budget.helpers)
    tried = [settings] if made is None else [settings, dataclasses.replace(made.settings, load_mode="auto")]
    found = []
    for one in tried:
        plan = fit.fit(Plan(model.path, settings=one), model, answers, budget.free)
        rows = answers.ask(plan)
        paged = budget.paged(rows, pageable=True)
        if paged is not None and not excess(rows, budget.room):
            found.append(cost.estimate(model, plan, speeds, load, budget.free, paged=paged).seconds)
    return min(found, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(skeletons.NAMES))
    parser.add_argument("--cards", nargs="*", type=int, default=list(CARDS))
    arguments = parser.parse_args()
    slower = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            model = gguf.read(skeletons.build(name, Path(folder) / f"{name}.gguf"))
            for c in compare(name, model, arguments.cards, workloads.NAMED.values()):
                slower += c.slower
                told = f"{c.model:26} {c.gib:3} GiB {c.workload:14}"
                if c.plan is None or c.plan.estimate is None:
                    print(f"{told} cannot run", "SLOWER" if c.slower else "")
                    continue
                times = f"{c.fit_seconds / c.plan.estimate.seconds:.2f}" if c.fit_seconds else "-"
                print(
                    f"{told} {c.plan.candidates[0].name:20} {c.plan.estimate.seconds:9.1f} s, planned in "
                    f"{c.seconds:.2f} s, --fit {times}",
                    "SLOWER" if c.slower else "",
                    flush=True,
                )
    print(f"{slower} slower than --fit")


if __name__ == "__main__":
    main()
