"""Programs of layers whose rows are tokens that were sent to experts, in stages.

A token that goes to k experts is k rows. What a program does with the input alone gives all of them
the same, and is done once per token; and what it does linearly, with weights of all experts, can be
done once per token behind the sum of its rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from tensormoe.factorizations import BATCH
from tensormoe.planning._program import Operand, Program, Step, renumbered


@dataclass(frozen=True)
class Stages:
    """A program in two parts, the first of which gives operands of the second.

    Args:
        first: its outputs are arrays over its batch.
        second: takes them by the names ``carried``.
        carried: names of operands of the second program, in the order of the first one's outputs.
        axes: the axis of the batch of each.
    """

    first: Program
    second: Program
    carried: tuple[str, ...]
    axes: tuple[int, ...]


def entered(program: Program) -> Stages:
    """A layer's program, cut where rows of a token part: the first part's batch is tokens."""
    data = _of_input(program)
    used = {slot for step in program.steps if step.output not in data for slot in step.inputs}
    used.update(program.outputs)
    return _stages(program, [slot for slot in sorted(data) if slot in used])


def left(program: Program) -> Stages:
    """A layer's program, cut where rows of a token may be summed: the second's batch is tokens."""
    steps = {step.output: step for step in program.steps}
    found, _ = _summed(program, program.outputs[0], steps)
    return _stages(program, sorted(found))


def _of_input(program: Program) -> set[int]:
    """Slots that follow from the input and weights alone, the input among them."""
    roles = dict(enumerate(program.operands))
    weights = {slot for slot, each in roles.items() if each.role == "factor"}
    data = {slot for slot, each in roles.items() if each.name == "x"}
    for step in program.steps:
        inputs = {*step.inputs}
        if inputs <= weights:
            weights.add(step.output)
        elif inputs <= weights | data:
            data.add(step.output)
    return data


def _summed(program: Program, slot: int, steps: Mapping[int, Step]) -> tuple[set[int], bool]:
    """Slots of rows that a slot is a linear function of, and whether products lie between."""
    step = steps.get(slot)
    if step is None:
        return {slot}, False
    rows = [each for each in step.inputs if BATCH in program.legs[each]]
    if step.kind == "add" and len(rows) == 2:
        found = [_summed(program, each, steps) for each in rows]
        if any(product for _, product in found):
            return found[0][0] | found[1][0], True
    if step.kind in ("linear", "matmul", "permute", "reduce") and len(rows) == 1:
        inner, product = _summed(program, rows[0], steps)
        if product or step.kind in ("linear", "matmul"):
            return inner, True
    return {slot}, False


def _stages(program: Program, slots: list[int]) -> Stages:
    names = {slot: each.name for slot, each in enumerate(program.operands)}
    carried = tuple(names.get(slot, f"carried_{slot}") for slot in slots)
    first = _between(program, {}, slots)
    second = _between(program, dict(zip(slots, carried, strict=True)), program.outputs)
    made = [k for k, each in enumerate(second.operands) if each.name in carried]
    axes = tuple(program.legs[slot].index(BATCH) for slot in slots)
    return Stages(first, second.with_liveness(made), carried, axes)


def _between(program: Program, given: Mapping[int, str], outputs: Collection[int]) -> Program:
    """The part of a program from slots that are given, by their names, to others."""
    needed = {*outputs}
    steps = []
    for step in reversed(program.steps):
        if step.output in needed and step.output not in given:
            steps.append(step)
            needed.update(step.inputs)
    made = {step.output for step in steps}
    inputs = sorted(needed - made)
    operands = tuple(
        Operand(given[slot], program.legs[slot], "data")
        if slot in given
        else program.operands[slot]
        for slot in inputs
    )
    part = replace(program, operands=operands, steps=tuple(reversed(steps)), outputs=tuple(outputs))
    return renumbered(part, inputs)
