"""A program: the frozen list of two-operand steps that a plan was lowered to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from tensormoe.factorizations import BATCH, Leg

Kind = Literal[
    "linear",
    "matmul",
    "grouped",
    "outer",
    "multiply",
    "add",
    "gather",
    "scatter",
    "reduce",
    "expand",
    "permute",
    "eye",
]
"""Kind of a step.

``linear`` is one matrix product of an operand over the batch with one that is not; ``matmul`` any
other, batched or between weights; ``grouped`` is one product per expert, of rows sorted by expert
with the experts' matrices, and ``outer`` the sum over each expert's rows of their outer products;
``multiply`` and ``add`` are elementwise with broadcasting;
``gather`` picks rows by index and ``scatter`` is its transpose; ``reduce`` sums legs away and
``expand`` is its transpose; ``permute`` is a copy into another leg order; ``eye`` is an identity
matrix in the dtype and on the device of its operand, of which it takes nothing else.
"""

Role = Literal["factor", "data", "indices"]
"""Role of an operand: a weight, a dense array over the batch, or integer indices."""


@dataclass(frozen=True, slots=True)
class Operand:
    """An array that a program takes."""

    name: str
    legs: tuple[Leg, ...]
    role: Role


@dataclass(frozen=True, slots=True)
class View:
    """View of an operand: a reshape, then an axis order; None where nothing changes."""

    shape: tuple[int, ...] | None = None
    axes: tuple[int, ...] | None = None


IDENTITY = View()

PRODUCTS = frozenset({"linear", "matmul"})
"""Kinds of steps that are matrix products."""

ELEMENTWISE = frozenset({"multiply", "add"})
"""Kinds of steps that combine operands entry by entry."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on one or two slots, its leg orders fixed.

    Args:
        kind: the operation.
        inputs: slots of its operands.
        output: slot of its result.
        input_legs: legs of each operand, in storage order.
        legs: legs of the result, in storage order.
        views: of each operand, before the operation.
        shape: reshape of the result, if any; -1 stands for the batch.
        axis: first axis of the legs that gather or scatter works on.
        free: slots that no later step needs.
        in_place: whether the result of an ``add`` takes the place of its first operand, which is
            an array of the program's own that nobody needs any more.
    """

    kind: Kind
    inputs: tuple[int, ...]
    output: int
    input_legs: tuple[tuple[Leg, ...], ...]
    legs: tuple[Leg, ...]
    views: tuple[View, ...] = (IDENTITY, IDENTITY)
    shape: tuple[int, ...] | None = None
    axis: int = 0
    free: tuple[int, ...] = ()
    in_place: bool = False

    @property
    def batched(self) -> bool:
        """Whether the work grows with the batch."""
        return any(BATCH in legs for legs in (self.legs, *self.input_legs))

    def __str__(self) -> str:
        operands = " × ".join("(" + " ".join(legs) + ")" for legs in self.input_legs)
        return f"{operands} → ({' '.join(self.legs)})"


@dataclass(frozen=True)
class Program:
    """Steps in single-assignment form, valid for every batch size of a regime.

    Slot k is operand k for the first operands and the result of a step after that.

    Args:
        operands: the arrays it takes, in slot order.
        steps: what it does, in order.
        outputs: slots of its results.
        size_items: pairs (leg, size), one for every leg but the batch.

    Attributes:
        sizes: the size of every leg but the batch.
    """

    operands: tuple[Operand, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    size_items: tuple[tuple[Leg, int], ...] = field(repr=False)
    sizes: Mapping[Leg, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # now, not on first use: a cached property locks, and compilers trace no lock
        object.__setattr__(self, "sizes", dict(self.size_items))

    @cached_property
    def legs(self) -> Mapping[int, tuple[Leg, ...]]:
        """The legs of every slot, in storage order."""
        listed = {slot: operand.legs for slot, operand in enumerate(self.operands)}
        return listed | {step.output: step.legs for step in self.steps}

    def with_liveness(self, owned: Collection[int] = ()) -> Program:
        """The same program with every slot freed, or taken over, after its last use.

        Args:
            owned: operands that the caller has made for the program, and does not need after it.
        """
        last = {slot: index for index, step in enumerate(self.steps) for slot in step.inputs}
        kept = set(self.outputs)
        ends: dict[int, list[int]] = {}
        for slot, index in last.items():
            if slot not in kept:
                ends.setdefault(index, []).append(slot)
        # what ``expand`` gives is a view
        own = {step.output for step in self.steps if step.kind != "expand"}.union(owned)
        steps = []
        for index, step in enumerate(self.steps):
            free = tuple(sorted(ends.get(index, ())))
            taken = step.kind == "add" and step.inputs[0] in own.intersection(free)
            steps.append(replace(step, free=free, in_place=taken))
        return replace(self, steps=tuple(steps))

    def split(self) -> tuple[Program, Program]:
        """The weight-only steps, and the rest as a program that takes their results.

        The first program's outputs are, in order, the operands that the second takes beyond the
        data; factors that the rest uses as they are pass through.
        """
        weights = {k for k, operand in enumerate(self.operands) if operand.role == "factor"}
        hoisted, rest = [], []
        for step in self.steps:
            if all(slot in weights for slot in step.inputs):
                weights.add(step.output)
                hoisted.append(step)
            else:
                rest.append(step)
        needed = {slot for step in rest for slot in step.inputs} | set(self.outputs)
        cached = sorted(slot for slot in weights if slot in needed)
        data = [k for k, operand in enumerate(self.operands) if operand.role != "factor"]
        sources = [k for k, operand in enumerate(self.operands) if operand.role == "factor"]
        names = {k: operand.name for k, operand in enumerate(self.operands)}
        operands = [self.operands[k] for k in data]
        operands += [
            Operand(names.get(slot, f"prepared_{slot}"), self.legs[slot], "factor")
            for slot in cached
        ]
        first = Program(
            tuple(self.operands[k] for k in sources), tuple(hoisted), tuple(cached), self.size_items
        )
        second = Program(tuple(operands), tuple(rest), self.outputs, self.size_items)
        return renumbered(first, sources), renumbered(second, [*data, *cached])


def renumbered(program: Program, inputs: Sequence[int]) -> Program:
    """``program`` with ``inputs`` as its first slots and its steps' results after them."""
    order = [*inputs, *(step.output for step in program.steps)]
    index = {slot: k for k, slot in enumerate(order)}
    steps = tuple(
        replace(
            step,
            inputs=tuple(index[slot] for slot in step.inputs),
            output=index[step.output],
            free=(),
            in_place=False,
        )
        for step in program.steps
    )
    outputs = tuple(index[slot] for slot in program.outputs)
    return replace(program, steps=steps, outputs=outputs).with_liveness()
