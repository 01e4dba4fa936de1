"""Tensor networks as pictures: factors are boxes in a row, bonds join them, open legs hang down."""

from __future__ import annotations

from collections.abc import Sequence

from tensormoe._drawing._layout import LINE, REACH, RISE, Layout, Node
from tensormoe._drawing._shapes import (
    BOND,
    FACTOR,
    OPEN,
    RESULT,
    Box,
    Dot,
    Drawing,
    Group,
    Line,
    Point,
    Text,
    pill,
    text_width,
)
from tensormoe.factorizations import INPUT, OUTPUT, Leg, Network

_MARGIN = 24.0


def draw_network(network: Network, title: str, subtitle: str) -> Drawing:
    """A picture of a tensor network.

    Every factor is a box in a row, every bond an edge with its size. Legs of three ends or more
    meet in a dot. Open legs are coloured. Factors without an open leg stand above the row, and the
    terms of a sum side by side.

    Args:
        network: to draw.
        title: in bold above it.
        subtitle: below the title.
    """
    parts = [Layout(network, term) for term in network.terms]
    rise, fall = max(part.rise for part in parts), max(part.fall for part in parts)
    head = 2.9 * LINE
    row = _MARGIN + head + rise
    groups, x = [], _MARGIN
    for index, part in enumerate(parts):
        if index:
            groups.append(Group("sum", "+", (Text((x + 24, row), "+", size=26.0),)))
            x += 48
        groups += _groups(part, x, row)
        x += part.width
    words = [text_width(title, 16.0), text_width(subtitle)]
    width, height = max(x, _MARGIN + max(words)) + _MARGIN, row + fall + _MARGIN
    lines = (
        Text((_MARGIN, _MARGIN + 4), title, size=16.0, bold=True, anchor="start"),
        Text((_MARGIN, _MARGIN + 4 + 1.25 * LINE), subtitle, anchor="start"),
    )
    return Drawing(title, width, height, (Group("title", title, lines), *groups))


def _groups(layout: Layout, left: float, row: float) -> list[Group]:
    """Shapes of the drawing, edges first, with the row's left end and middle at a position."""
    layout.move(left, row)
    found = [_straight(layout, leg, ends, row) for leg, ends in layout.straight.items()]
    found += [_arc(layout, leg, ends, y) for leg, (ends, y) in layout.arcs.items()]
    found += [_joint(layout, leg, ends) for leg, ends in layout.joined.items()]
    found += [_hub(layout, leg, dot) for leg, dot in layout.dots.items()]
    found += [
        group for node in layout.row for group in _open_legs(layout, node, row + layout.depth)
    ]
    for node in (*layout.row, *layout.cores):
        found += _boxes(node)
    if layout.absent:
        place = (left + layout.width / 2, row + layout.fall - 0.4 * LINE)
        said = Text(place, "the same for all experts")
        if len(layout.absent) < len(layout.experts):
            said = Text(place, f"the same for all of {', '.join(layout.absent)}")
        found.append(Group("note", "absent", (said,)))
    return found


def _straight(layout: Layout, leg: Leg, ends: Sequence[Node], row: float) -> Group:
    one, two = ends
    start, end = one.x + one.width / 2, two.x - two.width / 2
    line = Line(((start, row), (end, row)))
    return Group("bond", leg, (line, *pill(((start + end) / 2, row), layout.label(leg))))


def _arc(layout: Layout, leg: Leg, ends: Sequence[Node], y: float) -> Group:
    (x0, y0), (x1, y1) = (
        (node.port(leg), node.top) for node in sorted(ends, key=lambda node: node.x)
    )
    turn = 10.0
    lines = (
        Line(((x0, y0), (x0, y + 10))),
        Line(((x0, y + 10), (x0, y + 3), (x0 + 0.3 * turn, y), (x0 + turn, y)), curved=True),
        Line(((x0 + turn, y), (x1 - turn, y))),
        Line(((x1 - turn, y), (x1 - 0.3 * turn, y), (x1, y + 3), (x1, y + 10)), curved=True),
        Line(((x1, y + 10), (x1, y1))),
    )
    return Group("bond", leg, (*lines, *pill(((x0 + x1) / 2, y), layout.label(leg))))


def _joint(layout: Layout, leg: Leg, ends: Sequence[Node]) -> Group:
    """A bond of a core, with its label near the row."""
    upper, lower = sorted(ends, key=lambda node: node.y)
    if lower in layout.cores:
        return _straight(layout, leg, sorted(ends, key=lambda node: node.x), lower.y)
    below = (lower.port(leg), lower.top)
    above = (upper.port(leg), upper.bottom)
    label = (below[0], below[1] - 0.42 * RISE)
    line = Line((above, (above[0], above[1] + 22), (below[0], label[1] - 30), label), curved=True)
    return Group("bond", leg, (line, Line((label, below)), *pill(label, layout.label(leg))))


def _hub(layout: Layout, leg: Leg, dot: Point) -> Group:
    x, y = dot
    is_open = leg in (*layout.experts, INPUT, OUTPUT)
    colour = _colour(leg) if is_open else BOND
    shapes: list[Line | Box | Dot | Text] = []
    for node in (*layout.row, *layout.cores):
        if leg not in node.factor.legs:
            continue
        if node in layout.cores:
            side = node.x - node.width / 2 if node.x > x else node.x + node.width / 2
            shapes.append(Line((dot, (side, node.y)), colour))
            continue
        end = (node.port(leg), node.top)
        half = (y + end[1]) / 2
        shapes.append(Line((dot, (x, half), (end[0], half), end), colour, curved=True))
    label = (x, y - (REACH if is_open else 0.5 * REACH))
    if is_open:
        shapes.append(Line((dot, label), colour))
    shapes += [Dot(dot, 5.5, colour), *pill(label, layout.label(leg), colour)]
    return Group("open bond" if is_open else "bond", leg, tuple(shapes))


def _open_legs(layout: Layout, node: Node, y: float) -> list[Group]:
    """The legs that hang from a node, each with its label, at one height."""
    widths = [text_width(layout.label(leg)) + 26 for leg in node.legs]
    x, groups = node.x - sum(widths) / 2, []
    for leg, width in zip(node.legs, widths, strict=True):
        middle = x + width / 2
        summed = leg in layout.summed
        colour = BOND if summed else _colour(leg)
        line = Line(((middle, node.bottom), (middle, y)), colour)
        label = pill((middle, y), layout.label(leg), colour)
        groups.append(Group("summed" if summed else "open", leg, (line, *label)))
        x += width
    return groups


def _boxes(node: Node) -> list[Group]:
    """A factor, and below a rule the bias that takes its place."""
    top = node.top
    box = Box((node.x, (top + node.bottom) / 2), node.width, node.height, FACTOR)
    lines = [
        Text((node.x, top + 7 + LINE * (k + 0.5)), line, "#ffffff", 13.0 - k % 2, not k % 2)
        for k, line in enumerate(node.lines)
    ]
    groups = [Group("factor", node.factor.name, (box, *lines[:2]))]
    if node.bias is not None:
        x, y = node.width / 2 - 10, top + 7 + 2 * LINE
        rule = Line(((node.x - x, y), (node.x + x, y)), "#ffffff", dashed=True, width=1.0)
        groups.append(Group("bias", node.bias.name, (rule, *lines[2:])))
    return groups


def _colour(leg: Leg) -> str:
    return RESULT if leg in (INPUT, OUTPUT) else OPEN
