"""Which path is cheapest at which batch sizes, and its program.

A path costs const + slope·batch: multiply-adds plus a weight times the entries written. The
cheapest of several such lines, over the batch, is a concave chain of segments; probing where two
neighbouring segments cross finds every one of them, and the thresholds between them exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tensormoe._spec import LayerSpec
from tensormoe._validation import positive_int
from tensormoe.errors import PlanError
from tensormoe.factorizations import BATCH, INPUT, OUTPUT, Leg, expert_leg
from tensormoe.planning._program import Operand, Program
from tensormoe.planning._tree import Builder, Node, contract_path, tree_cost, tree_of

__all__ = [
    "DENSE",
    "MAX_BATCH",
    "WRITE_WEIGHT",
    "Candidate",
    "Draft",
    "Regimes",
    "Routing",
    "best_candidate",
    "build_program",
    "contraction",
    "plan_regimes",
    "weight_program",
]

WRITE_WEIGHT = 32
"""Multiply-adds that writing one entry is worth when paths are compared: the ratio of arithmetic
to memory speed on current CPUs and GPUs is a few tens of operations an entry."""

MAX_BATCH = 2**31 - 1
"""The batch size at which a plan for prepared weights is sought: work on weights alone is
negligible there."""


@dataclass(frozen=True)
class Routing:
    """What the data operands of a layer look like to the planner.

    Args:
        top_k: experts kept a level when coefficients come as values and indices (…, k), so that
            their factors are gathered; None for dense coefficients (…, N).
        indexed_input: whether inputs are integer ids, one-hot rows that were never built.
    """

    top_k: int | None = None
    indexed_input: bool = False

    def __post_init__(self) -> None:
        if self.top_k is not None:
            object.__setattr__(self, "top_k", positive_int(self.top_k, "top_k", PlanError))


DENSE = Routing()
"""Dense coefficients and dense inputs."""


@dataclass(frozen=True)
class Regimes:
    """The programs of a layer and the batch sizes each is for.

    Args:
        starts: smallest batch of each regime, ascending; the first is 0.
        programs: one a regime.
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
class Candidate:
    """A way to run a layer: contraction trees over the slots of a draft, and their cost line."""

    main: Node
    bias: Node | None
    const: int
    slope: int

    def cost(self, batch: int) -> int:
        """What the planner minimizes, at one batch size."""
        return self.const + self.slope * batch


class Draft:
    """The part that every plan of a layer shares: operands, and gathers by index."""

    def __init__(self, spec: LayerSpec, routing: Routing) -> None:
        network = spec.network
        self.spec = spec
        self.sizes: dict[Leg, int] = dict(network.sizes)
        operands: list[Operand] = []
        self.indices: dict[Leg, int] = {}
        self.picks: dict[Leg, Leg] = {}
        self.dense: list[int] = []
        for level, leg in enumerate(network.expert_legs):
            kept = leg
            if routing.top_k is not None:
                if routing.top_k > self.sizes[leg]:
                    raise PlanError(
                        f"top_k must be at most the experts of each level; got {routing.top_k} "
                        f"for level {level} of {self.sizes[leg]}. Lower k."
                    )
                kept = f"k{level}"
                self.sizes[kept] = routing.top_k
                self.picks[leg] = kept
                self.indices[leg] = len(operands)
                operands.append(Operand(f"indices_{level}", (BATCH, kept), "indices"))
            self.dense.append(len(operands))
            operands.append(Operand(f"coefficients_{level}", (BATCH, kept), "data"))
        self.x: int | None = None
        if routing.indexed_input:
            self.indices[INPUT] = len(operands)
            operands.append(Operand("ids", (BATCH,), "indices"))
        else:
            self.x = len(operands)
            self.dense.append(self.x)
            operands.append(Operand("x", (BATCH, INPUT), "data"))
        self.factors = {
            factor.name: len(operands) + k for k, factor in enumerate(network.all_factors)
        }
        operands += [Operand(each.name, each.legs, "factor") for each in network.all_factors]
        self.operands = tuple(operands)
        self.carrier = network.input_factor.name

    def start(self) -> tuple[Builder, list[int], int, int | None]:
        """A builder after the gathers: slots to contract, the input carrier's and the bias's."""
        builder = Builder(self.operands, self.sizes)
        slots = {name: self._gather(builder, slot) for name, slot in self.factors.items()}
        bias = slots.pop("bias", None)
        if bias is not None and self.x is None:
            # an indexed input has picked its rows already: the bias is added right there
            slots[self.carrier] = builder.plus(slots[self.carrier], bias)
            bias = None
        return builder, [*self.dense, *slots.values()], slots[self.carrier], bias

    def _gather(self, builder: Builder, slot: int) -> int:
        """Pick rows of a factor for every mode that comes by index."""
        legs = builder.legs[slot]
        places = [place for place, leg in enumerate(legs) if leg in self.indices]
        if not places:
            return slot
        first, last = places[0], places[-1]
        if last - first + 1 != len(places):
            raise PlanError(
                f"indexed modes must lie side by side in a factor; got {legs} with "
                f"{[legs[place] for place in places]}. Use dense coefficients or inputs."
            )
        picked = tuple(self.picks[legs[place]] for place in places if legs[place] in self.picks)
        result = (*legs[:first], BATCH, *picked, *legs[last + 1 :])
        inputs = (slot, *(self.indices[legs[place]] for place in places))
        return builder.add("gather", inputs, result, axis=first)


