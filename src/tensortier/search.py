"""Every placement worth comparing, under every choice of settings, with its memory and its time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from tensortier import candidates, cost, formulas, memory, optimizer
from tensortier.budget import Budget
from tensortier.candidates import EVERYTHING, FIT, OPTIMAL, Question, excess
from tensortier.rates import Rates
from tensortier.types import DeviceMemory, Estimate, ModelInfo, Placement, Plan, Settings, Workload

TIE = 0.01  # of the time: within it the simpler one wins
PAGEABLE = ("auto", "mmap")  # load modes that map the file and do not hold it
KERNELS_GAIN = (
    0.05  # that other kernels than llama.cpp's choice have to bring: measurements are off by as much
)
SMALL_UBATCH_GAIN = (
    0.05  # that computing less at once has to bring: prompts may be longer than the workload says
)
QUANTIZED_KV_GAIN = 0.05  # that a quantized KV cache has to bring: it costs a little quality


@dataclasses.dataclass(frozen=True)
class Option:
    """A placement with what it takes."""

    name: str
    settings: Settings
    placement: Placement
    rows: tuple[DeviceMemory, ...]
    over: Mapping[str, int]  # bytes that are missing on devices
    paged: int | None  # bytes of weights that main memory does not hold; None: it holds not even the rest
    estimate: Estimate

    @property
    def fits(self) -> bool:
        return not self.over and self.paged is not None

    @property
    def seconds(self) -> float:
        return self.estimate.seconds


class _Corrected:
    """Formulas with compute buffers as large as llama.cpp says they are."""

    def __init__(self, answers: memory.Answers, more: Mapping[str, int]) -> None:
        self._answers = answers
        self._more = more

    def ask(self, plan: Plan) -> tuple[DeviceMemory, ...]:
        return tuple(
            dataclasses.replace(row, compute_bytes=max(0, row.compute_bytes + self._more.get(row.device, 0)))
            for row in self._answers.ask(plan)
        )


class Search:
    """Over ``choices`` of settings, the first of which are those that were asked for. Bytes are by formula, made
    exact where it matters by ``compare_with`` and ``learn``."""

    def __init__(
        self,
        model: ModelInfo,
        budget: Budget,
        start: Plan,
        workload: Workload,
        rates: Rates,
        choices: Sequence[Settings],
    ) -> None:
        self.model = model
        self.budget = budget
        self.start = start
        self.workload = workload
        self.rates = rates
        self.choices = tuple(choices)
        self._formulas = memory.Formulas(model, budget.free, budget.helpers)
        self._more: dict[str, int] = {}
        self._costs: dict[Settings, cost.Costs] = {}

    def costs(self, settings: Settings) -> cost.Costs:
        """Times of the parts, which remember what they were asked."""
        if settings not in self._costs:
            devices = tuple(self.budget.room)
            self._costs[settings] = cost.Costs(self.model, self.rates, settings, self.workload, devices)
        return self._costs[settings]

    def question(self, settings: Settings) -> Question:
        plan = dataclasses.replace(self.start, settings=settings)
        answers = _Corrected(self._formulas, self._more)
        return Question(plan, self.model, self.budget.free, self.budget.room, answers)

    def plan_of(self, option: Option) -> Plan:
        return dataclasses.replace(self.start, settings=option.settings, placement=option.placement)

    def within(self, room: Mapping[str, int], *, ram: int | None = None) -> Search:
        """The same search with other budgets; what was learned of the formulas stays."""
        budget = dataclasses.replace(self.budget, room=room, ram=self.budget.ram if ram is None else ram)
        other = Search(self.model, budget, self.start, self.workload, self.rates, self.choices)
        other._more = self._more
        if tuple(room) == tuple(self.budget.room):  # times do not depend on how much room there is
            other._costs = self._costs
        return other

    def compare_with(self, exact: memory.Answers) -> None:
        """Asks one question of both, and keeps how far the formulas are off."""
        question = self.question(self.choices[0])
        place = question.offloaded(question.devices) if question.devices else Placement()
        told = exact.ask(dataclasses.replace(question.plan, placement=place))
        ours = {row.device: row.total_bytes for row in self._formulas.ask(self.plan_at(place))}
        self._more = {row.device: row.total_bytes - ours.get(row.device, 0) for row in told}

    def plan_at(self, place: Placement) -> Plan:
        return dataclasses.replace(self.start, settings=self.choices[0], placement=place)

    def learn(self, over: Mapping[str, int]) -> None:
        """That a placement took so many bytes more than there was room for."""
        for device, nbytes in over.items():
            self._more[device] = self._more.get(device, 0) + nbytes

    def option(
        self, name: str, settings: Settings, place: Placement, rows: tuple[DeviceMemory, ...] | None = None
    ) -> Option:
        """A placement with its memory and time."""
        question = self.question(settings)
        taken = question.rows(place) if rows is None else rows
        paged = self.budget.paged(taken, pageable=self.pageable(settings))
        estimate = cost.estimate(
            self.model,
            dataclasses.replace(question.plan, placement=place),
            self.rates,
            self.workload,
            self.budget.free,
            paged=paged or 0,
        )
        return Option(name, settings, place, taken, excess(taken, self.budget.room), paged, estimate)

    def options(self) -> tuple[Option, ...]:
        """All of them. Where everything fits on the fastest device, only that and the CPU alone."""
        asked = self.choices[0]
        optimal = self.optima()
        found = list(optimal)
        if any(o.name.startswith(EVERYTHING) for o in optimal):
            return (*optimal, self.option(candidates.CPU_ONLY, asked, Placement()))
        for settings in dict.fromkeys((asked, *(o.settings for o in optimal))):
            question = self.question(settings)
            found += [self.option(name, settings, place) for name, place in candidates.proposals(question)]
        if not self.budget.room:
            found += [self.option(candidates.CPU_ONLY, s, Placement()) for s in self.choices[1:]]
        elif not any(o.name.startswith(EVERYTHING) for o in found):
            question = self.question(asked)
            place = question.offloaded(question.devices)
            found.append(self.option(EVERYTHING + " and ".join(question.devices), asked, place))
        return tuple(found)

    def optima(self) -> tuple[Option, ...]:
        """All on the fastest device where it fits, with each choice of settings; else the optimum."""
        if not self.budget.room:
            return ()
        return tuple(self._everything() or self._optimal())

    def _everything(self) -> list[Option]:
        """All on the device with the fastest memory, with each choice of settings that fits there."""
        fastest = max(self.budget.room, key=lambda d: self.rates.of(d).memory.value)
        found = []
        for settings in self.choices:
            if place := candidates.everything(self.question(settings), (fastest,)):
                found.append(self.option(EVERYTHING + fastest, settings, place))
            elif settings == self.choices[0]:
                return []
        return found

    def _optimal(self) -> list[Option]:
        """The optimum of the best choice of settings."""
        best: Option | None = None
        least = 0.0
        for settings in self.choices:
            costs = self.costs(settings)
            # by how much another choice would have to be faster to be taken
            handicap = self.handicap(settings)
            cutoff = None if best is None else least * self.handicap(best.settings) / handicap
            solution = optimizer.solve(costs, self.limits(costs), cutoff=cutoff)
            if solution is None:
                continue
            option = self.option(OPTIMAL, settings, solution.placement)
            # By the least that reading from the drive takes, not by page faults: our own backend may do it.
            if option.fits and (cutoff is None or solution.seconds < cutoff):
                best, least = option, solution.seconds
        return [best] if best is not None else []

    def limits(self, costs: cost.Costs) -> optimizer.Limits:
        """What the optimizer may fill: compute buffers as if every device did some of everything."""
        settings, model = costs.settings, self.model
        largest = max((t.nbytes for i in range(model.n_layers) for t in costs.movable(i)), default=0)
        matrix = costs.output_tensor()
        compute, output, sent = {}, {}, (0, 0)
        for device in ("CPU", *self.budget.room):
            helps = device == costs.helper
            taken = functools.partial(
                formulas.compute_bytes,
                model,
                settings,
                inputs=device == "CPU",
                staged=largest if helps else 0,
            )
            base, whole = taken(output=False), taken()
            compute[device] = max(0, base + self._more.get(device, 0))
            output[device] = whole - base
            if helps and matrix is not None:
                most = taken(staged_output=matrix.nbytes)
                sent = (most - whole, most - base)
        return optimizer.Limits(
            self.budget.room,
            self.budget.ram,
            compute,
            output,
            sent,
            self.budget.shared,
            self.pageable(settings),
        )

    def pageable(self, settings: Settings) -> bool:
        """Whether weights may be more than main memory holds."""
        return settings.load_mode in PAGEABLE

    def possible(self, settings: Settings) -> bool:
        """Whether anything fits with these settings."""
        other = Search(self.model, self.budget, self.start, self.workload, self.rates, (settings,))
        other._more = self._more
        return other.best(other.options()) is not None

    def handicap(self, settings: Settings) -> float:
        """What the time of a plan with these settings is multiplied by when it is compared."""
        asked = self.choices[0]
        # by one for each choice that needs a reason of its own
        factor = 1.0 if settings.n_ubatch >= asked.n_ubatch else 1 / (1 - SMALL_UBATCH_GAIN)
        if (settings.type_k, settings.type_v) != (asked.type_k, asked.type_v):
            return factor / (1 - QUANTIZED_KV_GAIN)
        if settings.repack != asked.repack:
            return factor / (1 - KERNELS_GAIN)
        return factor if settings == asked or factor > 1 else 1 + TIE

    def best(self, options: Sequence[Option]) -> Option | None:
        """The fastest that fits, or of those as good as it the simplest; None where nothing fits."""
        fitting = [o for o in options if o.fits]
        if not fitting:
            return None

        def compared(option: Option) -> float:
            return option.seconds * self.handicap(option.settings)

        least = min(map(compared, fitting))
        good = [o for o in fitting if compared(o) <= least * (1 + TIE)]

        def beaten_by_fit(option: Option) -> bool:
            rivals = [o for o in fitting if o.name == FIT and o.settings.type_k == option.settings.type_k]
            return any(rival.seconds < option.seconds for rival in rivals)

        good = [o for o in good if not beaten_by_fit(o)] or good
        return min(good, key=lambda o: (candidates.simplicity(o.name), compared(o)))
