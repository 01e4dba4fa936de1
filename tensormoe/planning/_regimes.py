"""Cheapest path for each batch size, and its program.

A path costs const + slope·batch: multiply-adds plus a weight times the entries written. The
cheapest of several such lines, over the batch, is a concave chain of segments; probing where two
neighbouring segments cross finds every one of them, and the thresholds between them exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from tensormoe.factorizations import BATCH, OUTPUT, Leg, Network
from tensormoe.planning._draft import DENSE, Draft, Part, Routing
from tensormoe.planning._grouping import grouped, saving
from tensormoe.planning._lowering import volume
from tensormoe.planning._path import WRITE_WEIGHT, Node, search_tree, tree_cost
from tensormoe.planning._program import Program
from tensormoe.planning._tree import Builder

MAX_BATCH = 2**31 - 1
"""The batch size at which a plan for prepared weights is sought: work on weights alone is
negligible there."""


@dataclass(frozen=True)
class Regimes:
    """The programs of a layer and the batch sizes each is for.

    Args:
        starts: smallest batch of each regime, ascending; the first is 0.
        programs: one per regime.
    """

    starts: tuple[int, ...]
    programs: tuple[Program, ...]

    def index(self, batch: int) -> int:
        """The regime that ``batch`` falls in."""
        index = len(self.starts) - 1
        # few regimes, and a traced framework follows comparisons of symbolic sizes
        while index and self.starts[index] > batch:
            index -= 1
        return index

    def program(self, batch: int) -> Program:
        """The program for ``batch``: a look-up, no search."""
        return self.programs[self.index(batch)]


@dataclass(frozen=True)
class Trees:
    """Contraction trees of one term of a layer.

    Args:
        main: over the slots of a draft.
        bias: the same for the bias, where it runs through the network on its own.
    """

    main: Node
    bias: Node | None = None


@dataclass(frozen=True)
class Candidate:
    """A way to run a layer: a draft, contraction trees, one pair per term, and their cost line."""

    draft: Draft
    trees: tuple[Trees, ...]
    const: int
    slope: int

    def cost(self, batch: int) -> int:
        """Objective of the planner at one batch size."""
        return self.const + self.slope * batch


@lru_cache(maxsize=1024)
def plan_regimes(network: Network, routing: Routing = DENSE) -> Regimes:
    """Plan a layer for every batch size.

    Args:
        network: of the layer.
        routing: what its data operands look like.

    Returns:
        The cheapest program of every regime, and where the regimes begin.

    Raises:
        PlanError: the routing does not fit the layer.
    """
    return regimes_of(_drafts(network, routing))


def _drafts(network: Network, routing: Routing) -> list[Draft]:
    """All that may be done before the contraction of a layer."""
    drafts = [Draft(network, routing)]
    levels = len(network.expert_legs)
    if routing.top_k is not None:
        drafts.append(Draft(network, routing, spread=True))
    elif not routing.one_expert and levels > 1:
        drafts.append(Draft(network, routing, joined=True))
    if routing.by_expert and levels == 1:
        drafts += [Draft(network, routing, grouped=each) for each in ("rows", "experts")]
        drafts.append(Draft(network, routing, grouped="experts", premixed=True))
    return drafts


def regimes_of(drafts: Sequence[Draft]) -> Regimes:
    """The cheapest programs of drafts that do the same, and where their regimes begin."""
    small, large = best_candidate(drafts, 1), best_candidate(drafts, MAX_BATCH)
    starts, chosen = [0], [small]
    for threshold, candidate in _crossings(drafts, small, large, MAX_BATCH):
        if threshold == 1:
            chosen[0] = candidate
        else:
            starts.append(threshold)
            chosen.append(candidate)
    programs = [build_program(candidate) for candidate in chosen]
    # two bounds on the cost of one program
    new = [k for k, each in enumerate(programs) if not k or each != programs[k - 1]]
    return Regimes(tuple(starts[k] for k in new), tuple(programs[k] for k in new))


def _crossings(
    drafts: Sequence[Draft], small: Candidate, large: Candidate, end: int
) -> list[tuple[int, Candidate]]:
    """Where, between the batches that ``small`` and ``large`` are best for, others take over."""
    if large.slope >= small.slope:
        return []
    # the first whole batch at which the flatter line is no dearer, rounded up
    meet = max(-((small.const - large.const) // (small.slope - large.slope)), 1)
    if meet > end:
        return []
    middle = best_candidate(drafts, meet)
    if middle.cost(meet) >= large.cost(meet):
        return [(meet, large)]
    return _crossings(drafts, small, middle, meet) + _crossings(drafts, middle, large, end)


def best_candidate(drafts: Sequence[Draft], batch: int) -> Candidate:
    """The cheapest candidate at one batch size; of equals, one of the first draft."""
    found = sorted((_candidate(draft, batch) for draft in drafts), key=lambda one: one.cost(batch))
    return next(each for each in found if not each.draft.joined or _is_direct(each))


def _is_direct(candidate: Candidate) -> bool:
    """Whether joined coefficients meet weights as rows of one product, and nothing is copied.

    Otherwise products that are looped over, or copies of whole factors, cost more than is saved.
    """
    program = build_program(candidate)
    experts = candidate.draft.experts

    def looped(rows: tuple[Leg, ...], weights: tuple[Leg, ...]) -> bool:
        joined = BATCH in rows and len(rows) > 2 and experts.issuperset({*rows} - {BATCH})
        return joined and BATCH not in weights

    for step in program.steps:
        if step.kind == "permute":
            return False
        if step.kind == "matmul":
            left, right = step.input_legs
            if looped(left, right) or looped(right, left):
                return False
    return True


def batch_program(network: Network, batch: int, routing: Routing = DENSE) -> Program:
    """The cheapest program for one batch size, sought for it alone; for dense coefficients."""
    return build_program(best_candidate(_drafts(network, routing), batch))


def _candidate(draft: Draft, batch: int) -> Candidate:
    builder, parts = draft.start()
    sizes = {**draft.sizes, BATCH: batch}
    found = [_best_trees(draft, builder, part, sizes) for part in parts]
    terms, consts, slopes = zip(*found, strict=True)
    const, slope = draft.work(builder)
    added = 2 * WRITE_WEIGHT * volume(draft.output, draft.sizes, 1) * (len(found) - 1)
    made = Candidate(draft, terms, const + sum(consts), slope + sum(slopes) + added)
    if not draft.grouped:
        return made
    whole = draft.grouped == "experts"
    more, less = saving(build_program(made), sizes, WRITE_WEIGHT, whole=whole)
    return replace(made, const=made.const + more, slope=made.slope + less)


def _best_trees(
    draft: Draft, builder: Builder, part: Part, sizes: Mapping[Leg, int]
) -> tuple[Trees, int, int]:
    """The cheapest trees of one term, with constant and slope of their cost."""
    slots, carrier, bias, output = part.slots, part.carrier, part.bias, draft.output
    tree = _search(builder, slots, output, sizes)
    if bias is None or _contracts(tree, draft.x, carrier):
        return Trees(tree), *tree_cost(tree, sizes, WRITE_WEIGHT)
    # the path does not contract the input with its own factor first: either let it, and add
    # the bias there, or run the bias through the network on its own
    rest = [slot for slot in slots if slot not in (draft.x, carrier)]
    legs = frozenset((*draft.rows, *builder.legs[bias]))
    inner = Node(legs, children=(_leaf(builder, draft.x), _leaf(builder, carrier)))
    joined = search_tree([*(builder.legs[slot] for slot in rest), tuple(legs)], output, sizes)
    fused = _renamed(joined, [*rest, inner], builder)
    together = Trees(fused), *tree_cost(fused, sizes, WRITE_WEIGHT)
    alone = _search(builder, [*rest, bias], (BATCH, OUTPUT), sizes)
    costs = (tree_cost(each, sizes, WRITE_WEIGHT) for each in (tree, alone))
    const, slope = (sum(pair) for pair in zip(*costs, strict=True))
    apart = Trees(tree, alone), const, slope + 2 * WRITE_WEIGHT * volume(output, draft.sizes, 1)
    return min(together, apart, key=lambda found: found[1] + found[2] * sizes[BATCH])


def _search(
    builder: Builder, slots: Sequence[int], output: tuple[Leg, ...], sizes: Mapping[Leg, int]
) -> Node:
    tree = search_tree([builder.legs[slot] for slot in slots], output, sizes)
    return _renamed(tree, slots, builder)


def _leaf(builder: Builder, slot: int | None) -> Node:
    assert slot is not None
    return Node(frozenset(builder.legs[slot]), slot)


def _renamed(node: Node, slots: Sequence[int | Node], builder: Builder) -> Node:
    """``node`` over positions, as the same tree over slots (or whole nodes)."""
    if not node.children:
        found = slots[node.slot]
        return found if isinstance(found, Node) else _leaf(builder, found)
    left, right = (_renamed(child, slots, builder) for child in node.children)
    return Node(node.legs, children=(left, right))


def _contracts(tree: Node, x: int | None, carrier: int) -> bool:
    """Whether ``tree`` contracts the input with its own factor, and nothing else, first."""
    if not tree.children:
        return False
    if {child.slot for child in tree.children if not child.children} == {x, carrier}:
        return True
    return any(_contracts(child, x, carrier) for child in tree.children)


def build_program(candidate: Candidate) -> Program:
    """Lower a candidate."""
    draft = candidate.draft
    builder, parts = draft.start()
    results: list[int] = []
    for part, trees in zip(parts, candidate.trees, strict=True):
        tree = trees.main
        if part.bias is not None and trees.bias is None:
            assert draft.x is not None
            legs = frozenset((*draft.rows, *builder.legs[part.bias]))
            slot = builder.plus(builder.contract(draft.x, part.carrier, legs), part.bias)
            tree = _replaced(tree, {draft.x, part.carrier}, Node(legs, slot))
        results.append(builder.emit(tree, draft.output))
        if trees.bias is not None:
            results.append(builder.emit(trees.bias, (BATCH, OUTPUT)))
        # added at once, so that no more than two results are held
        while len(results) > 1:
            results[:2] = [builder.plus(results[0], results[1])]
    program = builder.finish(results[0])
    return grouped(program) if draft.grouped else program


def _replaced(node: Node, pair: set[int], leaf: Node) -> Node:
    """``node`` with the contraction of two operands replaced by its result."""
    if not node.children:
        return node
    if {child.slot for child in node.children if not child.children} == pair:
        return leaf
    left, right = (_replaced(child, pair, leaf) for child in node.children)
    return Node(node.legs, children=(left, right))
