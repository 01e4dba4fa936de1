"""Programs as pictures: arrays flow down in lanes, and steps join them in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from tensormoe._drawing._shapes import (
    BOND,
    DATA,
    FACTOR,
    RESULT,
    Box,
    Dot,
    Drawing,
    Group,
    Line,
    Shape,
    Text,
    text_width,
)
from tensormoe._format import format_bytes, format_count
from tensormoe.factorizations import Leg

if TYPE_CHECKING:
    from tensormoe.planning import Program, StepCost

_MARGIN, _ROW, _LANE, _BAR = 24.0, 30.0, 22.0, 90.0


def draw_program(
    program: Program,
    costs: Sequence[StepCost],
    sizes: Mapping[Leg, int],
    itemsize: int,
    index_bytes: int,
    title: str,
    subtitle: str,
) -> Drawing:
    """A picture of a contraction, step by step.

    Every array that goes in starts a lane, in the row before the step that needs it first; a step
    joins the lanes of its operands.

    Args:
        program: to draw.
        costs: of its steps.
        sizes: of the legs, the batch included.
        itemsize: bytes per entry.
        index_bytes: bytes per index.
        title: in bold above it.
        subtitle: below the title.
    """
    rows = _rows(program)
    lanes = _lanes(program, rows)
    names = [_name(program, slot) for slot in rows]
    legs = program.legs
    shapes = [" × ".join(f"{leg} {sizes[leg]:,}" for leg in legs[slot]) or "1" for slot in rows]
    left = _MARGIN + _LANE * (max(lanes.values()) + 1)
    middle = left + max(map(text_width, names)) + 20
    memory = middle + max(map(text_width, shapes)) + 84
    work = memory + 92
    width = max(
        work + _BAR + 12 + _MARGIN,
        *(2 * _MARGIN + text_width(text, size) for text, size in ((title, 16), (subtitle, 13))),
    )
    top = _MARGIN + 78
    heads = (
        Text((_MARGIN, _MARGIN + 4), title, size=16.0, bold=True, anchor="start"),
        Text((_MARGIN, _MARGIN + 28), subtitle, anchor="start"),
        Text((left, top - 24), "array", size=12.0, anchor="start"),
        Text((middle, top - 24), "shape", size=12.0, anchor="start"),
        Text((memory, top - 24), "memory", size=12.0, anchor="end"),
        Text((work, top - 24), "FLOPs", size=12.0, anchor="end"),
    )
    y = {slot: top + _ROW * index for index, slot in enumerate(rows)}
    groups = [Group("title", title, heads), *_flows(program, rows, lanes, y)]
    count = len(program.operands)
    most = max((_work(cost) for cost in costs), default=0)
    for slot, name, shape in zip(rows, names, shapes, strict=True):
        role = program.operands[slot].role if slot < count else None
        here, last = y[slot], slot in program.outputs
        size = index_bytes if role == "indices" else itemsize
        entries = prod(sizes[leg] for leg in legs[slot])
        colour = BOND if role is None else FACTOR if role == "factor" else DATA
        marks: list[Shape] = [
            Dot((_x(lanes[slot]), here), 6.0, RESULT if last else colour),
            Text((left, here), name, bold=slot < count, anchor="start"),
            Text((middle, here), shape, anchor="start"),
            Text((memory, here), format_bytes(size * entries), anchor="end"),
        ]
        if slot >= count:
            flops = _work(costs[slot - count])
            marks.append(Text((work, here), format_count(flops), anchor="end"))
            bar = _BAR * flops / max(most, 1)
            if bar >= 1:
                marks.append(Box((work + 12 + bar / 2, here), bar, 10.0, FACTOR, 2.0))
        groups.append(Group("step" if slot >= count else "operand", name, tuple(marks)))
    return Drawing(title, width, top + _ROW * (len(rows) - 0.5) + _MARGIN, tuple(groups))


def _rows(program: Program) -> list[int]:
    """Slots in the order of their rows: operands right before the step that needs them first."""
    rows: list[int] = []
    for step in program.steps:
        rows += [slot for slot in dict.fromkeys(step.inputs) if slot not in rows]
        rows.append(step.output)
    # an operand that no step touches is a result as it is
    return rows + [slot for slot in dict.fromkeys(program.outputs) if slot not in rows]


def _lanes(program: Program, rows: Sequence[int]) -> dict[int, int]:
    """The lane of every slot: a free one, for results the leftmost that its operands leave."""
    steps = {step.output: step for step in program.steps}
    last = {slot: step.output for step in program.steps for slot in step.inputs}
    lanes: dict[int, int] = {}
    taken: set[int] = set()
    for slot in rows:
        if slot in steps:
            ended = {lanes[each] for each in steps[slot].inputs if last[each] == slot}
            taken -= ended
        free = (lane for lane in range(len(rows)) if lane not in taken)
        lanes[slot] = next(free)
        taken.add(lanes[slot])
    return lanes


def _flows(
    program: Program, rows: Sequence[int], lanes: Mapping[int, int], y: Mapping[int, float]
) -> list[Group]:
    """From every array to the steps that need it: down its lane, and over in the last row."""
    groups = []
    for step in program.steps:
        end = (_x(lanes[step.output]), y[step.output])
        for slot in dict.fromkeys(step.inputs):
            x, turn = _x(lanes[slot]), end[1] - _ROW
            lines = [Line(((x, y[slot]), (x, turn)))] if turn > y[slot] else []
            half = turn + _ROW / 2
            lines.append(Line(((x, turn), (x, half), (end[0], half), end), curved=True))
            groups.append(Group("flow", f"{slot} {step.output}", tuple(lines)))
    return groups


def _name(program: Program, slot: int) -> str:
    count = len(program.operands)
    return program.operands[slot].name if slot < count else program.steps[slot - count].kind


def _work(cost: StepCost) -> int:
    return cost.matmul_flops + cost.elementwise_flops


def _x(lane: int) -> float:
    return _MARGIN + 6 + _LANE * lane