@lru_cache(maxsize=1024)
def plan_regimes(spec: LayerSpec, routing: Routing = DENSE) -> Regimes:
    """Plan a layer for every batch size.

    Args:
        spec: the layer.
        routing: what its data operands look like.

    Returns:
        The cheapest program of every regime, and where the regimes begin.

    Raises:
        PlanError: the routing does not fit the layer.
    """
    draft = Draft(spec, routing)
    small, large = best_candidate(draft, 1), best_candidate(draft, MAX_BATCH)
    starts, chosen = [0], [small]
    for threshold, candidate in _crossings(draft, small, large, MAX_BATCH):
        if threshold == 1:
            chosen[0] = candidate
        else:
            starts.append(threshold)
            chosen.append(candidate)
    return Regimes(tuple(starts), tuple(build_program(draft, candidate) for candidate in chosen))


def _crossings(
    draft: Draft, small: Candidate, large: Candidate, end: int
) -> list[tuple[int, Candidate]]:
    """Where, between the batches that ``small`` and ``large`` are best for, others take over."""
    if large.slope >= small.slope:
        return []
    # the first whole batch at which the flatter line is no dearer, rounded up
    meet = max(-((small.const - large.const) // (small.slope - large.slope)), 1)
    if meet > end:
        return []
    middle = best_candidate(draft, meet)
    if middle.cost(meet) >= large.cost(meet):
        return [(meet, large)]
    return _crossings(draft, small, middle, meet) + _crossings(draft, middle, large, end)


def best_candidate(draft: Draft, batch: int) -> Candidate:
    """The cheapest candidate at one batch size."""
    builder, slots, carrier, bias = draft.start()
    sizes = {**draft.sizes, BATCH: batch}
    output = (BATCH, OUTPUT)
    tree = _search(builder, slots, output, sizes)
    if bias is None:
        return Candidate(tree, None, *tree_cost(tree, sizes, WRITE_WEIGHT))
    if _contracts(tree, draft.x, carrier):
        return Candidate(tree, None, *tree_cost(tree, sizes, WRITE_WEIGHT))
    # the path does not contract the input with its own factor first: either let it, and add
    # the bias there, or run the bias through the network on its own
    rest = [slot for slot in slots if slot not in (draft.x, carrier)]
    legs = frozenset((BATCH, *builder.legs[bias]))
    inner = Node(legs, children=(_leaf(builder, draft.x), _leaf(builder, carrier)))
    path = contract_path(
        [*(builder.legs[slot] for slot in rest), tuple(legs)], output, sizes, WRITE_WEIGHT
    )
    joined = tree_of([*(builder.legs[slot] for slot in rest), tuple(legs)], path, output)
    fused = _renamed(joined, [*rest, inner], builder)
    together = Candidate(fused, None, *tree_cost(fused, sizes, WRITE_WEIGHT))
    alone = _search(builder, [*rest, bias], output, sizes)
    costs = (tree_cost(each, sizes, WRITE_WEIGHT) for each in (tree, alone))
    const, slope = (sum(pair) for pair in zip(*costs, strict=True))
    apart = Candidate(tree, alone, const, slope + 2 * WRITE_WEIGHT * sizes[OUTPUT])
    return min(together, apart, key=lambda candidate: candidate.cost(batch))


def _search(
    builder: Builder, slots: Sequence[int], output: tuple[Leg, ...], sizes: Mapping[Leg, int]
) -> Node:
    legs = [builder.legs[slot] for slot in slots]
    path = contract_path(legs, output, sizes, WRITE_WEIGHT)
    return _renamed(tree_of(legs, path, output), slots, builder)


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


def build_program(draft: Draft, candidate: Candidate) -> Program:
    """Lower a candidate."""
    builder, _, carrier, bias = draft.start()
    output = (BATCH, OUTPUT)
    tree = candidate.main
    if bias is not None and candidate.bias is None:
        assert draft.x is not None
        legs = frozenset((BATCH, *builder.legs[bias]))
        slot = builder.plus(builder.contract(draft.x, carrier, legs), bias)
        tree = _replaced(tree, {draft.x, carrier}, Node(legs, slot))
    result = builder.emit(tree, output)
    if candidate.bias is not None:
        result = builder.plus(result, builder.emit(candidate.bias, output))
    return builder.finish(result)


def _replaced(node: Node, pair: set[int], leaf: Node) -> Node:
    """``node`` with the contraction of two operands replaced by its result."""
    if not node.children:
        return node
    if {child.slot for child in node.children if not child.children} == pair:
        return leaf
    left, right = (_replaced(child, pair, leaf) for child in node.children)
    return Node(node.legs, children=(left, right))


@lru_cache(maxsize=256)
def weight_program(spec: LayerSpec, *, single: bool, bias: bool) -> Program:
    """The program that builds weights explicitly.

    Args:
        spec: the layer.
        single: one expert, from factors whose expert modes were indexed away; else all of 𝒲.
        bias: the experts' biases (experts…, out) instead of their matrices (experts…, in, out).
    """
    network = spec.network
    experts = () if single else network.expert_legs
    dropped = {expert_leg(level) for level in range(spec.levels)} - set(experts)
    factors = list(network.factors)
    if bias:
        assert network.bias is not None
        factors = [network.bias if f is network.input_factor else f for f in factors]
    operands = tuple(
        Operand(f.name, tuple(leg for leg in f.legs if leg not in dropped), "factor")
        for f in factors
    )
    output = (*experts, *(() if bias else (INPUT,)), OUTPUT)
    return contraction(operands, output, network.sizes)


def contraction(
    operands: tuple[Operand, ...], output: tuple[Leg, ...], sizes: Mapping[Leg, int]
) -> Program:
    """The program that contracts arrays without a batch into the legs ``output``, in that order.

    Args:
        operands: what it takes.
        output: the legs to keep.
        sizes: the size of every leg.
    """
    builder = Builder(operands, sizes)
    path = contract_path([each.legs for each in operands], output, sizes, WRITE_WEIGHT)
    return builder.finish(builder.network(range(len(operands)), path, output))
