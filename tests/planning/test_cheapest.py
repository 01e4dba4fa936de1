"""No tree of contractions is cheaper than the planned one, by a search through all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tensormoe import BaseDelta, Dense, LayerSpec, SharedBasis, SharedDelta, TensorRing
from tensormoe.planning import Program
from tensormoe.testing import specs
from tests.planning._work import BATCH, WEIGHT, contraction_work, program_work


def least_work(
    operands: Sequence[frozenset[str]],
    output: frozenset[str],
    sizes: dict,
    together: frozenset[int] = frozenset(),
) -> int:
    """The least work of all binary trees over the operands.

    Outer products are left out, as is usual: two parts are contracted only if they share a leg
    that is not the output's, or if nothing else of the network is linked to either.

    Args:
        operands: legs of each.
        output: legs to keep.
        sizes: of every leg.
        together: two operands that the tree must contract with one another first.
    """
    everything = frozenset(range(len(operands)))

    def legs(group: frozenset[int]) -> frozenset[str]:
        inside = frozenset().union(*(operands[k] for k in group))
        outside = output.union(*(operands[k] for k in everything - group))
        return inside & outside

    def linked(group: frozenset[int]) -> bool:
        inside = frozenset().union(*(operands[k] for k in group)) - output
        return any(inside & operands[k] for k in everything - group)

    @cache
    def best(group: frozenset[int]) -> int:
        if len(group) == 1:
            return 0
        first, *others = sorted(group)
        found = []
        for count in range(len(others)):
            for chosen in combinations(others, count):
                left = frozenset((first, *chosen))
                right = group - left
                if any(len(side & together) == 1 and len(side) > 1 for side in (left, right)):
                    continue
                if any(len(side & together) == 1 for side in (left, right)) and group != together:
                    continue
                sides = [
                    legs(side) if len(side) > 1 else operands[min(side)] for side in (left, right)
                ]
                if not (sides[0] & sides[1]) - output and (linked(left) or linked(right)):
                    continue
                work = contraction_work(sides, legs(group), sizes)
                found.append(work + best(left) + best(right))
        return min(found, default=10**30)

    return best(everything)


def least_layer_work(spec: LayerSpec, batch: int, *, joined: bool = False) -> int:
    """The cheapest way to run a layer, the bias included, among all binary trees.

    If ``joined``, among those that multiply the coefficients of all levels first, one by one.

    A bias is added where the input meets its factor, if the tree contracts these two first; or it
    runs through the network on its own. The terms of a sum have nothing to do with one another;
    where one has no experts, their coefficients are summed beforehand.
    """
    sizes = {**spec.network.sizes, BATCH: batch}
    adding = 2 * WEIGHT * batch * spec.out_features
    total = (len(spec.network.terms) - 1) * adding
    x, output = frozenset((BATCH, "i")), frozenset((BATCH, "o"))
    for term in spec.network.terms:
        weights = [frozenset(each.legs) for each in term.factors]
        held = frozenset().union(*weights)
        data = [frozenset((BATCH, *({leg} & held))) for leg in spec.network.expert_legs]
        while joined and len(data) > 1:
            first, second, *others = data
            total += contraction_work((first, second), first | second, sizes)
            data = [first | second, *others]
        carrier = next(k for k, legs in enumerate(weights) if "i" in legs)
        rest = [*data, *(w for k, w in enumerate(weights) if k != carrier)]
        operands = [x, weights[carrier], *rest]
        alone = least_work(operands, output, sizes)
        if term.bias is None:
            total += alone
            continue
        fused = least_work(operands, output, sizes, frozenset({0, 1}))
        apart = least_work([frozenset(term.bias.legs), *rest], output, sizes)
        total += min(fused, alone + apart + adding)
    return total


@settings(max_examples=40)
@given(spec=specs(largest=12, largest_rank=12), batch=st.integers(1, 3000))
def test_no_tree_is_cheaper(spec: LayerSpec, batch: int) -> None:
    assume(len(spec.network.factors) + spec.levels <= 7)
    program = spec.plan(batch).program
    apart = least_layer_work(spec, batch)
    joined = has_joined(program)
    found, least = program_work(program, batch), least_layer_work(spec, batch, joined=joined)
    # numbers per input may go anywhere, which the search here calls outer products
    numbers = any(size == 1 for size in spec.network.sizes.values())
    assert found <= least if numbers else found == least
    if joined:
        assert spec.levels > 1
        assert found < apart


def has_joined(program: Program) -> bool:
    """Whether coefficients of several levels are multiplied with nothing else in between."""
    made = [{*step.legs} - {BATCH} for step in program.steps if step.kind == "multiply"]
    return any({"n0", "n1"} <= legs <= {"n0", "n1", "n2"} for legs in made)


JOINED = [
    # with a batch, and a bound of the work in shares of the least without
    (LayerSpec(17, 82, (8, 7), SharedBasis((13, 19))), 178, 0.86),
    (LayerSpec(18, 94, (2, 3, 3), BaseDelta(24)), 14, 0.84),
    (LayerSpec(83, 72, (2, 2, 3), Dense()), 132, 0.9),
]


@pytest.mark.parametrize(("spec", "batch", "share"), JOINED, ids=str)
def test_coefficients_are_multiplied_first_where_it_pays(
    spec: LayerSpec, batch: int, share: float
) -> None:
    program = spec.plan(batch).program
    assert has_joined(program)
    assert program_work(program, batch) < share * least_layer_work(spec, batch)


def test_joined_coefficients_loop_over_no_weights_and_copy_nothing() -> None:
    """Both have less work by the planner's objective, and took two to eight times as long."""
    for spec, batch in (
        (LayerSpec(81, 994, (21, 30), SharedDelta(29), bias=False), 2),
        (LayerSpec(613, 320, (3, 10, 2), TensorRing((56, 82, 4, 5, 3))), 62),
    ):
        assert not has_joined(spec.plan(batch).program)
