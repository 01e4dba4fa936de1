"""Whether a rank keeps to a budget: counted at once where it can be, and planned where it counts.

Planning takes milliseconds and a search looks at hundreds of ranks. But a program consists of legs,
not of sizes: one that was found for some rank gives the cost of its path as a polynomial in the
rank. So a few paths are found, other ranks are taken to run by the path that the planner would
prefer among them, and the rank that is chosen is planned in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from tensormoe._spec import LayerSpec
from tensormoe.factorizations import BATCH, OUTPUT, Leg
from tensormoe.gates import Gate
from tensormoe.planning._cost import Cost, StepCost, live_memory, program_cost
from tensormoe.planning._draft import Draft, Routing
from tensormoe.planning._layer_cost import gate_cost
from tensormoe.planning._path import WRITE_WEIGHT, tree_cost
from tensormoe.planning._program import Program
from tensormoe.planning._regimes import Trees, best_candidate, build_program
from tensormoe.planning._roofline import Roofline
from tensormoe.selection._budget import Budget
from tensormoe.selection._family import INNER, Choice, Family, largest
from tensormoe.selection._polynomial import Polynomial, evaluate, undominated

__all__ = ["Around", "Estimator", "Slice"]

Total = tuple[tuple[Polynomial, ...], ...]
"""A cost: a sum over maxima of polynomials."""


@dataclass(frozen=True)
class _Model:
    """What one program costs at any rank: for the planner, and of every limit."""

    priority: Polynomial
    totals: tuple[tuple[Total, float], ...]

    def fits(self, outer: int, inner: int) -> bool:
        """Whether it keeps to every limit."""
        for total, limit in self.totals:
            value: float = 0
            for group in total:
                value += max([each(outer, inner) for each in group])
            if value > limit:
                return False
        return True


_NOTHING = Cost(0, (), 0)


@dataclass(frozen=True)
class Around:
    """Costs that a budget covers besides the layer whose rank is chosen.

    Args:
        gate: the layer's own, which makes its coefficients.
        cost: of the rest of a block, for the estimate.
        held: bytes of a block that are live all the while the layer runs, for the estimate.
        block: the cost of the block with a layer in it, which is what counts in the end.
    """

    gate: Gate | None = None
    cost: Cost = _NOTHING
    held: int = 0
    block: Callable[[LayerSpec], Cost] | None = None


@dataclass
class Estimator:
    """Tells which ranks of a family keep to a budget.

    Args:
        family: the layers.
        budget: what they may cost.
        around: what else counts against it.
        indexed_input: whether inputs are integer ids.
        known: ranks that were planned in full, and whether they keep to the budget.
    """

    family: Family
    budget: Budget
    around: Around
    indexed_input: bool = False
    known: dict[Choice, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = self.family.sizes
        nothing = Program((), (), (), ())
        around, batch, itemsize = self.around, self.budget.batch, self.budget.itemsize
        gate = gate_cost(around.gate, given.in_features, given.experts, batch, itemsize)
        self._besides = around.cost.then(gate)
        self.planned = set(self.budget.limits) != {"parameters"}
        self._explored: set[Choice] = set()
        self.models: dict[object, _Model | None] = {}
        if not self.planned:
            self.models[None] = self._model(nothing, Polynomial.constant(0))
        self.explore((1, 1))

    def cost(self, sizes: Choice) -> Cost:
        """The cost of the layer with this rank, and of what is around it."""
        return self.cost_of(self.family.spec(sizes))

    def cost_of(self, spec: LayerSpec) -> Cost:
        """The cost of a layer of the family's sizes, and of what is around it."""
        budget, around = self.budget, self.around
        if around.block is not None:
            return around.block(spec)
        if not self.planned:
            return Cost(spec.num_parameters + self._besides.parameters, (), 0)
        plan = spec.plan(budget.batch, indexed_input=self.indexed_input)
        return plan.cost(around.gate, itemsize=budget.itemsize)

    def verify(self, sizes: Choice) -> bool:
        """Whether a rank keeps to the budget, by its own plan."""
        if sizes not in self.known:
            self.known[sizes] = self.budget.allows(self.cost(sizes))
        return self.known[sizes]

    def explore(self, sizes: Choice) -> bool:
        """Learn the path that is best for a rank; says whether it is a new one."""
        if not self.planned or sizes in self._explored:
            return False
        self._explored.add(sizes)
        draft = Draft(self.family.spec(sizes).network, Routing(None, self.indexed_input))
        path = best_candidate([draft], self.budget.batch)
        # the same trees at other sizes are the same path
        if path.trees in self.models:
            return False
        legs = {**self.family.legs, BATCH: Polynomial.constant(self.budget.batch)}
        model = self._model(build_program(path), _priority(path.trees, legs))
        for other, earlier in self.models.items():
            # a path that another is preferred to at every rank is out
            if earlier is not None and model.priority.below(earlier.priority):
                self.models[other] = None
        self.models[path.trees] = model
        return True

    def fits_any(self, outer: int, inner: int) -> bool:
        """Whether some path that was seen keeps to every limit."""
        return any(model.fits(outer, inner) for model in self.models.values() if model)

    def slice(self, outer: int) -> Slice:
        """The ranks with this outer size."""
        return Slice(self, outer)

    def ceiling(self) -> int:
        """An inner size that is out of reach at the smallest outer size, or large enough."""
        if set(self.budget.limits) == {"memory"}:
            # weights contracted beforehand may leave no trace of a bond in memory
            return self.family.saturation(INNER)
        size = 1
        while self.fits_any(1, size):
            size *= 2
        return size

    def _model(self, program: Program, priority: Polynomial) -> _Model:
        budget, besides = self.budget, self._besides
        sizes = {**dict(program.size_items), **self.family.legs, BATCH: budget.batch}
        symbolic = cast(Mapping[Leg, int], sizes)
        steps = program_cost(program, symbolic, budget.itemsize) if self.planned else ()
        totals: dict[str, Total] = {
            "parameters": ((self.family.parameters + besides.parameters,),),
            "flops": ((_sum(besides.flops, *map(_flops, steps)),),),
            "memory": (self._moments(program, symbolic),),
        }
        if isinstance(budget.roofline, Roofline):
            totals["time"] = _time(steps, budget.roofline, budget.roofline.time(besides))
        limits = budget.limits
        # sums of seconds round in another order here: what is chosen is checked against the limit
        slack = {"time": 1 + 1e-9}
        return _Model(
            priority, tuple((totals[name], limits[name] * slack.get(name, 1)) for name in limits)
        )

    def _moments(self, program: Program, sizes: Mapping[Leg, int]) -> tuple[Polynomial, ...]:
        """Bytes live after every step; the peak is their maximum."""
        owned = [
            slot
            for slot, operand in enumerate(program.operands)
            if self.around.gate is not None
            and operand.name.startswith(("coefficients_", "indices_"))
        ]
        moments = [Polynomial.constant(self._besides.peak_memory)]
        live = live_memory(program, sizes, self.budget.itemsize, owned=owned)
        return undominated([*moments, *(_sum(each, self.around.held) for each in live)])


