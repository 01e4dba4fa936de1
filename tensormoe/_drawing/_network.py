"""Tensor networks as pictures: factors are boxes in a row, bonds join them, open legs hang down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

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
    text_width,
)
from tensormoe.factorizations import INPUT, OUTPUT, Factor, Leg, Network, Term

__all__ = ["draw_network", "layered", "pill"]

# distances in pixels: around the picture, between factors, to the labels of open legs, and from
# the row to what is drawn above it, level by level
_MARGIN, _GAP, _REACH, _RISE = 24.0, 36.0, 36.0, 58.0
_LINE, _PILL = 19.0, 22.0
# half the height of a box without a bias
_HALF = 7.0 + _LINE


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
    parts = [_Part(network, term) for term in network.terms]
    rise, fall = max(part.rise for part in parts), max(part.fall for part in parts)
    head = 2.9 * _LINE
    row = _MARGIN + head + rise
    groups, x = [], _MARGIN
    for place, part in enumerate(parts):
        if place:
            groups.append(Group("sum", "+", (Text((x + 24, row), "+", size=26.0),)))
            x += 48
        groups += part.groups(x, row)
        x += part.width
    words = [text_width(title, 16.0), text_width(subtitle)]
    width, height = max(x, _MARGIN + max(words)) + _MARGIN, row + fall + _MARGIN
    lines = (
        Text((_MARGIN, _MARGIN + 4), title, size=16.0, bold=True, anchor="start"),
        Text((_MARGIN, _MARGIN + 4 + 1.25 * _LINE), subtitle, anchor="start"),
    )
    return Drawing(title, width, height, (Group("title", title, lines), *groups))


@dataclass
class _Node:
    """A factor on its place.

    Args:
        factor: that is drawn.
        bias: the factor that takes its place for the constant input 1, if any.
        lines: name and shape, of the bias too.
        legs: open legs that hang from it.
        width: of the box.
        x: of its middle.
        y: of the middle of its name and shape.
        ports: middles of what its upper edges lead to.
    """

    factor: Factor
    bias: Factor | None
    lines: list[str]
    legs: list[Leg]
    width: float
    x: float = 0.0
    y: float = 0.0
    ports: dict[Leg, float] = field(default_factory=dict)

    @property
    def height(self) -> float:
        return 14.0 + _LINE * len(self.lines)

    @property
    def top(self) -> float:
        return self.y - _HALF

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def port(self, leg: Leg) -> float:
        """Where the edge of a leg leaves the upper side, in the order of where edges lead."""
        order = sorted(self.ports, key=lambda each: self.ports[each])
        return self.x + self.width * ((order.index(leg) + 1) / (len(order) + 1) - 0.5)


class _Part:
    """One term of a network, laid out around the origin of its row."""

    def __init__(self, network: Network, term: Term) -> None:
        self.sizes, self._experts = network.sizes, network.expert_legs
        ends: dict[Leg, list[Factor]] = {}
        for factor in term.factors:
            for leg in factor.legs:
                ends.setdefault(leg, []).append(factor)
        opened = {*self._experts, INPUT, OUTPUT}
        # an open leg of several factors ends in a dot as well
        self.hubs = [leg for leg, met in ends.items() if len(met) + (leg in opened) > 2]
        own = {leg for leg, met in ends.items() if len(met) == 1 and leg in opened}
        nodes = []
        for factor in term.factors:
            bias = term.bias if factor == term.input_factor else None
            nodes.append(self._node(factor, bias, [leg for leg in factor.legs if leg in own]))
        cores = [
            node
            for node in nodes
            if len(node.factor.legs) > 2 and not opened.intersection(node.factor.legs)
        ]
        self.row = [node for node in nodes if node not in cores]
        if not self.row:
            self.row, cores = nodes, []
        self.cores = cores
        bonds = {
            leg: [node for node in nodes if leg in node.factor.legs]
            for leg, met in ends.items()
            if len(met) == 2 and leg not in self.hubs
        }
        self._place_row(bonds)
        self._place_above(bonds)
        self.absent = [leg for leg in self._experts if leg not in ends]
        self.depth = max(node.bottom for node in self.row) + _REACH
        self.fall = self.depth + _PILL / 2 + (1.4 * _LINE if self.absent else 0.0)

    def _node(self, factor: Factor, bias: Factor | None, legs: list[Leg]) -> _Node:
        lines = []
        for each in (factor, bias):
            if each is not None:
                shape = " × ".join(str(self.sizes[leg]) for leg in each.legs)
                lines += [each.name, shape or "1"]
        pills = [text_width(self._label(leg)) + 26 for leg in legs]
        words = [text_width(line, 14.0) + 26 for line in lines]
        return _Node(factor, bias, lines, legs, max(84.0, sum(pills), *words))

    def _label(self, leg: Leg) -> str:
        size = f"{leg}  {self.sizes[leg]:,}"
        names = {INPUT: "in", OUTPUT: "out"} | dict.fromkeys(self._experts, "experts")
        return f"{size} {names[leg]}" if leg in names else size

    def _place_row(self, bonds: Mapping[Leg, Sequence[_Node]]) -> None:
        """Nodes from left to right, and which bonds run straight between neighbours."""
        self.straight: dict[Leg, Sequence[_Node]] = {}
        x = 0.0
        for place, node in enumerate(self.row):
            if place:
                before = self.row[place - 1]
                shared = [leg for leg, ends in bonds.items() if ends == [before, node]]
                gap = _GAP
                if shared:
                    self.straight[shared[0]] = before, node
                    gap = max(gap, text_width(self._label(shared[0])) + 44)
                x += gap
            node.x = x + node.width / 2
            x += node.width
        self.width = x

    def _place_above(self, bonds: Mapping[Leg, Sequence[_Node]]) -> None:
        """Arcs over the row, and above them dots and cores."""
        others = {leg: ends for leg, ends in bonds.items() if leg not in self.straight}
        self.joined = {leg: ends for leg, ends in others.items() if _any_in(ends, self.cores)}
        arcs = [leg for leg in others if leg not in self.joined]
        spans = sorted(arcs, key=lambda leg: abs(others[leg][0].x - others[leg][1].x))
        self.arcs = {
            leg: (others[leg], _HALF + 0.7 * _RISE * (k + 1)) for k, leg in enumerate(spans)
        }
        for leg, (ends, _) in self.arcs.items():
            for node, other in (ends, ends[::-1]):
                node.ports[leg] = other.x
        level = _HALF + 0.7 * _RISE * len(self.arcs) + _RISE
        ends_of = {
            leg: [node for node in (*self.row, *self.cores) if leg in node.factor.legs]
            for leg in self.hubs
        }
        above: list[tuple[Leg | _Node, float, float]] = []
        for leg, met in ends_of.items():
            places = [node.x for node in met if node not in self.cores]
            above.append((leg, mean(places or [self.width / 2]), text_width(self._label(leg)) + 30))
        for core in self.cores:
            places = [
                node.x
                for ends in self.joined.values()
                if core in ends
                for node in ends
                if node not in self.cores
            ]
            above.append((core, mean(places or [self.width / 2]), core.width + _GAP))
        self.dots: dict[Leg, Point] = {}
        for (thing, _, _), x in zip(above, layered([each[1:] for each in above]), strict=True):
            if isinstance(thing, _Node):
                thing.x, thing.y = x, -level - thing.height + _HALF
            else:
                self.dots[thing] = x, -level
        for leg, met in ends_of.items():
            for node in met:
                node.ports[leg] = self.dots[leg][0]
        for leg, ends in self.joined.items():
            for node, other in (ends, ends[::-1]):
                node.ports[leg] = other.x
        heights = [_HALF, *(height + _PILL / 2 for _, height in self.arcs.values())]
        heights += [level + _REACH + _PILL / 2 for _ in self.dots]
        heights += [level + core.height for core in self.cores]
        self.rise = max(heights)

    def groups(self, left: float, row: float) -> list[Group]:
        """What is drawn, edges first, with the row's left end and middle at a place."""
        for node in (*self.row, *self.cores):
            node.x, node.y = node.x + left, node.y + row
            node.ports = {leg: x + left for leg, x in node.ports.items()}
        self.dots = {leg: (x + left, y + row) for leg, (x, y) in self.dots.items()}
        found = [self._straight(leg, ends, row) for leg, ends in self.straight.items()]
        found += [self._arc(leg, ends, row - height) for leg, (ends, height) in self.arcs.items()]
        found += [self._joint(leg, ends) for leg, ends in self.joined.items()]
        found += [self._hub(leg, dot) for leg, dot in self.dots.items()]
        found += [group for node in self.row for group in self._open_legs(node, row + self.depth)]
        for node in (*self.row, *self.cores):
            found += _boxes(node)
        if self.absent:
            place = (left + self.width / 2, row + self.fall - 0.4 * _LINE)
            said = Text(place, "the same for all experts")
            if len(self.absent) < len(self._experts):
                said = Text(place, f"the same for all of {', '.join(self.absent)}")
            found.append(Group("note", "absent", (said,)))
        return found

    def _straight(self, leg: Leg, ends: Sequence[_Node], row: float) -> Group:
        one, two = ends
        start, end = one.x + one.width / 2, two.x - two.width / 2
        line = Line(((start, row), (end, row)))
        return Group("bond", leg, (line, *pill(((start + end) / 2, row), self._label(leg))))

    def _arc(self, leg: Leg, ends: Sequence[_Node], y: float) -> Group:
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
        return Group("bond", leg, (*lines, *pill(((x0 + x1) / 2, y), self._label(leg))))

    def _joint(self, leg: Leg, ends: Sequence[_Node]) -> Group:
        """A bond of a core, with its label near the row."""
        upper, lower = sorted(ends, key=lambda node: node.y)
        if lower in self.cores:
            return self._straight(leg, sorted(ends, key=lambda node: node.x), lower.y)
        below = (lower.port(leg), lower.top)
        above = (upper.port(leg), upper.bottom)
        label = (below[0], below[1] - 0.42 * _RISE)
        line = Line(
            (above, (above[0], above[1] + 22), (below[0], label[1] - 30), label), curved=True
        )
        return Group("bond", leg, (line, Line((label, below)), *pill(label, self._label(leg))))

    def _hub(self, leg: Leg, dot: Point) -> Group:
        x, y = dot
        is_open = leg in (*self._experts, INPUT, OUTPUT)
        colour = _colour(leg) if is_open else BOND
        shapes: list[Line | Box | Dot | Text] = []
        for node in (*self.row, *self.cores):
            if leg not in node.factor.legs:
                continue
            if node in self.cores:
                side = node.x - node.width / 2 if node.x > x else node.x + node.width / 2
                shapes.append(Line((dot, (side, node.y)), colour))
                continue
            end = (node.port(leg), node.top)
            half = (y + end[1]) / 2
            shapes.append(Line((dot, (x, half), (end[0], half), end), colour, curved=True))
        label = (x, y - (_REACH if is_open else 0.5 * _REACH))
        if is_open:
            shapes.append(Line((dot, label), colour))
        shapes += [Dot(dot, 5.5, colour), *pill(label, self._label(leg), colour)]
        return Group("open bond" if is_open else "bond", leg, tuple(shapes))

    def _open_legs(self, node: _Node, y: float) -> list[Group]:
        """The legs that hang from a node, each with its label, at one height."""
        widths = [text_width(self._label(leg)) + 26 for leg in node.legs]
        x, groups = node.x - sum(widths) / 2, []
        for leg, width in zip(node.legs, widths, strict=True):
            middle = x + width / 2
            line = Line(((middle, node.bottom), (middle, y)), _colour(leg))
            label = pill((middle, y), self._label(leg), _colour(leg))
            groups.append(Group("open", leg, (line, *label)))
            x += width
        return groups


