"""Places of factors and legs: a row of factors, bonds between and above them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from tensormoe._drawing._shapes import PILL, Point, text_width
from tensormoe.factorizations import INPUT, OUTPUT, Factor, Leg, Network, Term

# distances in pixels: between factors, to the labels of open legs, and from the row to what is
# drawn above it, level by level
GAP, REACH, RISE = 36.0, 36.0, 58.0
LINE = 19.0
# half the height of a box without a bias
HALF = 7.0 + LINE


@dataclass(eq=False)
class Node:
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
        return 14.0 + LINE * len(self.lines)

    @property
    def top(self) -> float:
        return self.y - HALF

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def port(self, leg: Leg) -> float:
        """Position of a leg's edge on the upper side; edges leave in the order of their targets."""
        order = sorted(self.ports, key=lambda each: self.ports[each])
        return self.x + self.width * ((order.index(leg) + 1) / (len(order) + 1) - 0.5)


class Layout:
    """Places of everything in one term of a network, around the left end of its row.

    Args:
        network: that the term is of.
        term: to lay out.

    Attributes:
        row: factors from left to right.
        cores: factors without an open leg, above the row.
        straight: bonds of neighbours, with their ends.
        arcs: other bonds of the row, with their ends and how high they rise.
        joined: bonds of cores, with their ends.
        dots: legs of three ends or more, with the place where these meet.
        absent: expert legs that the term lacks.
        width: of the row.
        depth: from the row to the labels of open legs.
        rise: from the row to the upper end of everything.
        fall: from the row to the lower end.
    """

    def __init__(self, network: Network, term: Term) -> None:
        self.sizes, self.experts = network.sizes, network.expert_legs
        ends: dict[Leg, list[Factor]] = {}
        for factor in term.factors:
            for leg in factor.legs:
                ends.setdefault(leg, []).append(factor)
        opened = {*self.experts, INPUT, OUTPUT}
        # an open leg of several factors ends in a dot as well
        self.hubs = [leg for leg, met in ends.items() if len(met) + (leg in opened) > 2]
        own = {leg for leg, met in ends.items() if len(met) == 1}
        self.summed = own - opened
        nodes = []
        for factor in term.factors:
            bias = term.bias if factor == term.input_factor else None
            nodes.append(self._node(factor, bias, [leg for leg in factor.legs if leg in own]))
        cores = [
            node
            for node in nodes
            if len(node.factor.legs) > 2
            and not node.legs
            and not opened.intersection(node.factor.legs)
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
        self.absent = [leg for leg in self.experts if leg not in ends]
        self.depth = max(node.bottom for node in self.row) + REACH
        self.fall = self.depth + PILL / 2 + (1.4 * LINE if self.absent else 0.0)

    def _node(self, factor: Factor, bias: Factor | None, legs: list[Leg]) -> Node:
        lines = []
        for each in (factor, bias):
            if each is not None:
                shape = " × ".join(str(self.sizes[leg]) for leg in each.legs)
                lines += [each.name, shape or "1"]
        pills = [text_width(self.label(leg)) + 26 for leg in legs]
        words = [text_width(line, 14.0) + 26 for line in lines]
        return Node(factor, bias, lines, legs, max(84.0, sum(pills), *words))

    def _place_row(self, bonds: Mapping[Leg, Sequence[Node]]) -> None:
        """Nodes from left to right, and which bonds run straight between neighbours."""
        self.straight: dict[Leg, Sequence[Node]] = {}
        x = 0.0
        for index, node in enumerate(self.row):
            if index:
                before = self.row[index - 1]
                shared = [leg for leg, ends in bonds.items() if ends == [before, node]]
                gap = GAP
                if shared:
                    self.straight[shared[0]] = before, node
                    gap = max(gap, text_width(self.label(shared[0])) + 44)
                x += gap
            node.x = x + node.width / 2
            x += node.width
        self.width = x

    def _place_above(self, bonds: Mapping[Leg, Sequence[Node]]) -> None:
        """Arcs over the row, and above them dots and cores."""
        others = {leg: ends for leg, ends in bonds.items() if leg not in self.straight}
        self.joined = {
            leg: ends for leg, ends in others.items() if any(node in self.cores for node in ends)
        }
        arcs = [leg for leg in others if leg not in self.joined]
        spans = sorted(arcs, key=lambda leg: abs(others[leg][0].x - others[leg][1].x))
        self.arcs = {leg: (others[leg], HALF + 0.7 * RISE * (k + 1)) for k, leg in enumerate(spans)}
        for leg, (ends, _) in self.arcs.items():
            for node, other in (ends, ends[::-1]):
                node.ports[leg] = other.x
        level = HALF + 0.7 * RISE * len(self.arcs) + RISE
        ends_of = {
            leg: [node for node in (*self.row, *self.cores) if leg in node.factor.legs]
            for leg in self.hubs
        }
        above: list[tuple[Leg | Node, float, float]] = []
        for leg, met in ends_of.items():
            places = [node.x for node in met if node not in self.cores]
            above.append((leg, mean(places or [self.width / 2]), text_width(self.label(leg)) + 30))
        for core in self.cores:
            places = [
                node.x
                for ends in self.joined.values()
                if core in ends
                for node in ends
                if node not in self.cores
            ]
            above.append((core, mean(places or [self.width / 2]), core.width + GAP))
        self.dots: dict[Leg, Point] = {}
        for (thing, _, _), x in zip(above, _spread([each[1:] for each in above]), strict=True):
            if isinstance(thing, Node):
                thing.x, thing.y = x, -level - thing.height + HALF
            else:
                self.dots[thing] = x, -level
        for leg, met in ends_of.items():
            for node in met:
                node.ports[leg] = self.dots[leg][0]
        for leg, ends in self.joined.items():
            for node, other in (ends, ends[::-1]):
                node.ports[leg] = other.x
        heights = [HALF, *(height + PILL / 2 for _, height in self.arcs.values())]
        heights += [level + REACH + PILL / 2 for _ in self.dots]
        heights += [level + core.height for core in self.cores]
        self.rise = max(heights)

    def label(self, leg: Leg) -> str:
        """A leg with its size, and what it stands for if it is open."""
        size = f"{leg}  {self.sizes[leg]:,}"
        if leg in self.summed:
            return f"Σ {size}"
        names = {INPUT: "in", OUTPUT: "out"} | dict.fromkeys(self.experts, "experts")
        return f"{size} {names[leg]}" if leg in names else size

    def move(self, x: float, y: float) -> None:
        """Move everything to where the row is to start."""
        for node in (*self.row, *self.cores):
            node.x, node.y = node.x + x, node.y + y
            node.ports = {leg: port + x for leg, port in node.ports.items()}
        self.dots = {leg: (left + x, top + y) for leg, (left, top) in self.dots.items()}
        self.arcs = {leg: (ends, y - height) for leg, (ends, height) in self.arcs.items()}


def _spread(wanted: Sequence[tuple[float, float]]) -> list[float]:
    """Middles of things side by side that do not overlap, near where they are wanted.

    Args:
        wanted: a middle and a width for each.

    >>> _spread([(10.0, 4.0), (10.0, 4.0), (30.0, 4.0)])
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
