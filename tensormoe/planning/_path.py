"""Path search: the order in which the operands of a network are contracted, as a binary tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

from tensormoe.factorizations import BATCH, Leg

WRITE_WEIGHT = 32
"""Multiply-adds that writing one entry is worth when paths are compared: the ratio of arithmetic
to memory speed on current CPUs and GPUs is a few tens of operations per entry."""

_Path = tuple[tuple[int, ...], ...]
# pairs of positions in a shrinking list of operands, as opt_einsum gives them

# the exact search takes three times as long for every operand more, up to 0.1 s for this many:
# a layer with four levels of experts
_MOST_EXACT = 11

# operands of the parts of a larger network that are searched exactly, one after another; the
# larger the network, the more parts there are
_PART, _SMALL_PART, _LARGE = 8, 5, 20

# passes over all parts; the second finds little, the third next to nothing
_PASSES = 3


@dataclass(frozen=True, slots=True)
class Node:
    """A contraction of two nodes, or (without children) an operand."""

    legs: frozenset[Leg]
    slot: int = -1
    children: tuple[Node, ...] = ()


def search_tree(
    operands: Sequence[Sequence[Leg]], output: Sequence[Leg], sizes: Mapping[Leg, int]
) -> Node:
    """The tree, over positions, that minimizes multiply-adds + 32 × entries written.

    Up to 11 operands the search is opt_einsum's dynamic programming, which is exact but for outer
    products, and whose time grows exponentially. For more, greedy trees are improved: every part
    of eight operands or intermediates is replaced by its own best tree, until none gets cheaper.

    Args:
        operands: the legs of each operand.
        output: the legs to keep.
        sizes: the size of every leg, the batch included.
    """
    legs = [tuple(each) for each in operands]
    if len(legs) == 1:
        return Node(frozenset(legs[0]), 0)
    sensible = _tree_of(legs, _sensible_path(legs), output)
    if len(legs) <= _MOST_EXACT:
        return _exact(legs, output, sizes, sensible)
    # opt_einsum loads NumPy where it is installed, so it is not imported with the core
    from opt_einsum.paths import greedy

    path = greedy([frozenset(each) for each in legs], frozenset(output), dict(sizes))
    starts = (sensible, _tree_of(legs, tuple(tuple(pair) for pair in path), output))
    found = [_Improvement(sizes).run(start) for start in starts]
    return min(found, key=lambda tree: _total(tree, sizes))


def _exact(
    legs: Sequence[Sequence[Leg]],
    output: Sequence[Leg],
    sizes: Mapping[Leg, int],
    known: Node,
) -> Node:
    """The best tree; a search that starts from the cost of a known one is several times as fast."""
    from opt_einsum.paths import DynamicProgramming

    cap = _total(known, sizes)
    search = DynamicProgramming(minimize=f"combo-{WRITE_WEIGHT}", cost_cap=cap + cap // 10**6 + 1)
    # in order, not as sets: of equally cheap paths every process finds the same one
    ordered: Any = [tuple(each) for each in legs]
    path = search(ordered, cast(Any, tuple(output)), dict(sizes))
    return _scaled_early(_tree_of(legs, tuple(tuple(pair) for pair in path), output), sizes)


def _scaled_early(node: Node, sizes: Mapping[Leg, int]) -> Node:
    """``node`` with numbers per input multiplied into the smallest array on the way.

    What has the batch and bonds of one entry alone is such a number. The search would call its
    product with what lacks these bonds an outer one, and leave it out.
    """
    if not node.children:
        return node
    first, second = (_scaled_early(child, sizes) for child in node.children)
    best = Node(node.legs, children=(first, second))
    for product, number in ((first, second), (second, first)):
        if not product.children or any(sizes[leg] > 1 for leg in number.legs - {BATCH}):
            continue
        for one, other in (product.children, product.children[::-1]):
            if BATCH not in one.legs:
                continue
            legs = (one.legs | number.legs) & (other.legs | node.legs)
            scaled = _scaled_early(Node(legs, children=(one, number)), sizes)
            found = Node(node.legs, children=(scaled, other))
            best = min(best, found, key=lambda tree: _total(tree, sizes))
    return best


class _Improvement:
    """Exact searches in the parts of a tree.

    Args:
        sizes: the size of every leg, the batch included.
    """

    def __init__(self, sizes: Mapping[Leg, int]) -> None:
        self.sizes = sizes
        self.part = _PART
        # parts that are known to be optimal
        self.done: set[tuple[frozenset[Leg], ...]] = set()

    def run(self, tree: Node) -> Node:
        """``tree``, or a cheaper one."""
        self.part = _PART if _count(tree) <= _LARGE else _SMALL_PART
        cost = _total(tree, self.sizes)
        for _ in range(_PASSES):
            tree = self._improved(tree)
            before, cost = cost, _total(tree, self.sizes)
            if cost >= before:
                break
        return tree

    def _improved(self, node: Node) -> Node:
        if not node.children:
            return node
        node = self._best(node)
        left, right = (self._improved(child) for child in node.children)
        return Node(node.legs, children=(left, right))

    def _best(self, node: Node) -> Node:
        """``node`` with the contractions next to it in their best order."""
        parts = self._parts(node)
        if len(parts) < 3:
            return node
        key = (node.legs, *sorted((part.legs for part in parts), key=sorted))
        if key in self.done:
            return node
        self.done.add(key)
        leaves = {part: Node(part.legs, k) for k, part in enumerate(parts)}
        known = _cut(node, leaves)
        legs = [tuple(sorted(part.legs)) for part in parts]
        found = _exact(legs, tuple(sorted(node.legs)), self.sizes, known)
        costs = (_total(tree, self.sizes) for tree in (found, known))
        return _grown(found, parts) if next(costs) < next(costs) else node

    def _parts(self, node: Node) -> list[Node]:
        """The leaves of the part of the tree below ``node``, the most expensive opened first."""
        parts = [node]
        while len(parts) < self.part:
            inner = [part for part in parts if part.children]
            if not inner:
                break
            dearest = max(inner, key=lambda part: _own(part, self.sizes))
            parts.remove(dearest)
            parts += dearest.children
        return parts


def _cut(node: Node, leaves: Mapping[Node, Node]) -> Node:
    """``node`` down to ``leaves``."""
    if node in leaves:
        return leaves[node]
    left, right = (_cut(child, leaves) for child in node.children)
    return Node(node.legs, children=(left, right))


def _grown(node: Node, parts: Sequence[Node]) -> Node:
    """``node`` with the trees ``parts`` in place of its operands."""
    if not node.children:
        return parts[node.slot]
    left, right = (_grown(child, parts) for child in node.children)
    return Node(node.legs, children=(left, right))


def _count(node: Node) -> int:
    """The number of operands."""
    return sum(_count(child) for child in node.children) if node.children else 1


def _sensible_path(operands: Sequence[Sequence[Leg]]) -> _Path:
    """Contract each operand with the next one that shares a bond with it, data first."""
    items = [(frozenset(legs) - {BATCH}, BATCH in legs) for legs in operands]
    path = []
    while len(items) > 1:
        first = next((k for k, (_, batched) in enumerate(items) if batched), 0)
        # the newest result last, so that every data operand meets a factor of its own first
        others = [k for k in range(len(items)) if k != first]
        linked = [k for k in others if items[k][0] & items[first][0]] or others
        second = next((k for k in linked if not items[k][1]), linked[0])
        joined = (items[first][0] ^ items[second][0], True)
        path.append((first, second))
        items = [item for k, item in enumerate(items) if k not in (first, second)]
        items.append(joined)
    return tuple(path)


def tree_cost(node: Node, sizes: Mapping[Leg, int], weight: int) -> tuple[int, int]:
    """Constant and slope, over the batch, of a tree's multiply-adds and weighted writes."""
    if not node.children:
        return 0, 0
    const = slope = 0
    for child in node.children:
        below = tree_cost(child, sizes, weight)
        const, slope = const + below[0], slope + below[1]
    touched = node.children[0].legs | node.children[1].legs
    for legs, factor in ((touched, 1), (node.legs, weight)):
        work = factor * prod(sizes[leg] for leg in legs if leg != BATCH)
        if BATCH in legs:
            slope += work
        else:
            const += work
    return const, slope


