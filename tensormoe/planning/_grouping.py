"""Products grouped by expert, for rows that are sorted by expert.

A row that has one expert meets that expert's matrix. A gather copies the matrix for every row;
where rows are sorted by expert, one product per expert reads it once, for all of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from tensormoe.factorizations import BATCH, Leg
from tensormoe.planning._program import IDENTITY, Program, Step, View, renumbered
from tensormoe.planning._tree import Builder

COUNTS = "counts"
"""Name of the operand that says how many rows each expert has."""

LEAST_ENTRIES = 1024
"""Smaller matrices are gathered: starting a product takes longer than copying them."""

START = 4096
"""Time to start one product, in entries that are written in the meantime."""


@dataclass(frozen=True)
class Layout:
    """View of its operands that a grouped product has.

    Args:
        views: of rows, matrices and counts.
        shape: reshape of the result, if any.
        summed: legs that the product sums over.
        kept: legs of the result besides the batch.
        behind: whether the matrices have the kept legs behind the summed ones.
        stacked: legs of the matrices with the expert first.
    """

    views: tuple[View, View, View]
    shape: tuple[int, ...] | None
    summed: tuple[Leg, ...]
    kept: tuple[Leg, ...]
    behind: bool
    stacked: tuple[Leg, ...]

    @classmethod
    def of(
        cls,
        rows: tuple[Leg, ...],
        matrices: tuple[Leg, ...],
        result: tuple[Leg, ...],
        expert: Leg,
        sizes: Mapping[Leg, int],
    ) -> Layout | None:
        """The layout for operands in these leg orders, if one product can do without copies.

        Args:
            rows: the batch, then legs that are summed.
            matrices: the expert leg and the others; an expert's matrix is a view where the leg
                comes first, or between the legs that are summed and those that are kept.
            result: the batch, then legs that are kept.
            expert: the expert leg.
            sizes: of the legs.
        """
        summed, kept = rows[1:], result[1:]
        if rows[:1] != (BATCH,) or result[:1] != (BATCH,) or not summed or not kept:
            return None
        place = matrices.index(expert)
        others = matrices[:place] + matrices[place + 1 :]
        behind = others == summed + kept
        if not behind and others != kept + summed:
            return None
        first, second = (summed, kept) if behind else (kept, summed)
        if place not in (0, len(first)):
            return None
        groups = ((expert,), first, second) if place == 0 else (first, (expert,), second)
        ordered = ((expert,), summed, kept)
        axes = tuple(groups.index(group) for group in ordered)
        shape = tuple(prod(sizes[leg] for leg in group) for group in groups)
        inner = prod(sizes[leg] for leg in summed)
        views = (
            View((-1, inner)) if len(summed) > 1 else IDENTITY,
            View(shape if len(matrices) > 3 else None, None if axes == (0, 1, 2) else axes),
            IDENTITY,
        )
        split = (-1, *(sizes[leg] for leg in kept)) if len(kept) > 1 else None
        return cls(views, split, summed, kept, behind, (expert, *first, *second))


def grouped(program: Program) -> Program:
    """The same program with grouped products in the place of gathers that copy matrices."""
    names = {operand.name: slot for slot, operand in enumerate(program.operands)}
    counts = names[COUNTS]
    uses: dict[int, int] = {}
    for step in program.steps:
        for slot in step.inputs:
            uses[slot] = uses.get(slot, 0) + 1
    gathers = {
        step.output: step
        for step in program.steps
        if step.kind == "gather" and len(step.inputs) == 2
    }
    steps: list[Step] = []
    dropped: set[int] = set()
    for step in program.steps:
        found = step
        for place, slot in enumerate(step.inputs):
            gather = gathers.get(slot)
            if step.kind == "matmul" and gather is not None and uses[slot] == 1:
                made = _fused(step, 1 - place, gather, counts, program.sizes)
                if made is not None:
                    found = made
                    dropped.add(slot)
        steps.append(found)
    left = tuple(step for step in steps if step.output not in dropped)
    return renumbered(replace(program, steps=left), range(len(program.operands)))


def _fused(
    step: Step, place: int, gather: Step, counts: int, sizes: Mapping[Leg, int]
) -> Step | None:
    rows, matrices = step.input_legs[place], gather.input_legs[0]
    expert = matrices[gather.axis]
    if prod(sizes[leg] for leg in matrices if leg != expert) < LEAST_ENTRIES:
        return None
    layout = Layout.of(rows, matrices, step.legs, expert, sizes)
    if layout is None:
        return None
    return Step(
        "grouped",
        (step.inputs[place], gather.inputs[0], counts),
        step.output,
        (rows, matrices, (expert,)),
        step.legs,
        layout.views,
        layout.shape,
    )


def saving(
    program: Program, sizes: Mapping[Leg, int], weight: int, *, whole: bool
) -> tuple[int, int]:
    """Change of a plan's cost by its grouped products: constant and slope over the batch.

    A gather counts twice the entries that it copies, since they are read and written. A product
    reads them at most once per row, and at most once per expert, and takes time to start for every
    expert. The smaller of the two is no straight line: each of them is a bound on the cost.

    Args:
        program: with grouped products.
        sizes: of its legs.
        weight: of an entry that is read.
        whole: whether to count all matrices once, instead of one for every row.
    """
    const = slope = 0
    for step in program.steps:
        if step.kind == "grouped":
            (expert,) = step.input_legs[2]
            matrix = prod(sizes[leg] for leg in step.input_legs[1] if leg != expert)
            const += weight * sizes[expert] * (START + (matrix if whole else 0))
            slope -= weight * matrix * (2 if whole else 1)
    return const, slope


def transposed(
    builder: Builder, step: Step, position: int, cotangent: int, slots: Mapping[int, int]
) -> int:
    """The gradient that rows or matrices of a grouped product get from that of its result."""
    rows, matrices, (expert,) = step.input_legs
    counts = slots[step.inputs[2]]
    legs = builder.legs[cotangent]
    if position == 0:
        layout = Layout.of(legs, matrices, rows, expert, builder.sizes)
        assert layout is not None
        inputs = cotangent, slots[step.inputs[1]], counts
        return builder.add("grouped", inputs, rows, layout.views, layout.shape)
    layout = Layout.of(rows, matrices, legs, expert, builder.sizes)
    assert layout is not None
    inner, outer = (
        View((-1, prod(builder.sizes[leg] for leg in each))) if len(each) > 1 else IDENTITY
        for each in (layout.summed, layout.kept)
    )
    left, right = slots[step.inputs[0]], cotangent
    views = (inner, outer, IDENTITY)
    if not layout.behind:
        left, right, views = right, left, (outer, inner, IDENTITY)
    shape = tuple(builder.sizes[leg] for leg in layout.stacked)
    split = shape if len(matrices) > 3 else None
    made = builder.add("outer", (left, right, counts), layout.stacked, views, split)
    return builder.permute(made, matrices)