def layered(wanted: Sequence[tuple[float, float]]) -> list[float]:
    """Middles of things side by side that do not overlap, near where they are wanted.

    Args:
        wanted: a middle and a width for each.

    >>> layered([(10.0, 4.0), (10.0, 4.0), (30.0, 4.0)])
    [8.0, 12.0, 30.0]
    """
    order = sorted(range(len(wanted)), key=lambda k: wanted[k][0])
    clusters: list[list[int]] = []

    def middle(cluster: Sequence[int]) -> float:
        return mean(wanted[k][0] for k in cluster)

    def width(cluster: Sequence[int]) -> float:
        return sum(wanted[k][1] for k in cluster)

    for k in order:
        clusters.append([k])
        while len(clusters) > 1:
            left, right = clusters[-2:]
            if middle(right) - middle(left) >= (width(left) + width(right)) / 2:
                break
            clusters[-2:] = [left + right]
    found = [0.0] * len(wanted)
    for cluster in clusters:
        x = middle(cluster) - width(cluster) / 2
        for k in cluster:
            found[k] = x + wanted[k][1] / 2
            x += wanted[k][1]
    return found


def pill(middle: Point, label: str, colour: str = BOND) -> tuple[Box, Text]:
    """A label on a ground of its own, which an edge may run behind."""
    box = Box(middle, text_width(label, 12.5) + 16, _PILL, colour, _PILL / 2)
    return box, Text(middle, label, "#ffffff", 12.5)


def _boxes(node: _Node) -> list[Group]:
    """A factor, and below a rule the bias that takes its place."""
    top = node.top
    box = Box((node.x, (top + node.bottom) / 2), node.width, node.height, FACTOR)
    lines = [
        Text((node.x, top + 7 + _LINE * (k + 0.5)), line, "#ffffff", 13.0 - k % 2, not k % 2)
        for k, line in enumerate(node.lines)
    ]
    groups = [Group("factor", node.factor.name, (box, *lines[:2]))]
    if node.bias is not None:
        x, y = node.width / 2 - 10, top + 7 + 2 * _LINE
        rule = Line(((node.x - x, y), (node.x + x, y)), "#ffffff", dashed=True, width=1.0)
        groups.append(Group("bias", node.bias.name, (rule, *lines[2:])))
    return groups


def _colour(leg: Leg) -> str:
    return RESULT if leg in (INPUT, OUTPUT) else OPEN


def _any_in(nodes: Sequence[_Node], others: Sequence[_Node]) -> bool:
    return any(node is other for node in nodes for other in others)
