"""The rank that a budget buys, and the front of expert rank against expert span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tensormoe._html import spec_html
from tensormoe._spec import LayerSpec
from tensormoe._validation import choice
from tensormoe.errors import BudgetError
from tensormoe.factorizations import Factorization
from tensormoe.gates import Gate
from tensormoe.planning._gate_cost import gate_parameters
from tensormoe.selection._budget import Budget
from tensormoe.selection._family import Choice, Family
from tensormoe.selection._infeasible import infeasible
from tensormoe.selection._search import Figures, Measure, best, front
from tensormoe.selection._spending import Spending, counted_gate, spending_of_layer
from tensormoe.selection._useful import beyond_use, with_bonds, without_waste

_MEASURES: dict[str, Measure] = {
    "capacity": lambda rank, span: (rank * span, rank),
    "expert_rank": lambda rank, span: (rank, span),
    "expert_span": lambda rank, span: (span, rank),
}

OBJECTIVES = tuple(_MEASURES)
"""Objectives of rank selection."""


@dataclass(frozen=True)
class RankChoice:
    """A rank with what it buys.

    Args:
        factorization: the factorization with its rank.
        rank: bond sizes, as the factorization takes them.
        spec: the layer.
        expert_rank: the generic rank of one expert's matrix.
        expert_span: the dimension of the space that the experts span.
        parameters: stored entries of the layer, its gate's included.
        gate_parameters: those of its gate.
    """

    factorization: Factorization
    rank: int | tuple[int, ...] | None
    spec: LayerSpec = field(repr=False)
    expert_rank: int
    expert_span: int
    parameters: int
    gate_parameters: int = 0

    def _repr_html_(self) -> str:
        return spec_html(self.spec, {"gate": f"{self.gate_parameters:,} parameters"})


def select_rank(
    factorization: str | type[Factorization],
    in_features: int,
    out_features: int,
    experts: int | tuple[int, ...],
    *,
    budget: Budget | int | str | None = None,
    bias: bool = True,
    objective: str = "capacity",
    bonds: Sequence[int | str | None] | None = None,
    gate: Gate | str | Literal[False] | None = "entmax",
    indexed_input: bool = False,
) -> int | tuple[int, ...] | None:
    """The rank with the most capacity that a budget allows: the one that layers choose.

    The budget covers the layer with its gate; ``Budget(…, gate=False)`` leaves the gate out. It is
    never exceeded, and no other rank of the same family within it has a higher objective. For
    parameters and in families of up to 256 ranks there are no exceptions. In larger families, a
    rank that exceeds a limit on FLOPs, memory or time by 0.5 % rules out all larger ones: where one
    of them runs by another path that costs so much less, it can be missed. The family is one size
    for every symbol of the factorization's pattern: the bonds of a tensor ring next to an expert
    mode are equally large and the one between input and output is free. Equal objectives are told
    apart by the other figure, then by smaller bonds around the expert modes, then by the larger
    bond between input and output.

    Bonds stop where no tensor of the layer's shape could use more, whatever is left of the budget;
    where one of several equal ones stops, the others share what it leaves. Where a budget limits
    memory alone, they stop where a larger one would add nothing to either figure.

    Args:
        factorization: "cp", "tensor_ring", "tensor_train", "tucker", "low_rank", "shared_basis",
            "base_delta", "shared_delta", "hadamard", "dense", another name that is registered, or a
            class.
        in_features: I, the size of an input.
        out_features: O, the size of an output.
        experts: N, or one size per level of hierarchy.
        budget: upper limits; an integer counts parameters, "linear" stands for those of a linear
            layer of the same sizes. None means these too, with the gate on top, so that the
            gate does not limit the number of experts.
        bias: whether every expert has a bias.
        objective: "capacity" is expert rank × expert span. Either figure alone lets the other
            collapse: the tensor ring of the highest expert rank has r₁ = r₂ = 1 and experts that
            are multiples of one another. "expert_rank" and "expert_span" are there for those who
            fix the other one by ``bonds``.
        bonds: one entry per bond: a size that is fixed, or None for bonds that vary together. Names
            instead of None make several such groups, two at most.
        gate: the gate that the layer will have, by default that of layers; None or False for a
            layer that is given its coefficients.
        indexed_input: whether inputs are integer ids, as those of an embedding.

    Returns:
        The rank as the factorization takes it; None for one that has no rank, if it fits.

    Raises:
        BudgetError: nothing fits, and the message names the smallest budget that something fits,
            which the error has as ``needed``; or the budget or the objective makes no sense.
        SpecError: sizes that make no layer, or an unknown factorization.
        RankError: ``bonds`` do not fit the factorization.

    >>> select_rank("cp", 768, 768, 512, budget="linear")
    96
    >>> select_rank("cp", 768, 768, 512)
    288
    >>> select_rank("tensor_ring", 768, 768, (16, 32), budget="linear", bonds=(4, 4, 4, None))
    (4, 4, 4, 89)
    >>> select_rank("cp", 64, 64, 512, budget="linear")
    Traceback (most recent call last):
        ...
    tensormoe.errors.BudgetError: parameters must be at least 33409 for cp, 512 experts of \
