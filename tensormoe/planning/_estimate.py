"""Whether a rank keeps to a budget: counted at once where it can be, and planned where it counts.

Planning takes milliseconds and a search looks at hundreds of ranks. But a program consists of legs,
not of sizes: one that was planned for some rank gives the cost of its path as a polynomial in the
rank. So a few programs are planned, other ranks are taken to run by the program with the
lowest planning cost among them, and the ranks that matter are planned after all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

from tensormoe.factorizations import BATCH, Leg
from tensormoe.gates import Gate
from tensormoe.planning._budget import Budget
from tensormoe.planning._cost import Cost, StepCost, program_cost
from tensormoe.planning._family import INNER, Choice, Family, largest
from tensormoe.planning._layer_cost import layer_cost
from tensormoe.planning._polynomial import Polynomial, evaluate, undominated
from tensormoe.planning._program import Program
from tensormoe.planning._regimes import WRITE_WEIGHT
from tensormoe.planning._roofline import Roofline

__all__ = ["Estimator", "Slice"]

Total = tuple[tuple[Polynomial, ...], ...]
"""A cost: a sum over maxima of polynomials."""


@dataclass(frozen=True)
class _Model:
    """What one program costs at any rank: for the planner, and of every limit."""

    priority: Polynomial
    totals: tuple[tuple[Total, float], ...]


@dataclass
class Estimator:
    """Tells which ranks of a family keep to a budget.

    Args:
        family: the layers.
        budget: what they may cost.
        gate: counted along if given.
    """

    family: Family
    budget: Budget
    gate: Gate | None
    known: dict[Choice, bool] = field(default_factory=dict)
    models: dict[object, _Model] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = self.family.sizes
        nothing = Program((), (), (), ())
        self._gate = layer_cost(
            nothing,
            0,
            given.in_features,
            given.experts,
            self.budget.batch,
            gate=self.gate,
            itemsize=self.budget.itemsize,
        )
        self.planned = set(self.budget.limits) != {"parameters"}
        if not self.planned:
            self.models[None] = self._model(nothing)

    def cost(self, sizes: Choice) -> Cost:
        """What the planner gives for a rank."""
        spec = self.family.spec(sizes)
        if not self.planned:
            return Cost(spec.num_parameters + self._gate.parameters, (), 0)
        return spec.cost(self.budget.batch, gate=self.gate, itemsize=self.budget.itemsize)

    def verify(self, sizes: Choice) -> bool:
        """Plan a rank, learn its program, and say whether that was news."""
        if sizes in self.known:
            return False
        self.known[sizes] = self.budget.allows(self.cost(sizes))
        if not self.planned:
            return False
        program = self.family.spec(sizes).plan(self.budget.batch).program
        key = tuple((step.kind, step.inputs, step.legs) for step in program.steps)
        if key in self.models:
            return False
        self.models[key] = self._model(program)
        return True

    def slice(self, outer: int) -> Slice:
        """The ranks with this outer size."""
        return Slice(self, outer)

    def ceiling(self) -> int:
        """An inner size that is out of reach at the smallest outer size, or large enough."""
        first = self.slice(1)
        if set(self.budget.limits) == {"memory"}:
            # weights contracted beforehand may leave no trace of a bond in memory
            return self.family.saturation(INNER)
        size = 1
        while any(first.fits(model, size) for model in range(len(self.models))):
            size *= 2
        return size

    def _model(self, program: Program) -> _Model:
        budget, gate = self.budget, self._gate
        sizes = {**dict(program.size_items), **self.family.legs, BATCH: budget.batch}
        symbolic = cast(Mapping[Leg, int], sizes)
        steps = program_cost(program, symbolic, budget.itemsize) if self.planned else ()
        totals: dict[str, Total] = {
            "parameters": ((self.family.parameters + gate.parameters,),),
            "flops": ((_sum(gate.flops, *map(_flops, steps)),),),
            "memory": (self._moments(program, symbolic),),
        }
        if isinstance(budget.roofline, Roofline):
            totals["time"] = _time(steps, budget.roofline, budget.roofline.time(gate))
        limits = budget.limits
        return _Model(
            _priority(program, symbolic), tuple((totals[name], limits[name]) for name in limits)
        )

    def _moments(self, program: Program, sizes: Mapping[Leg, int]) -> tuple[Polynomial, ...]:
        """Bytes live after every step; the peak is their maximum."""
        owned = [
            slot
            for slot, operand in enumerate(program.operands)
            if self.gate is not None and operand.name.startswith(("coefficients_", "indices_"))
        ]
        moments = [Polynomial.constant(self._gate.peak_memory)]
        moments += _live(program, sizes, self.budget.itemsize, owned)
        return undominated(moments)


class Slice:
    """The ranks with one outer size, each by the program that is best for it."""

    def __init__(self, estimator: Estimator, outer: int) -> None:
        self._outer = outer
        self._known = estimator.known
        models = tuple(estimator.models.values())
        self._priorities = [model.priority.at(outer) for model in models]
        self._totals = [
            [
                ([[each.at(outer) for each in group] for group in total], limit)
                for total, limit in model.totals
            ]
            for model in models
        ]

    def fits(self, model: int, inner: int) -> bool:
        """Whether one program keeps to every limit at an inner size."""
        for total, limit in self._totals[model]:
            value: float = 0
            for group in total:
                value += max(evaluate(each, inner) for each in group)
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
        return [
            largest(lambda inner, model=model: self.fits(model, inner), 0, high)
            for model in range(len(self._totals))
        ]

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


def _live(
    program: Program, sizes: Mapping[Leg, int], itemsize: int, owned: list[int]
) -> Iterator[Any]:
    """Bytes live while each step runs."""
    legs = program.legs
    live = {slot: itemsize * prod(sizes[leg] for leg in legs[slot]) for slot in owned}
    now: Any = sum(live.values(), Polynomial.constant(0))
    for step in program.steps:
        source = step.inputs[0]
        if step.kind == "add" and source >= len(program.operands) and source in step.free:
            live[step.output] = live.pop(source)
        else:
            live[step.output] = itemsize * prod(sizes[leg] for leg in step.legs)
            now = now + live[step.output]
        yield now
        for slot in step.free:
            now = now - live.pop(slot, 0)


def _sum(*values: Any) -> Polynomial:
    return sum(values, Polynomial.constant(0))


def _flops(step: StepCost) -> Any:
    return step.matmul_flops + step.elementwise_flops


def _time(steps: tuple[StepCost, ...], roofline: Roofline, gate: float) -> Total:
    """A roofline's time: for every step the larger of arithmetic and memory, and overhead."""
    always = Polynomial.constant(gate + roofline.overhead * len(steps))
    groups = []
    for step in steps:
        arithmetic = step.matmul_flops * (1 / roofline.matmul_rate)
        arithmetic += step.elementwise_flops * (1 / roofline.elementwise_rate)
        memory = (step.bytes_read + step.bytes_written) * (1 / roofline.bandwidth)
        needed = undominated((_sum(arithmetic), _sum(memory)))
        if len(needed) == 1:
            always += needed[0]
        else:
            groups.append(needed)
    return ((always,), *groups)


def _priority(program: Program, sizes: Mapping[Leg, int]) -> Polynomial:
    """What the planner minimizes: multiply-adds and weighted writes of the contractions."""
    total = Polynomial.constant(0)
    for step in program.steps:
        written = prod(sizes[leg] for leg in step.legs)
        if step.kind in ("linear", "matmul", "multiply"):
            touched = set(step.legs).union(*map(set, step.input_legs))
            total = total + prod(sizes[leg] for leg in touched) + WRITE_WEIGHT * written
        elif step.kind == "add" and all(BATCH in legs for legs in step.input_legs):
            # a bias that went through the network on its own
            total = total + 2 * WRITE_WEIGHT * written
    return total
