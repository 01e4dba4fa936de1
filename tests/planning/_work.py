"""The planner's objective, counted anew: multiply-adds and 32 for every entry that is written."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tensormoe.planning import Program

BATCH, WEIGHT = "b", 32


def contraction_work(inputs: Sequence[frozenset[str]], legs: frozenset[str], sizes: dict) -> int:
    touched = legs.union(*inputs)
    return prod(sizes[leg] for leg in touched) + WEIGHT * prod(sizes[leg] for leg in legs)


def program_work(program: Program, batch: int) -> int:
    """What a program costs in the planner's objective."""
    sizes = {**program.sizes, BATCH: batch}
    total = 0
    for step in program.steps:
        if step.kind in ("linear", "matmul", "multiply"):
            inputs = [frozenset(legs) for legs in step.input_legs]
            total += contraction_work(inputs, frozenset(step.legs), sizes)
        elif step.kind == "add" and step.input_legs[0] == step.input_legs[1] == (BATCH, "o"):
            # a bias that ran through the network on its own, or the next term of a sum: the result
            # is read and written
            total += 2 * WEIGHT * prod(sizes[leg] for leg in step.legs)
    return total