def _total(node: Node, sizes: Mapping[Leg, int]) -> int:
    """A tree's cost at the batch that ``sizes`` has."""
    const, slope = tree_cost(node, sizes, WRITE_WEIGHT)
    return const + slope * sizes.get(BATCH, 1)


def _own(node: Node, sizes: Mapping[Leg, int]) -> int:
    """The cost of a node's own contraction."""
    touched = node.children[0].legs | node.children[1].legs
    return prod(sizes[leg] for leg in touched) + WRITE_WEIGHT * prod(
        sizes[leg] for leg in node.legs
    )


def _tree_of(legs: Sequence[Sequence[Leg]], path: _Path, output: Sequence[Leg]) -> Node:
    """The binary tree that ``path`` describes over operands with ``legs``."""
    nodes = [Node(frozenset(each), slot) for slot, each in enumerate(legs)]
    for positions in path:
        picked = [nodes[position] for position in positions]
        nodes = [node for k, node in enumerate(nodes) if k not in positions]
        joined = picked[0]
        for number, other in enumerate(picked[1:], start=2):
            wanted = frozenset(output).union(
                *(node.legs for node in nodes), *(node.legs for node in picked[number:])
            )
            joined = Node((joined.legs | other.legs) & wanted, children=(joined, other))
        nodes.append(joined)
    return nodes[0]
