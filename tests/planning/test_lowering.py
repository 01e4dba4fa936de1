"""Every way to run a contraction is that contraction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tensormoe.planning._lowering import Lowered, lower
from tensormoe.planning._program import View
from tests.planning._work import BATCH


def orders(legs: str) -> st.SearchStrategy[tuple[str, ...]]:
    return st.permutations(legs).map(tuple)


@st.composite
def contractions(draw: st.DrawFn) -> tuple[tuple, tuple, frozenset, dict[str, int]]:
    """Two operands in any leg orders, and legs to keep."""
    letters = draw(st.integers(1, 5))
    left, right, kept, sizes = [], [], set(), {}
    for leg in "bcdef"[:letters]:
        where = draw(st.sampled_from(["left", "right", "both", "summed"]))
        sizes[leg] = draw(st.integers(1, 3))
        left += [leg] if where != "right" else []
        right += [leg] if where != "left" else []
        kept |= {leg} if where != "summed" or leg == BATCH else set()
    assume(left)
    assume(right)
    left, right = draw(orders("".join(left))), draw(orders("".join(right)))
    return left, right, frozenset(kept), sizes


def looked(array: np.ndarray, view: View) -> np.ndarray:
    array = array if view.shape is None else array.reshape(view.shape)
    return array if view.axes is None else array.transpose(view.axes)


def run_lowered(
    way: Lowered, sizes: dict[str, int], left: np.ndarray, right: np.ndarray
) -> np.ndarray:
    pair = (right, left) if way.swapped else (left, right)
    first, second = (looked(a, view) for a, view in zip(pair, way.views(sizes), strict=True))
    result = first * second if way.kind == "multiply" else first @ second
    shape = way.shape(sizes)
    return result if shape is None else result.reshape(shape)


@given(contractions())
def test_every_way_to_run_a_contraction_is_that_contraction(drawn) -> None:
    left, right, kept, sizes = drawn
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal([sizes[leg] for leg in legs]) for legs in (left, right)]
    ways = list(lower(left, right, kept))
    summed = [tuple(leg for leg in legs if leg not in kept) for legs in (left, right)]
    if not summed[0]:
        assert ways, "elementwise products always work"
    for way in ways:
        assert frozenset(way.legs) == kept
        assert len(way.legs) == len(kept)
        equation = f"{''.join(left)},{''.join(right)}->{''.join(way.legs)}"
        want = np.einsum(equation, *arrays)
        np.testing.assert_allclose(run_lowered(way, sizes, *arrays), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("left", "right", "kept"),
    [
        ("bi", "ir", "br"),
        ("bi", "irs", "brs"),
        ("brs", "ors", "bo"),
        ("bn", "npq", "bpq"),
        ("bpq", "bqr", "bpr"),
        ("bpr", "bsr", "bps"),
    ],
)
def test_these_contractions_are_one_product_of_views(left: str, right: str, kept: str) -> None:
    sizes = {leg: 2 + k for k, leg in enumerate("bonirspq")}
    ways = list(lower(tuple(left), tuple(right), frozenset(kept)))
    assert ways
    assert min(way.loops(sizes) for way in ways) == 1