64 → 64 with a gate; got 4160. Raise the budget; or split the experts into levels, \
experts=(16, 32) instead of 512 takes 3249; or leave the gate out, Budget(…, gate=False).
    """
    measure = measure_of(objective)
    family = Family(factorization, in_features, out_features, experts, bias, bonds)
    built = counted_gate(gate)
    limits, counted = _parsed(family, budget, built)
    found = best_spec(family, spending_of_layer(limits, counted, indexed_input), measure)
    if found is None:
        raise infeasible(family, limits, counted, indexed_input)
    rank: int | tuple[int, ...] | None = found.factorization.rank
    return rank


def rank_front(
    factorization: str | type[Factorization],
    in_features: int,
    out_features: int,
    experts: int | tuple[int, ...],
    *,
    budget: Budget | int | str | None = None,
    bias: bool = True,
    bonds: Sequence[int | str | None] | None = None,
    gate: Gate | str | Literal[False] | None = "entmax",
) -> tuple[RankChoice, ...]:
    """The ranks within a budget that no other one beats in both figures.

    Args:
        factorization: as for :func:`select_rank`, like all that follows.
        in_features: I, the size of an input.
        out_features: O, the size of an output.
        experts: N, or one size per level of hierarchy.
        budget: upper limits, which cover the gate.
        bias: whether every expert has a bias.
        bonds: sizes that are fixed, and symbols.
        gate: the gate that the layer will have.

    Returns:
        One choice for every pair of figures on the front, by rising expert rank.

    Raises:
        BudgetError: nothing fits.
        SpecError: sizes that make no layer, or an unknown factorization.
        RankError: ``bonds`` do not fit the factorization.

    >>> front = rank_front("tensor_ring", 768, 768, 512)
    >>> [(each.rank, each.expert_rank, each.expert_span) for each in front[-2:]]
    [((2, 2, 191), 382, 4), ((1, 1, 383), 383, 1)]
    """
    family = Family(factorization, in_features, out_features, experts, bias, bonds)
    built = counted_gate(gate)
    limits, counted = _parsed(family, budget, built)
    spending = spending_of_layer(limits, counted)
    found: list[RankChoice] = []
    families = [family]
    seen = {tuple(family.bonds)}
    for rest in families:
        for sizes in front(rest, spending):
            found.append(_choice(rest, spending, sizes, built))
            # what bonds that are as large as useful leave of the budget is for the others
            capped = without_waste(family, rest, rest.spec(sizes))
            if capped is not None and capped.symbols and tuple(capped.bonds) not in seen:
                seen.add(tuple(capped.bonds))
                families.append(capped)
    if not found:
        raise infeasible(family, limits, counted)
    return _undominated(found)


def _undominated(choices: Sequence[RankChoice]) -> tuple[RankChoice, ...]:
    """The choices that no other beats in both figures, of equals the one of fewer parameters."""
    kept: list[RankChoice] = []
    order = sorted(choices, key=lambda one: (-one.expert_rank, -one.expert_span, one.parameters))
    for each in order:
        if not kept or each.expert_span > kept[-1].expert_span:
            kept.append(each)
    return tuple(reversed(kept))


def measure_of(objective: str) -> Measure:
    """The figures that are compared, by the name of an objective.

    Raises:
        BudgetError: an unknown one.
    """
    return _MEASURES[choice(objective, OBJECTIVES, "objective", BudgetError)]


def best_spec(family: Family, spending: Spending, measure: Measure) -> LayerSpec | None:
    """The best layer within a budget without bonds larger than useful; None if none fits.

    Args:
        family: the layers to choose from.
        spending: the budget, and what counts against it.
        measure: what to maximize, from expert rank and expert span.
    """
    found: LayerSpec | None = None
    rest: Family | None = family
    while rest is not None:
        sizes = best(rest, spending, measure)
        spec = None if sizes is None else rest.spec(sizes)
        if spec is None or (found and _reached(measure, spec) < _reached(measure, found)):
            # at smaller bonds a path can cost more of what is limited
            break
        found = spec
        # what these bonds leave of the budget is for the others
        rest = without_waste(family, rest, spec)
    return found


def _reached(measure: Measure, spec: LayerSpec) -> Figures:
    return measure(spec.expert_rank, spec.expert_span)


def _parsed(
    family: Family, budget: Budget | int | str | None, gate: Gate | None
) -> tuple[Budget, Gate | None]:
    """The limits, and the gate that counts against them."""
    sizes = family.sizes
    limits = Budget.parse(budget, sizes.in_features, sizes.out_features, sizes.bias)
    return limits, gate if limits.gate else None


def _choice(family: Family, spending: Spending, sizes: Choice, gate: Gate | None) -> RankChoice:
    spec = family.spec(sizes)
    while over := beyond_use(family, spec):
        smaller = with_bonds(spec, over)
        if not spending.allows(smaller):
            break
        spec = smaller
    paid = 0 if gate is None else gate_parameters(gate, spec.in_features, spec.experts)
    return RankChoice(
        spec.factorization,
        spec.factorization.rank,
        spec,
        *family.figures(sizes),
        spec.num_parameters + paid,
        paid,
    )
