"""Capacity from minimum cuts: against a list of all cuts, and in time for many levels."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from math import prod
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe import (
    CP,
    BaseDelta,
    LayerSpec,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.factorizations import Network, Term
from tensormoe.testing import specs

INPUT, OUTPUT = "i", "o"


def cuts(term: Term, rows: set[str], columns: set[str]) -> Iterable[set[str]]:
    """Every set of legs that is cut when each factor goes to one of two sides."""
    held = {leg for leg in term.legs if leg[0] in "ion"} - rows - columns
    for sides in product((0, 1), repeat=len(term.factors)):
        ends: dict[str, set[int]] = {leg: set() for leg in term.legs - held}
        for factor, side in zip(term.factors, sides, strict=True):
            for leg in set(factor.legs) - held:
                ends[leg].add(side)
        for leg in ends:
            ends[leg] |= {0} & {0 if leg in rows else 2} | {1} & {1 if leg in columns else 2}
        yield {leg for leg, both in ends.items() if len(both) > 1}


def listed_rank(network: Network, rows: set[str], columns: set[str]) -> int:
    """The smallest sum of cuts, one per term, or the product of the open legs if smaller."""
    size = network.sizes
    total = sum(
        min(prod(size[leg] for leg in cut) for cut in cuts(term, rows, columns))
        for term in network.terms
    )
    return min([total, *(prod(size[leg] for leg in side) for side in (rows, columns))])


@given(spec=specs(), data=st.data())
def test_the_smallest_of_all_cuts_is_found(spec: LayerSpec, data: st.DataObject) -> None:
    network = spec.network
    legs = [*network.expert_legs, INPUT, OUTPUT]
    rows = data.draw(st.sets(st.sampled_from(legs), min_size=1, max_size=len(legs) - 1))
    rest = sorted(set(legs) - rows)
    columns = data.draw(st.sets(st.sampled_from(rest), min_size=1))
    assert network.generic_rank(rows, columns) == listed_rank(network, rows, columns)


@pytest.mark.parametrize(
    "kind",
    [CP(5), TensorRing(3), TensorTrain(3), Tucker(2), SharedBasis(2), BaseDelta(2), SharedDelta(2)],
    ids=str,
)
def test_many_levels_take_no_time(kind: object) -> None:
    """There are 2^34 ways to part the factors of a ring with 32 levels."""
    start = process_time()
    spec = LayerSpec(40, 30, (2,) * 32, kind)  # type: ignore[arg-type]
    assert spec.expert_rank <= 30
    assert spec.expert_span >= 2
    assert process_time() - start < 2


def test_closed_forms_of_many_levels() -> None:
    assert LayerSpec(40, 30, (2,) * 10, CP(700)).expert_span == 700
    assert LayerSpec(40, 30, (2,) * 10, CP(2000)).expert_span == 2**10
    assert LayerSpec(40, 30, (2,) * 10, TensorRing(5)).expert_span == 25
    assert LayerSpec(40, 30, (2,) * 4, TensorRing(5)).expert_span == 2**4
