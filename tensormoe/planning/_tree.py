"""Lowering of a contraction tree to steps: leg orders of the intermediates, and their sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tensormoe.errors import PlanError
from tensormoe.factorizations import BATCH, Leg
from tensormoe.planning._lowering import Lowered, dims, lower, volume
from tensormoe.planning._path import Node, search_tree
from tensormoe.planning._program import Operand, Program, Step, View

# a batch size at which copies are weighed against one another; only ratios matter
_TYPICAL_BATCH = 256

# reading an operand matrix by matrix whose entries lie far apart, in copies of the operand
_STRIDED = 2.0

# leg orders of an intermediate that are pursued; more find nothing better and cost planning time
_MOST_ORDERS = 8


@dataclass(slots=True)
class _Choice:
    """The cheapest way to have a node in one leg order."""

    cost: float
    lowered: Lowered | None = None
    # leg orders in which the children are used, and whether each has to be copied into it
    orders: tuple[tuple[Leg, ...], tuple[Leg, ...]] = ((), ())
    sources: tuple[tuple[Leg, ...], tuple[Leg, ...]] = ((), ())


Choices = dict[tuple[Leg, ...], _Choice]


@dataclass
class Builder:
    """Collects the steps of a program; slots are numbered as they are made."""

    operands: tuple[Operand, ...]
    sizes: Mapping[Leg, int]
    steps: list[Step] = field(default_factory=list)
    legs: dict[int, tuple[Leg, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.legs = {slot: operand.legs for slot, operand in enumerate(self.operands)}

    def add(
        self,
        kind: str,
        inputs: tuple[int, ...],
        legs: tuple[Leg, ...],
        views: tuple[View, ...] = (),
        shape: tuple[int, ...] | None = None,
        axis: int = 0,
    ) -> int:
        """Append a step and return the slot of its result."""
        slot = len(self.legs)
        input_legs = tuple(self.legs[k] for k in inputs)
        views = views or (View(),) * len(inputs)
        step = Step(kind, inputs, slot, input_legs, legs, views, shape, axis)  # type: ignore[arg-type]
        self.steps.append(step)
        self.legs[slot] = legs
        return slot

    def permute(self, slot: int, legs: tuple[Leg, ...]) -> int:
        """Copy a slot into another leg order, unless it already is in it."""
        stored = self.legs[slot]
        if stored == legs:
            return slot
        view = View(None, tuple(stored.index(leg) for leg in legs))
        return self.add("permute", (slot,), legs, (view,))

    def reduce(self, slot: int, kept: frozenset[Leg]) -> int:
        """Sum away the legs of a slot that are not in ``kept``."""
        legs = tuple(leg for leg in self.legs[slot] if leg in kept)
        return slot if legs == self.legs[slot] else self.add("reduce", (slot,), legs)

    def plus(self, left: int, right: int) -> int:
        """Add a slot whose legs are among the other's, in the other's order."""
        order = self.legs[left]
        right = self.permute(right, tuple(leg for leg in order if leg in self.legs[right]))
        ones = tuple(
            dims([(leg,)], self.sizes)[0] if leg in self.legs[right] else 1 for leg in order
        )
        view = View() if self.legs[right] == order else View(ones)
        return self.add("add", (left, right), order, (View(), view))

    def contract(
        self, left: int, right: int, kept: frozenset[Leg], order: tuple[Leg, ...] | None = None
    ) -> int:
        """Contract two slots into the legs ``kept``, copying as little as possible."""
        others = [frozenset(self.legs[slot]) for slot in (left, right)]
        left = self.reduce(left, kept | others[1])
        right = self.reduce(right, kept | others[0])
        leaves = [Node(frozenset(self.legs[slot]), slot) for slot in (left, right)]
        return self.emit(Node(kept, children=(leaves[0], leaves[1])), order)

    def network(self, slots: Sequence[int], output: tuple[Leg, ...]) -> int:
        """Contract slots along the cheapest path into the leg order ``output``."""
        counts: dict[Leg, int] = {}
        for slot in slots:
            for leg in self.legs[slot]:
                counts[leg] = counts.get(leg, 0) + 1
        shared = frozenset(output) | {leg for leg, count in counts.items() if count > 1}
        reduced = [self.reduce(slot, shared) for slot in slots]
        root = search_tree([self.legs[slot] for slot in reduced], output, self.sizes)
        return self.emit(_with_slots(root, reduced), output)

    def emit(self, node: Node, order: tuple[Leg, ...] | None = None) -> int:
        """Append the steps that compute ``node``, in the leg order ``order`` if one is given."""
        table: dict[Node, Choices] = {}
        choices = self._choices(node, table)
        best = min(choices, key=lambda legs: choices[legs].cost + self._copy(legs, order or legs))
        return self.permute(self._emit(node, best, table), order or best)

    def _emit(self, node: Node, order: tuple[Leg, ...], table: dict[Node, Choices]) -> int:
        if not node.children:
            return node.slot
        choice = table[node][order]
        assert choice.lowered is not None
        slots = []
        for child, source, wanted in zip(node.children, choice.sources, choice.orders, strict=True):
            slots.append(self.permute(self._emit(child, source, table), wanted))
        inputs = (slots[1], slots[0]) if choice.lowered.swapped else (slots[0], slots[1])
        lowered = choice.lowered
        views, shape = lowered.views(self.sizes), lowered.shape(self.sizes)
        return self.add(lowered.kind, inputs, order, views, shape)

    def _choices(self, node: Node, table: dict[Node, Choices]) -> Choices:
        """For every leg order a node can be had in, the cheapest way to it."""
        if node in table:
            return table[node]
        if not node.children:
            return table.setdefault(node, {self.legs[node.slot]: _Choice(0.0)})
        left, right = (self._choices(child, table) for child in node.children)
        found: Choices = {}
        for copies in (False, True):
            for left_order, left_choice in left.items():
                for right_order, right_choice in right.items():
                    base = left_choice.cost + right_choice.cost
                    pairs = [(left_order, right_order)]
                    if copies:
                        pairs = _rearranged(left_order, right_order, node.legs)
                    for pair in pairs:
                        cost = base + self._copy(left_order, pair[0])
                        cost += self._copy(right_order, pair[1])
                        self._add_choices(found, node, pair, (left_order, right_order), cost)
            least = min((each.cost for each in found.values()), default=float("inf"))
            # beyond ties, nothing is copied and nothing read in a bad order
            if least < 1.0 + min(each.cost for each in left.values()) + min(
                each.cost for each in right.values()
            ):
                break
        if not found:
            raise PlanError(f"no matrix product gives {sorted(node.legs)} from its operands.")
        cheapest = sorted(found, key=lambda legs: found[legs].cost)[:_MOST_ORDERS]
        return table.setdefault(node, {legs: found[legs] for legs in cheapest})

    def _add_choices(
        self,
        found: Choices,
        node: Node,
        pair: tuple[tuple[Leg, ...], tuple[Leg, ...]],
        sources: tuple[tuple[Leg, ...], tuple[Leg, ...]],
        cost: float,
    ) -> None:
        for lowered in lower(pair[0], pair[1], node.legs):
            # a tie goes to fewer, larger products, and to views that move no axis
            total = cost + 1e-3 * lowered.loops(self.sizes) + 1e-4 * lowered.moved
            running = reversed(pair) if lowered.swapped else pair
            for order, strided in zip(running, lowered.strided, strict=True):
                # many small matrices with far-apart entries are slower than a copy in order
                total += _STRIDED * self._volume(order) if strided else 0.0
            if lowered.legs not in found or total < found[lowered.legs].cost:
                found[lowered.legs] = _Choice(total, lowered, pair, sources)

    def _copy(self, stored: tuple[Leg, ...], wanted: tuple[Leg, ...]) -> float:
        return 0.0 if stored == wanted else self._volume(stored)

    def _volume(self, stored: tuple[Leg, ...]) -> float:
        return float(volume(stored, self.sizes, _TYPICAL_BATCH))

    def finish(self, *outputs: int) -> Program:
        """The program whose results are ``outputs``."""
        items = tuple((leg, size) for leg, size in self.sizes.items() if leg != BATCH)
        return Program(self.operands, tuple(self.steps), outputs, items).with_liveness()


def _with_slots(node: Node, slots: Sequence[int]) -> Node:
    """``node`` with its operands numbered by ``slots``."""
    if not node.children:
        return Node(node.legs, slots[node.slot])
    left, right = (_with_slots(child, slots) for child in node.children)
    return Node(node.legs, children=(left, right))


def _rearranged(
    left: tuple[Leg, ...], right: tuple[Leg, ...], kept: frozenset[Leg]
) -> list[tuple[tuple[Leg, ...], tuple[Leg, ...]]]:
    """Orders that one matrix product can look at, copying one operand or both."""
    shared = set(left) & set(right)
    summed_left = tuple(leg for leg in left if leg in shared and leg not in kept)
    summed_right = tuple(leg for leg in right if leg in shared and leg not in kept)

    def gathered(order: tuple[Leg, ...], summed: tuple[Leg, ...]) -> tuple[Leg, ...]:
        return tuple(leg for leg in order if leg not in summed) + summed

    return [
        (gathered(left, summed_right), right),
        (left, gathered(right, summed_left)),
        (gathered(left, summed_left), gathered(right, summed_left)),
    ]
