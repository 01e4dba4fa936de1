"""Work before a contraction: the operands of a layer, and what is done with indices.

Coefficients that come by index name a few experts per row. Either the factors' rows of these
experts are gathered, or the values are spread over all experts, to be contracted like dense
coefficients. A gather copies the experts of every row, which for factors as large as matrices is
the most expensive step of all; coefficients that are spread cost products with every expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tensormoe._validation import positive_int
from tensormoe.errors import PlanError
from tensormoe.factorizations import BATCH, INPUT, OUTPUT, Factor, Leg, Network, Term
from tensormoe.planning._grouping import COUNTS
from tensormoe.planning._lowering import volume
from tensormoe.planning._path import WRITE_WEIGHT
from tensormoe.planning._program import Operand
from tensormoe.planning._tree import Builder


@dataclass(frozen=True)
class Routing:
    """Form of the data operands of a layer.

    Args:
        top_k: experts kept per level when coefficients come as values and indices (…, k): either
            their factors are gathered, or the values are spread over all experts, whichever is
            cheaper; None for dense coefficients (…, N).
        indexed_input: whether inputs are integer ids, one-hot rows that were never built.
        one_expert: whether every row has one expert per level, with coefficient 1, given by index.
        by_expert: whether such rows are sorted by expert, of one level: experts' matrices are then
            gathered for every row, or multiplied once with all rows of an expert, whichever is
            cheaper.
    """

    top_k: int | None = None
    indexed_input: bool = False
    one_expert: bool = False
    by_expert: bool = False

    def __post_init__(self) -> None:
        if self.top_k is not None:
            object.__setattr__(self, "top_k", positive_int(self.top_k, "top_k", PlanError))
        if (self.one_expert and self.top_k is not None) or (self.by_expert and not self.one_expert):
            raise PlanError(
                "rows have either top_k experts, or one_expert, which may be sorted (by_expert); "
                f"got {self}."
            )


DENSE = Routing()
"""Dense coefficients and dense inputs."""


@dataclass(frozen=True)
class Part:
    """One term of a layer after the work on indices.

    Args:
        slots: what is contracted, data first.
        carrier: the slot of the input mode's factor.
        bias: the slot of the bias, if it is still to be added.
    """

    slots: tuple[int, ...]
    carrier: int
    bias: int | None


class Draft:
    """The part that many plans of a layer share: operands, and what is done with indices.

    Args:
        network: of the layer.
        routing: what its data operands look like.
        spread: whether coefficients that come by index are spread over all experts. Otherwise
            the rows of every factor that they name are gathered.
        grouped: whether gathers of large matrices become products grouped by expert, and what their
            cost counts the matrices by: "rows", one for each row, or "experts", each of them once.
        premixed: whether a table of experts is contracted with a factor beside it first, for all
            experts, where that takes no more memory than the layer.
        joined: whether the coefficients of all levels are multiplied out first, which makes one
            level of them.

    Attributes:
        experts: legs of the levels of experts.
        rows: legs of the rows of an input.
        output: legs of the result, in its order.
    """

    rows: tuple[Leg, ...] = (BATCH,)
    output: tuple[Leg, ...] = (BATCH, OUTPUT)
    grouped: Literal["rows", "experts"] | None = None
    premixed = False
    joined = False

    def __init__(
        self,
        network: Network,
        routing: Routing,
        *,
        spread: bool = False,
        grouped: Literal["rows", "experts"] | None = None,
        premixed: bool = False,
        joined: bool = False,
    ) -> None:
        self.grouped = grouped
        self.premixed = premixed
        self.joined = joined
        self.most = network.num_parameters
        self.experts = frozenset(network.expert_legs)
        self.terms = network.terms
        self.sizes: dict[Leg, int] = dict(network.sizes)
        operands: list[Operand] = []
        self.indices: dict[Leg, int] = {}
        self.picks: dict[Leg, Leg] = {}
        self.spread: dict[int, tuple[int, Leg]] = {}
        self.data: list[int] = []
        for level, leg in enumerate(network.expert_legs):
            if routing.one_expert:
                self.indices[leg] = len(operands)
                operands.append(Operand(f"indices_{level}", (BATCH,), "indices"))
                continue
            kept = leg
            if routing.top_k is not None:
                if routing.top_k > self.sizes[leg]:
                    raise PlanError(
                        f"top_k must be at most the experts of each level; got {routing.top_k} "
                        f"for level {level} of {self.sizes[leg]}. Lower k."
                    )
                kept = f"k{level}"
                self.sizes[kept] = routing.top_k
                if spread:
                    self.sizes[_row(leg)] = self.sizes[leg]
                    self.spread[len(operands) + 1] = len(operands), leg
                else:
                    self.picks[leg] = kept
                    self.indices[leg] = len(operands)
                operands.append(Operand(f"indices_{level}", (BATCH, kept), "indices"))
            self.data.append(len(operands))
            operands.append(Operand(f"coefficients_{level}", (BATCH, kept), "data"))
        if grouped:
            operands.append(Operand(COUNTS, network.expert_legs, "indices"))
        self.x: int | None = None
        if routing.indexed_input:
            self.indices[INPUT] = len(operands)
            operands.append(Operand("ids", (BATCH,), "indices"))
        else:
            self.x = len(operands)
            self.data.append(self.x)
            operands.append(Operand("x", (BATCH, INPUT), "data"))
        self.factors = {
            factor.name: len(operands) + k for k, factor in enumerate(network.all_factors)
        }
        operands += [Operand(each.name, each.legs, "factor") for each in network.all_factors]
        self.operands = tuple(operands)

    @property
    def lowered_sizes(self) -> Mapping[Leg, int]:
        """The sizes that steps are made for."""
        return self.sizes

    def start(self) -> tuple[Builder, list[Part]]:
        """A builder after the work on indices, and the terms to contract."""
        builder = Builder(self.operands, self.lowered_sizes)
        data = [self._dense(builder, slot) for slot in self.data]
        stored = dict(self.factors)
        for table, other in self._premixed():
            stored[other.name] = self._mixed(builder, table, other)
            del stored[table.name]
        slots = {name: self._gather(builder, slot) for name, slot in stored.items()}
        parts = [self._part(builder, term, data, slots) for term in self.terms]
        return builder, parts

    def _premixed(self) -> list[tuple[Factor, Factor]]:
        """Tables of experts, each with the factor that it is contracted with for all experts."""
        if not self.premixed or self.x is None:
            return []
        found = []
        for term in self.terms:
            tables = [
                each
                for each in term.factors
                if self.experts.intersection(each.legs) and not {INPUT, OUTPUT} & {*each.legs}
            ]
            # a bias takes the place of the input's factor alone
            fixed = None if term.bias is None else term.input_factor
            for table in tables[:1]:
                sizes = {
                    each: volume(self._mixed_legs(table, each), self.sizes, 1)
                    for each in term.factors
                    if each not in (table, fixed)
                    and {*table.legs} & {*each.legs}
                    and not self.experts.intersection(each.legs)
                }
                best = min(sizes, key=lambda each: sizes[each], default=None)
                if best is not None and sizes[best] <= self.most:
                    found.append((table, best))
        return found

    def _mixed_legs(self, table: Factor, other: Factor) -> tuple[Leg, ...]:
        """Legs of the contraction of two factors of a term."""
        term = next(each for each in self.terms if table in each.factors)
        around = {INPUT, OUTPUT, *self.experts}
        for each in term.factors:
            around.update(each.legs if each not in (table, other) else ())
        both = dict.fromkeys((*table.legs, *other.legs))
        return tuple(leg for leg in both if leg in around)

    def _mixed(self, builder: Builder, table: Factor, other: Factor) -> int:
        slots = self.factors[table.name], self.factors[other.name]
        return builder.contract(*slots, frozenset(self._mixed_legs(table, other)))

    def _part(
        self, builder: Builder, term: Term, dense: Sequence[int], slots: Mapping[str, int]
    ) -> Part:
        # tables that were contracted with another factor have no slot any more
        names = (factor.name for factor in term.factors)
        listed = {name: slots[name] for name in names if name in slots}
        bias = None if term.bias is None else slots[term.bias.name]
        name = term.input_factor.name
        if bias is not None and self.x is None:
            # an indexed input has picked its rows already: the bias is added right there
            listed[name] = builder.plus(listed[name], bias)
            bias = None
        legs = {*self.rows, *(leg for slot in listed.values() for leg in builder.legs[slot])}
        # what all experts have in common is mixed by the sum of their coefficients
        data = [builder.reduce(slot, frozenset(legs)) for slot in dense]
        if self.joined:
            data = self._joined(builder, data)
        return Part((*data, *listed.values()), listed[name], bias)

    def _joined(self, builder: Builder, data: Sequence[int]) -> list[int]:
        """``data`` with one operand in place of the coefficients of several levels."""
        inputs = [slot for slot in data if slot == self.x]
        first, *others = (slot for slot in data if slot != self.x)
        for slot in others:
            legs = dict.fromkeys((*builder.legs[first], *builder.legs[slot]))
            first = builder.contract(first, slot, frozenset(legs), tuple(legs))
        return [first, *inputs]

    def _dense(self, builder: Builder, slot: int) -> int:
        """Coefficients of all experts, where those of a few are to be spread."""
        if slot not in self.spread:
            return slot
        indices, leg = self.spread[slot]
        # rows of an identity matrix: an index out of range gives what it gives in any gather, and
        # the backward pass is a product as well
        like = next(slot for slot in self.factors.values() if leg in builder.legs[slot])
        eye = builder.add("eye", (like,), (_row(leg), leg))
        picked = (*builder.legs[indices], leg)
        one_hot = builder.add("gather", (eye, indices), picked, axis=0)
        return builder.contract(slot, one_hot, frozenset((BATCH, leg)), (BATCH, leg))

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

    def work(self, builder: Builder) -> tuple[int, int]:
        """Constant and slope, over the batch, of what ``builder`` has done before a contraction.

        Writes and multiply-adds as in a contraction, and what is read of the experts: a gather
        reads those that a row names, for every row; coefficients that are spread have all of them
        read, once.
        """
        const = slope = 0
        for step in builder.steps:
            written = volume(step.legs, self.sizes, 1)
            work = WRITE_WEIGHT * written * (2 if step.kind == "gather" else 1)
            if step.kind in ("linear", "matmul", "multiply"):
                work += volume(tuple({*step.input_legs[0], *step.input_legs[1]}), self.sizes, 1)
            if step.batched:
                slope += work
            else:
                const += work
        spread = {leg for _, leg in self.spread.values()}
        for slot in self.factors.values():
            if spread.intersection(self.operands[slot].legs):
                const += WRITE_WEIGHT * volume(self.operands[slot].legs, self.sizes, 1)
        return const, slope


def _row(leg: Leg) -> Leg:
    """The other leg of the identity matrix over an expert mode."""
    return f"e{leg}"
