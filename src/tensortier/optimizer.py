"""The fastest placement within memory, as mixed-integer programs (HiGHS).

llama.cpp gives layers to devices in contiguous blocks: the first ones to the CPU, then the devices in order. A
layer's attention and KV cache live with it; its feed-forward matrices may be overridden to any device. So the
program has

    at[i, d]       1 where layer i (the output is the last one) is on device d or a later one: d's block begins at
                   the first such layer
    count[g, d, p] how many of the alike layers of group g on device d have their feed-forward matrices spread over
                   the devices by pattern p

Counting alike layers in place of naming them is what keeps the program small: which of forty equal layers gives
up its matrices makes no difference, and a search that tells them apart would have to try them all.

Which devices have layers, and which are in use at all, is decided outside: one program for each choice, in the
order of what they promise, until none promises more than what was found. Inside a program the fixed charges (compute
buffers, crossings from block to block, the fixed time of a token) are then constants. As variables they would be
paid in fractions by the relaxation, and the search would have to prove a gap of 5 % by enumeration.

The objective is the sum that ``cost.estimate`` makes: layers, crossings between blocks, the output, a fixed time
by the devices in use, and the drive for what main memory does not hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tensortier import formulas, placement
from tensortier.cost import CPU, Costs
from tensortier.errors import PlanError
from tensortier.overrides import compact
from tensortier.types import ModelInfo, Placement, Role, Tensor

if TYPE_CHECKING:
    import highspy

# Each tensor begins at a multiple of this in a device's buffer, so that many bytes may be lost before each.
ALIGNMENT = 256
_MIB = 1 << 20  # bytes are given to the solver in MiB: its tolerances are absolute
_INFINITY = float("inf")
# The search stops this near to the optimum, relative: a prediction is off by more.
GAP = 2e-3
# One card is settled in hundredths of a second. Three unequal ones are a number puzzle whose last half per cent takes
# minutes to prove. There the blocks may move by so many layers from where they are when layers are cut in shares,
# one round of the solver's heuristics has to do, and other sets of devices are tried only for more than a hundredth.
_WINDOW = 1.5
_WORTH = 1e-2
_PATIENCE = 60.0  # seconds, for one program


@dataclass(frozen=True)
class Limits:
    """Bytes that a placement may fill.

    ``room``: of each device, in llama.cpp's order. ``ram``: of main memory. ``compute``: the compute buffer of a
    device that has any work, "CPU" included; ``output_compute``: how much larger it is where the output is;
    ``sent_output``: how much larger yet on the device that takes wide products from the CPU, where the output's matrix
    is there: when that device has the output, and when not.
    ``shared``: devices whose memory is part of main memory. ``pageable``: weights in main memory may exceed it
    and are then read from the drive again and again.
    """

    room: Mapping[str, int]
    ram: int
    compute: Mapping[str, int] = field(default_factory=dict)
    output_compute: Mapping[str, int] = field(default_factory=dict)
    sent_output: tuple[int, int] = (0, 0)
    shared: frozenset[str] = frozenset()
    pageable: bool = True


@dataclass(frozen=True)
class Solution:
    placement: Placement
    seconds: float  # for one request of the workload
    paged: int  # bytes of weights that main memory does not hold


@dataclass(frozen=True)
class _Group:
    """Layers that take the same time and bytes wherever they are."""

    layers: tuple[int, ...]
    pieces: tuple[tuple[Tensor, ...], ...]  # of the first of them: what moves together
    fixed: int  # bytes that stay with the layer
    kv: int


@dataclass(frozen=True)
class _Pattern:
    """Where the pieces of a layer are, what the layer costs so and how many bytes each device holds of it."""

    where: tuple[str, ...]
    seconds: float
    bytes: Mapping[str, int]


def solve(
    costs: Costs, limits: Limits, *, exact: bool = False, cutoff: float | None = None
) -> Solution | None:
    """The placement that finishes ``costs.workload`` soonest, or None where nothing fits, or nothing promises to
    take less than ``cutoff`` seconds.

    ``exact``: the optimum however long it takes. Without it the answer is within ``GAP`` of it on one device, and
    usually within a hundredth on several (``bound`` tells how far it may be). The same question always gets the
    same answer: the search is limited by counting, not by the clock.
    """
    several = len(limits.room) > 1
    worth = 0.0 if exact else _WORTH if several else GAP
    best: Solution | None = None
    for promised, program in _promises(costs, limits):
        if best is not None and promised >= best.seconds * (1 - worth):
            break
        if cutoff is not None and promised >= cutoff:
            break
        found = None
        if several and not exact:
            found = program.solve(GAP, near_relaxed=True)
        if found is None:
            found = program.solve(0.0 if exact else GAP)
        if found is not None and (best is None or found.seconds < best.seconds):
            best = found
    return best


def bound(costs: Costs, limits: Limits) -> float | None:
    """Seconds that no placement can beat, or None where nothing fits."""
    return next((promised for promised, _ in _promises(costs, limits)), None)


def pieces(movable: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """Movable tensors of a layer that go together: a matrix and its bias."""
    found: dict[Role, list[Tensor]] = {}
    for tensor in movable:
        found.setdefault(tensor.role, []).append(tensor)
    return tuple(tuple(piece) for piece in found.values())


def loose_bytes(model: ModelInfo) -> tuple[int, int]:
    """Bytes outside the layers that stay on the CPU, and that go with the output (without its matrix)."""
    loose = [t for t in model.tensors if t.layer is None or t.layer >= model.n_layers]
    with_output = [t for t in loose if t.role in (Role.OUTPUT, Role.NORM)]
    here = sum(t.nbytes for t in loose) - sum(t.nbytes for t in with_output)
    return here, sum(t.nbytes for t in with_output if t.name != "output.weight")


class _Parts:
    """What all programs of one question share: groups of layers and the patterns worth a column."""

    def __init__(self, costs: Costs, limits: Limits) -> None:
        self.costs = costs
        self.limits = limits
        self.model = costs.model
        self.workload = costs.workload
        self.devices = (CPU, *limits.room)
        self.groups = self._groups()
        self.matrix = costs.output_tensor()
        self.here, self.with_output = loose_bytes(self.model)
        self._patterns: dict[tuple[int, str], list[_Pattern]] = {}

    def _groups(self) -> tuple[_Group, ...]:
        costs, model = self.costs, self.model
        kv = formulas.kv_bytes(model, costs.settings)
        found: dict[tuple[object, ...], list[int]] = {}
        for i in range(model.n_layers):
            sizes = tuple(t.nbytes for t in costs.tensors(i))
            drafts = i >= model.n_layers - model.n_layers_nextn
            found.setdefault((costs.signature_id(i), sizes, kv[i], drafts), []).append(i)
        answer = []
        for members in found.values():
            first = members[0]
            moving = costs.movable(first)
            fixed = sum(t.nbytes for t in costs.tensors(first)) - sum(t.nbytes for t in moving)
            answer.append(_Group(tuple(members), pieces(moving), fixed, kv[first]))
        return tuple(answer)

    def patterns(self, g: int, device: str) -> list[_Pattern]:
        """For layers of group ``g`` on ``device``, one for each way to share out the bytes: the fastest."""
        if (g, device) in self._patterns:
            return self._patterns[g, device]
        group = self.groups[g]
        best: dict[tuple[tuple[str, int], ...], _Pattern] = {}
        first = group.layers[0]
        order = {t.name: i for i, t in enumerate(self.costs.movable(first))}
        kv_home = device if self.costs.kv_on_device else CPU
        for homes in itertools.product(self.devices, repeat=len(group.pieces)):
            nbytes = {device: group.fixed}
            nbytes[kv_home] = nbytes.get(kv_home, 0) + group.kv
            where = [""] * len(order)
            for piece, home in zip(group.pieces, homes, strict=True):
                for tensor in piece:
                    nbytes[home] = nbytes.get(home, 0) + tensor.nbytes
                    where[order[tensor.name]] = home
            key = tuple(sorted(nbytes.items()))
            seconds = self.costs.layer(first, device, where).seconds(self.workload)
            if key not in best or seconds < best[key].seconds:
                best[key] = _Pattern(homes, seconds, nbytes)
        self._patterns[g, device] = list(best.values())
        return self._patterns[g, device]


def _promises(costs: Costs, limits: Limits) -> list[tuple[float, _Program]]:
    """A program for each choice of devices that have layers and of devices that are in use, with the seconds that
    it cannot beat. The most promising first; without those that do not fit."""
    parts = _Parts(costs, limits)
    found = []
    for roles in itertools.product((0, 1, 2), repeat=len(limits.room)):
        chain = tuple(d for d, role in zip(limits.room, roles, strict=True) if role == 2)
        used = tuple(d for d, role in zip(limits.room, roles, strict=True) if role)
        program = _Program(parts, chain, used)
        seconds = program.relaxed()
        if seconds is not None:
            found.append((seconds, program))
    return sorted(found, key=lambda item: item[0])


class _Program:
    """Columns and rows of one program, and what they mean.

    ``chain``: devices that have layers, the output's device last. ``used``: those, and others that have matrices;
    their compute buffers and fixed time are counted.
    """

    def __init__(self, parts: _Parts, chain: tuple[str, ...], used: tuple[str, ...]) -> None:
        self.parts = parts
        self.blocks = (CPU, *chain)
        self.homes = (CPU, *used)
        costs, workload = parts.costs, parts.workload
        self._base = costs.fixed(used).seconds(workload)
        for a, b in itertools.pairwise(self.blocks):
            self._base += costs.boundary(a, b).seconds(workload)
        self._cost: list[float] = []
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._integer: list[bool] = []
        self._rows: list[tuple[float, float, dict[int, float]]] = []
        self._bytes: dict[str, dict[int, float]] = {d: {} for d in parts.devices}
        self._firm: dict[int, float] = {}  # bytes on the CPU that are not a part of the file
        self._add_blocks()
        self._add_patterns()
        self._add_output()
        self._add_memory(used)

    def _column(self, cost: float, low: float, high: float, *, integer: bool = True) -> int:
        self._cost.append(cost)
        self._lower.append(low)
        self._upper.append(high)
        self._integer.append(integer)
        return len(self._cost) - 1

    def _row(self, low: float, high: float, terms: Iterable[tuple[int, float]]) -> None:
        merged: dict[int, float] = {}
        for column, value in terms:
            merged[column] = merged.get(column, 0.0) + value
        self._rows.append((low, high, merged))

    def _add_blocks(self) -> None:
        """``at[i][d]`` ascends along the layers and descends along the devices. The last device of the chain has
        the output; every one of them has something."""
        total, n = self.parts.model.n_layers + 1, len(self.blocks) - 1
        self._at = [
            [self._column(0.0, 1.0 if i == total - 1 else 0.0, 1.0) for _ in range(n)] for i in range(total)
        ]
        for i in range(1, total):
            for d in range(n):
                self._row(0.0, 1.0, [(self._at[i][d], 1.0), (self._at[i - 1][d], -1.0)])
        for d in range(1, n):
            for i in range(total):
                self._row(0.0, 1.0, [(self._at[i][d - 1], 1.0), (self._at[i][d], -1.0)])
            # the block of the device before this one is not empty
            every = [t for i in range(total) for t in ((self._at[i][d - 1], 1.0), (self._at[i][d], -1.0))]
            self._row(1.0, _INFINITY, every)

    def _here(self, layer: int, block: int) -> list[tuple[int, float]]:
        """Terms that add up to 1 where the layer is in the block; for the CPU's, to 0."""
        at = self._at[layer]
        terms = [(at[block - 1], 1.0)] if block else []
        if block < len(at):
            terms.append((at[block], -1.0))
        return terms

    def _add_patterns(self) -> None:
        self._counts: list[tuple[int, str, _Pattern, int]] = []
        parts = self.parts
        for g, group in enumerate(parts.groups):
            size = float(len(group.layers))
            for block, device in enumerate(self.blocks):
                columns = []
                for pattern in parts.patterns(g, device):
                    if not set(pattern.where) <= set(self.homes):
                        continue
                    column = self._column(pattern.seconds, 0.0, size)
                    columns.append(column)
                    self._counts.append((g, device, pattern, column))
                    for home, nbytes in pattern.bytes.items():
                        self._bytes[home][column] = float(nbytes)
                    if device == CPU or not parts.costs.kv_on_device:
                        self._firm[column] = float(group.kv)
                # as many patterns as layers of the group are in the block
                terms = [(c, 1.0) for c in columns]
                terms += [(c, -v) for i in group.layers for c, v in self._here(i, block)]
                wanted = size if block == 0 else 0.0
                self._row(wanted, wanted, terms)

    def _add_output(self) -> None:
        """The output's matrix goes with the last block or, where it is no second copy of the embedding,
        anywhere."""
        parts, device = self.parts, self.blocks[-1]
        free = parts.matrix is not None and not parts.model.tied_output
        self._outputs: list[tuple[str, int]] = []
        for home in self.homes if free else (device,):
            seconds = parts.costs.output(device, home if free else None).seconds(parts.workload)
            column = self._column(seconds, 0.0, 1.0)
            self._outputs.append((home, column))
            held = self._bytes[home]
            # on the CPU a tied output is the embedding itself
            if parts.matrix is not None and (free or home != CPU):
                held[column] = held.get(column, 0.0) + parts.matrix.nbytes
            helper = parts.costs.helper
            if home == CPU and helper is not None:
                held = self._bytes[helper]
                held[column] = held.get(column, 0.0) + parts.limits.sent_output[device != helper]
        self._row(1.0, 1.0, [(column, 1.0) for _, column in self._outputs])

    def _add_memory(self, used: tuple[str, ...]) -> None:
        parts, limits = self.parts, self.parts.limits
        slack = ALIGNMENT * len(parts.model.tensors)
        constant = dict.fromkeys(parts.devices, 0.0)
        constant[CPU] += parts.here
        constant[self.blocks[-1]] += parts.with_output
        weights = constant[CPU]
        busy = {CPU, *used}
        if parts.costs.helper is not None:  # it has a compute buffer for what it does for the CPU
            busy.add(parts.costs.helper)
        for device in busy:
            constant[device] += limits.compute.get(device, 0)
        constant[self.blocks[-1]] += limits.output_compute.get(self.blocks[-1], 0)
        shared: list[tuple[int, float]] = []
        shared_constant = 0.0
        for device in parts.devices[1:]:
            terms = [(c, v / _MIB) for c, v in self._bytes[device].items()]
            room = limits.room[device] - slack if constant[device] or terms else 0
            self._row(-_INFINITY, (room - constant[device]) / _MIB, terms)
            if device in limits.shared:
                shared += terms
                shared_constant += constant[device]
        left = limits.ram - shared_constant - constant[CPU]
        self._left = left
        # what pages costs time in proportion
        per_mib = parts.costs.paging(_MIB).seconds(parts.workload)
        paged = self._column(per_mib, 0.0, _INFINITY if limits.pageable else 0.0, integer=False)
        cpu = [(c, v / _MIB) for c, v in self._bytes[CPU].items()]
        self._row(-_INFINITY, left / _MIB, [*cpu, *shared, (paged, -1.0)])
        self._ram = [(c, v * _MIB) for c, v in (*cpu, *shared)]
        firm = [(c, v / _MIB) for c, v in self._firm.items()]
        self._row(-_INFINITY, (left + weights) / _MIB, [*firm, *shared])

    def _solver(self) -> highspy.Highs:
        import highspy  # here, because plans where everything fits need no solver
        import numpy as np

        solver = highspy.Highs()  # type: ignore[no-untyped-call]
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        lp = highspy.HighsLp()
        lp.num_col_ = len(self._cost)
        lp.num_row_ = len(self._rows)
        lp.col_cost_ = np.array(self._cost) * self._unit()
        lp.col_lower_ = np.array(self._lower)
        lp.col_upper_ = np.array(self._upper)
        lp.row_lower_ = np.array([low for low, _, _ in self._rows])
        lp.row_upper_ = np.array([high for _, high, _ in self._rows])
        matrix = lp.a_matrix_
        matrix.format_ = highspy.MatrixFormat.kRowwise
        matrix.start_ = np.cumsum([0, *(len(terms) for _, _, terms in self._rows)]).astype(np.int32)
        matrix.index_ = np.array([c for _, _, terms in self._rows for c in terms], dtype=np.int32)
        matrix.value_ = np.array([v for _, _, terms in self._rows for v in terms.values()])
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        lp.integrality_ = [kinds[i] for i in self._integer]
        solver.passModel(lp)
        return solver

    def _unit(self) -> float:
        """Of the solver's objective, per second: the answer is some thousands, as its tolerances are absolute."""
        least: dict[int, float] = {}
        for g, _, pattern, _ in self._counts:
            least[g] = min(pattern.seconds, least.get(g, _INFINITY))
        typical = sum(seconds * len(self.parts.groups[g].layers) for g, seconds in least.items())
        return 1e3 / typical if typical > 0 else 1.0

    def relaxed(self) -> float | None:
        """Seconds when layers may be cut in any shares, or None where not even that fits."""
        import highspy

        solver = self._solver()
        solver.setOptionValue("solve_relaxation", True)
        solver.run()
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        return float(solver.getInfo().objective_function_value) / self._unit() + self._base

    def solve(self, gap: float, *, near_relaxed: bool = False) -> Solution | None:
        """The best placement with these devices, or None where none fits. ``near_relaxed``: only among blocks
        near those of the relaxed program, and with one round of heuristics (None where it finds nothing)."""
        import highspy

        solver = self._solver()
        if near_relaxed:
            self._narrow(solver)
            solver.setOptionValue("mip_max_nodes", 1)
            solver.setOptionValue("mip_allow_restart", False)  # twice the time for the same answer
        solver.setOptionValue("mip_heuristic_run_feasibility_jump", False)  # costs more than it finds
        solver.setOptionValue("mip_rel_gap", gap)
        solver.setOptionValue("mip_abs_gap", 0.0)
        solver.setOptionValue("time_limit", _PATIENCE)
        solver.run()
        if solver.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            status = solver.getModelStatus()
            expected = (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible)
            if near_relaxed or status in expected:
                return None
            told = solver.modelStatusToString(status)
            raise PlanError(f"the search for a placement ended without one: {told}")
        return self._read(list(solver.getSolution().col_value))

    def _narrow(self, solver: highspy.Highs) -> None:
        """Holds each block's begin near where it is in the relaxed program."""
        solver.setOptionValue("solve_relaxation", True)
        solver.run()
        values = solver.getSolution().col_value
        solver.setOptionValue("solve_relaxation", False)
        total = len(self._at)
        for d in range(len(self.blocks) - 1):
            begin = total - sum(values[row[d]] for row in self._at)
            for i, row in enumerate(self._at[:-1]):
                low, high = float(i >= begin + _WINDOW), float(i >= begin - _WINDOW)
                solver.changeColBounds(row[d], low, high)
        solver.clearSolver()

    def _read(self, values: Sequence[float]) -> Solution:
        """The placement that the columns' values mean."""
        parts, devices = self.parts, self.parts.devices
        model = parts.model
        blocks = [self.blocks[sum(round(values[c]) for c in row)] for row in self._at]
        moved: dict[str, list[str]] = {d: [] for d in devices}
        for g, group in enumerate(parts.groups):
            for device in self.blocks:
                members = [i for i in group.layers if blocks[i] == device]
                chosen = [
                    pattern.where
                    for of, on, pattern, column in self._counts
                    if of == g and on == device
                    for _ in range(round(values[column]))
                ]
                # the first layers give up most
                chosen.sort(key=lambda homes: (-sum(h != device for h in homes), homes))
                for layer, homes in zip(members, chosen, strict=True):
                    for piece, home in zip(pieces(parts.costs.movable(layer)), homes, strict=True):
                        if home != device:
                            moved[home] += [t.name for t in piece]
        for home, column in self._outputs:
            if home != self.blocks[-1] and round(values[column]) and parts.matrix is not None:
                moved[home].append(parts.matrix.name)
        offloaded = sum(d != CPU for d in blocks)
        names = devices[1:]
        place = Placement(
            names,
            -1 if offloaded == len(blocks) else offloaded,
            tuple(float(blocks.count(d)) for d in names) if offloaded and len(names) > 1 else (),
            compact({d: ns for d, ns in moved.items() if ns}, [t.name for t in model.tensors]),
            parts.costs.kv_on_device,
        )
        if placement.layer_devices(model, place, parts.limits.room) != tuple(blocks):
            raise PlanError(f"llama.cpp would not share out the layers as {place.tensor_split}")
        # from whole numbers again: the solver's own values are off by its tolerances
        counts = [round(value) for value in values]
        over = sum(counts[c] * nbytes for c, nbytes in self._ram) - self._left
        paged = max(0, round(over))
        seconds = self._base + parts.costs.paging(paged).seconds(parts.workload)
        for cost, count, integer in zip(self._cost, counts, self._integer, strict=True):
            seconds += cost * count if integer else 0.0
        return Solution(place, seconds, paged)