class Slice:
    """The ranks with one outer size, each by the program that is best for it."""

    def __init__(self, estimator: Estimator, outer: int) -> None:
        self._outer = outer
        self._known = estimator.known
        models = _contenders(outer, estimator.models.values())
        self._priorities = [priority for priority, _ in models]
        self._totals = [
            [
                ([[each.at(outer) for each in group] for group in total], limit)
                for total, limit in model.totals
            ]
            for _, model in models
        ]

    def fits(self, model: int, inner: int) -> bool:
        """Whether one program keeps to every limit at an inner size."""
        for total, limit in self._totals[model]:
            value: float = 0
            for group in total:
                value += max([evaluate(each, inner) for each in group])
            if value > limit:
                return False
        return True

    def chosen(self, inner: int) -> int:
        """The program that the planner would take: of equally good ones the last that was seen."""
        if len(self._priorities) == 1:
            return 0
        values = [evaluate(each, inner) for each in self._priorities]
        best = min(values)
        return max(k for k, value in enumerate(values) if value == best)

    def widest(self, high: int) -> list[int]:
        """For every program the largest inner size, up to ``high``, at which it fits; or 0."""
        return [largest(partial(self.fits, model), 0, high) for model in range(len(self._totals))]

    def largest(self, widest: list[int]) -> int:
        """The largest inner size at which the program chosen for it fits; 0 if there is none.

        A larger size can have a cheaper path in one measure, so that sizes that fit may lie
        beyond others that do not: the search goes down from the top, path by path.
        """
        inner = max(widest)
        while inner > 0:
            model = self.chosen(inner)
            if inner <= widest[model]:
                if self._known.get((self._outer, inner), True):
                    return inner
                inner -= 1
                continue
            low = widest[model]
            if low > 0 and self.chosen(low) == model:
                inner = low
            elif low == 0 and self.chosen(1) == model:
                return 0
            else:
                inner = largest(lambda size: self.chosen(size) != model, max(low, 1), inner)  # noqa: B023
        return 0


