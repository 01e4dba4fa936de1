"""Product routing: against all combinations, which the search never makes."""

from __future__ import annotations

from itertools import product

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe.errors import GateError
from tensormoe.routing import Router, choose_product


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    rows = draw(st.integers(0, 3))
    # few values, so that there are many ties
    values = draw(
        st.sampled_from([st.integers(-3, 3).map(float), st.floats(-4.0, 4.0, allow_nan=False)])
    )
    logits = [draw(hnp.arrays(np.float64, (rows, size), elements=values)) for size in sizes]
    return logits, draw(st.integers(1, int(np.prod(sizes))))


def all_sums(logits):
    """Sums of all combinations of one row, in row-major order, added level by level."""
    return np.array([sum(picked[1:], start=picked[0]) for picked in product(*logits)])


@given(problems())
def test_the_best_of_all_combinations(problem):
    logits, k = problem
    routes = choose_product(Router(), logits, k)
    assert routes.top_k_index.shape == (len(logits[0]), k)
    for row in range(len(logits[0])):
        sums = all_sums([level[row] for level in logits])
        found = sums[routes.top_k_index[row]]
        np.testing.assert_array_equal(found, np.sort(sums)[::-1][:k])
        assert len(set(routes.top_k_index[row].tolist())) == k
        places = np.unravel_index(routes.top_k_index[row], [level.shape[1] for level in logits])
        np.testing.assert_array_equal([each[row] for each in routes.level_index], places)


@pytest.mark.parametrize(
    "router",
    [
        Router(),
        Router(renormalize=False),
        Router(renormalize=False, scale=2.5),
        Router("sigmoid"),
        Router("sigmoid", renormalize=False),
    ],
    ids=repr,
)
def test_weights(router):
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(4, 5)), rng.normal(size=(4, 6))]
    routes = choose_product(router, logits, 7)
    for row in range(4):
        sums = all_sums([level[row] for level in logits])
        one = 1 / (1 + np.exp(-sums)) if router.scores == "sigmoid" else np.exp(sums)
        if router.scores == "softmax":
            one = one / one.sum()
        weights = one[routes.top_k_index[row]]
        if router.renormalize:
            weights = weights / weights.sum()
        np.testing.assert_allclose(routes.top_k_weights[row], router.scale * weights)


def test_the_cartesian_router_multiplies_the_levels_distributions():
    rng = np.random.default_rng(1)
    logits = [rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 4))]
    routes = choose_product(Router(renormalize=False), logits, 6)
    rows, columns = routes.scores
    i, j = routes.level_index
    wanted = np.take_along_axis(rows, i, -1) * np.take_along_axis(columns, j, -1)
    np.testing.assert_allclose(routes.top_k_weights, wanted)
    assert routes.top_k_index.shape == (2, 3, 6)


def test_a_million_experts_make_nothing_of_their_number():
    import tracemalloc

    rng = np.random.default_rng(2)
    logits = [rng.normal(size=(8, 1000)), rng.normal(size=(8, 1000))]
    tracemalloc.start()
    routes = choose_product(Router(), logits, 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
    sums = (logits[0][:, :, None] + logits[1][:, None, :]).reshape(8, -1)
    np.testing.assert_array_equal(routes.top_k_index, np.argsort(-sums, axis=1)[:, :16])


def test_all_of_a_level_that_is_smaller_than_k():
    logits = [np.array([[0.0, 5.0]]), np.array([[1.0, 0.0, 2.5]])]
    routes = choose_product(Router(), logits, 6)
    assert routes.top_k_index.tolist() == [[5, 3, 4, 2, 0, 1]]


def test_noise_is_for_the_choice_alone():
    logits = [np.array([[0.0, 1.0]]), np.array([[0.0, 1.0]])]
    noise = [np.array([[3.0, 0.0]]), np.array([[0.0, 0.0]])]
    routes = choose_product(Router(noise=1.0), logits, 2, noise=noise)
    assert routes.top_k_index.tolist() == [[1, 0]]
    np.testing.assert_allclose(routes.top_k_weights, [[np.e / (1 + np.e), 1 / (1 + np.e)]])


@pytest.mark.parametrize(
    ("logits", "k", "router", "message"),
    [
        ([np.zeros((1, 2)), np.zeros((1, 3))], 7, Router(), "at most the number of experts, 6"),
        ([np.zeros((1, 2)), np.zeros((1, 3))], 0, Router(), "positive integer"),
        ([np.zeros((1, 2)), np.zeros((2, 3))], 1, Router(), "level 1"),
        ([np.zeros((1, 2)), np.zeros((1, 0))], 1, Router(), "at least one expert"),
        ([np.zeros((1, 2)), np.zeros((1, 2), int)], 1, Router(), "floating-point"),
        ([np.zeros((1, 2)), np.full((1, 2), np.nan)], 1, Router(), "NaN"),
        ([np.zeros((1, 2))] * 2, 1, Router(balance=0.1), "balance=0.0"),
        ([np.zeros((1, 2))] * 2, 1, Router(capacity=1.25), "capacity=None"),
        ([np.zeros((1, 2))] * 2, 1, Router(bias=True), "bias=False"),
        ([np.zeros((1, 2))] * 2, 1, "softmax", "must be a Router"),
    ],
)
def test_bad_input(logits, k, router, message):
    with pytest.raises(GateError, match=message):
        choose_product(router, logits, k)


def test_pytorch_selects_as_a_sort_does():
    torch = pytest.importorskip("torch")
    from tensormoe_torch import BACKEND

    rng = np.random.default_rng(3)
    some = [
        rng.normal(size=(5, 100)),
        rng.integers(0, 9, size=(5, 100)).astype(float),
        np.full((2, 100), -np.inf),
    ]
    for values in some:
        found = BACKEND.largest_indices(torch.tensor(values), 12)
        wanted = np.argsort(-values, axis=1, kind="stable")[:, :12]
        # where entries are equal it says so
        assert (found is None) == (len(np.unique(values)) < values.size)
        if found is not None:
            np.testing.assert_array_equal(found.numpy(), wanted)
        routes = choose_product(Router(), [torch.tensor(values)], 12)
        np.testing.assert_array_equal(routes.top_k_index.numpy(), wanted)
