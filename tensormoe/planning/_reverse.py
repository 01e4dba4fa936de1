"""The reverse-mode program of a program, derived step by step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tensormoe.factorizations import Leg
from tensormoe.planning._grouping import transposed
from tensormoe.planning._program import Operand, Program, Step
from tensormoe.planning._tree import Builder

COTANGENT = "cotangent"
"""Name of the operand that holds the gradient of the result."""


@dataclass(frozen=True)
class Reverse:
    """Gradients of a program's result with respect to its operands.

    Args:
        program: takes the saved slots, then the cotangent of the result; gives the gradients.
        saved: slots of the forward program that the gradients are computed from.
        wanted: the operands that the gradients belong to, in the order of the outputs.
    """

    program: Program
    saved: tuple[int, ...]
    wanted: tuple[str, ...]


@lru_cache(maxsize=1024)
def reverse(program: Program, wanted: tuple[str, ...] | None = None) -> Reverse:
    """Derive the reverse-mode program of a program with one result.

    Every contraction C = A·B gives Ā = C̄·B and B̄ = A·C̄, lowered like any other contraction; a
    gather gives a scatter; a sum gives a copy along the summed legs, and the reverse.

    Args:
        program: the forward program.
        wanted: names of the operands to differentiate by; all but indices by default.
    """
    if wanted is None:
        wanted = tuple(each.name for each in program.operands if each.role != "indices")
    targets = {k for k, each in enumerate(program.operands) if each.name in wanted}
    live = _dependent(program, targets)
    saved = _saved_slots(program, live)
    operands = [_saved_operand(program, slot) for slot in saved]
    operands.append(Operand(COTANGENT, program.legs[program.outputs[0]], "data"))
    builder = Builder(tuple(operands), program.sizes)
    slots = {slot: k for k, slot in enumerate(saved)}
    gradients = {program.outputs[0]: len(saved)}

    for step in reversed(program.steps):
        if step.output not in gradients or step.output not in live:
            continue
        cotangent = gradients.pop(step.output)
        for position, slot in enumerate(step.inputs):
            if slot not in live:
                continue
            gradient = _transpose(builder, step, position, cotangent, slots)
            if slot in gradients:
                gradient = builder.plus(gradients[slot], gradient)
            gradients[slot] = gradient

    names = {each.name: k for k, each in enumerate(program.operands)}
    outputs = tuple(gradients[names[name]] for name in wanted)
    return Reverse(builder.finish(*outputs), saved, wanted)


def _dependent(program: Program, targets: set[int]) -> set[int]:
    """Slots whose value depends on the targets."""
    live = set(targets)
    for step in program.steps:
        # an identity matrix is the same whatever the array is that it is made like
        if step.kind != "eye" and live.intersection(step.inputs):
            live.add(step.output)
    return live


def _saved_slots(program: Program, live: set[int]) -> tuple[int, ...]:
    """Slots that some gradient is computed from."""
    saved = set()
    for step in program.steps:
        if step.kind in ("linear", "matmul", "multiply"):
            left, right = step.inputs
            saved |= {right} if left in live else set()
            saved |= {left} if right in live else set()
        elif step.kind == "grouped":
            rows, matrices, counts = step.inputs
            saved |= {matrices, counts} if rows in live else set()
            saved |= {rows, counts} if matrices in live else set()
        elif step.kind == "gather" and step.inputs[0] in live:
            saved |= set(step.inputs[1:])
    return tuple(sorted(saved))


def _saved_operand(program: Program, slot: int) -> Operand:
    if slot < len(program.operands):
        return program.operands[slot]
    return Operand(f"saved_{slot}", program.legs[slot], "data")


def _transpose(
    builder: Builder, step: Step, position: int, cotangent: int, slots: dict[int, int]
) -> int:
    """The gradient that one operand of a step gets from the cotangent of its result."""
    legs: tuple[Leg, ...] = step.input_legs[position]
    if step.kind == "add":
        return builder.permute(builder.reduce(cotangent, frozenset(legs)), legs)
    if step.kind == "permute":
        return builder.permute(cotangent, legs)
    if step.kind == "reduce":
        return builder.add("expand", (cotangent,), legs)
    if step.kind == "gather":
        indices = tuple(slots[slot] for slot in step.inputs[1:])
        return builder.add("scatter", (cotangent, *indices), legs, axis=step.axis)
    if step.kind == "grouped":
        return transposed(builder, step, position, cotangent, slots)
    other = slots[step.inputs[1 - position]]
    return builder.contract(cotangent, other, frozenset(legs), legs)