def _contenders(
    outer: int, models: Iterable[_Model | None]
) -> list[tuple[tuple[float, ...], _Model]]:
    """The models that the planner prefers to all others at some inner size."""
    kept: list[tuple[tuple[float, ...], _Model]] = []
    for model in models:
        if model is None:
            continue
        priority = model.priority.at(outer)
        # a later one takes the place of an equal one
        kept = [pair for pair in kept if not _below(priority, pair[0])]
        if not any(_below(other, priority) for other, _ in kept):
            kept.append((priority, model))
    return kept


def _below(left: tuple[float, ...], right: tuple[float, ...]) -> bool:
    """Whether no coefficient, the highest power first, is larger than the other's."""
    short = len(left) - len(right)
    if short > 0 and any(left[:short]):
        return False
    return all(a <= b for a, b in zip(left[::-1], right[::-1], strict=False))


def _sum(*values: Any) -> Polynomial:
    return sum(values, Polynomial.constant(0))


def _flops(step: StepCost) -> Any:
    return step.matmul_flops + step.elementwise_flops


def _time(steps: tuple[StepCost, ...], roofline: Roofline, besides: float) -> Total:
    """A roofline's time: for every step the larger of arithmetic and memory, and what it adds."""
    always = Polynomial.constant(besides + roofline.overhead * len(steps))
    groups = []
    for step in steps:
        arithmetic = step.matmul_flops * (1 / roofline.matmul_rate)
        arithmetic += step.elementwise_flops * (1 / roofline.elementwise_rate)
        memory = (step.bytes_read + step.bytes_written) * (1 / roofline.bandwidth)
        if roofline.fresh_bandwidth is not None:
            always += step.bytes_written * (1 / roofline.fresh_bandwidth)
        needed = undominated((_sum(arithmetic), _sum(memory)))
        if len(needed) == 1:
            always += needed[0]
        else:
            groups.append(needed)
    return ((always,), *groups)


def _priority(terms: tuple[Trees, ...], legs: Mapping[Leg, Polynomial]) -> Polynomial:
    """What the planner minimizes, for one batch size."""
    sizes = cast(Mapping[Leg, int], legs)
    total = Polynomial.constant(0)
    written = 2 * WRITE_WEIGHT * legs[BATCH] * legs[OUTPUT]
    for trees in terms:
        for tree in (trees.main, trees.bias):
            if tree is not None:
                const, slope = tree_cost(tree, sizes, WRITE_WEIGHT)
                total = total + const + slope * legs[BATCH]
        if trees.bias is not None:
            # a bias that went through the network on its own is added to the result
            total = total + written
    return total + (len(terms) - 1) * written
