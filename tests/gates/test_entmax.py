"""Entmax against exact answers: precision, extremes, masks, derivative-free properties."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tensormoe.errors import GateError
from tensormoe.gates import entmax, softmax, sparsemax

PRECISION = {np.float32: 1e-6, np.float64: 1e-12}


def exact15(row):
    """Sort-based entmax-1.5 in extended precision; the supports are tried one after another."""
    z = row.astype(np.longdouble) / 2
    z = z - z.max()
    order = np.sort(z)[::-1]
    count = np.arange(1, len(z) + 1)
    mean = np.cumsum(order) / count
    spread = np.cumsum(order**2) - count * mean**2
    tau = mean - np.sqrt(np.maximum((1 - spread) / count, 0))
    tau = tau[np.count_nonzero(tau <= order) - 1]
    return np.maximum(z - tau, 0) ** 2


def precise(row, alpha):
    """Entmax at 60 digits, to far below the tolerances.

    Up to α = 2 the sum is convex in the threshold, and Newton's method comes from below. Beyond,
    slopes have no bound, entries are roots of what the threshold is off by, and intervals are
    halved.
    """
    with mpmath.workdps(60):
        z = [(mpmath.mpf(alpha) - 1) * mpmath.mpf(float(x)) for x in row]
        power = 1 / (mpmath.mpf(alpha) - 1)
        low, high = max(z) - 1, max(z)
        above, total = z, mpmath.inf
        while alpha <= 2 and total > 1 + mpmath.mpf("1e-30"):
            above = [v for v in above if v > low]
            parts = [(v - low) ** power for v in above]
            total = sum(parts)
            slope = power * sum(part / (v - low) for v, part in zip(above, parts, strict=True))
            low += (total - 1) / slope
        for _ in range(0 if alpha <= 2 else 70 if alpha <= 3 else 140):
            middle = (low + high) / 2
            if sum((v - middle) ** power for v in above if v > middle) > 1:
                low = middle
                above = [v for v in above if v > low]
            else:
                high = middle
        return np.array([float((v - low) ** power) if v > low else 0.0 for v in z])


def logits_of(kind, experts, dtype):
    rng = np.random.default_rng(experts)
    x = rng.standard_normal((3, experts))
    if kind == "ties":
        x = np.round(x)
    if kind == "one ahead":
        x[:, experts // 2] += 1.5
    if kind == "heavy tail":
        x = x / np.abs(rng.standard_normal((3, experts)))
    if kind == "geometric":
        x = -np.geomspace(1e-6, 4, experts) * np.array([[1.0], [0.3], [3.0]])
    return x.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("experts", [1, 2, 7, 128, 1024, 8192, 100_000])
@pytest.mark.parametrize("kind", ["normal", "ties", "one ahead", "heavy tail", "geometric"])
def test_entmax15_is_exact_at_every_scale(kind, experts, dtype):
    for scale in (1e-6, 1e-3, 1.0, 30.0, 1e4):
        x = logits_of(kind, experts, dtype) * dtype(scale)
        got = entmax(x)
        want = np.stack([exact15(row) for row in x])
        assert got.dtype == dtype
        assert np.abs(got - want).max() <= PRECISION[dtype]
        sums = got.astype(np.longdouble).sum(axis=-1)
        assert np.abs(sums - 1).max() <= 4 * PRECISION[dtype]


def test_the_sort_based_oracle_agrees_with_newtons_method():
    row = np.random.default_rng(0).standard_normal(200)
    np.testing.assert_allclose(exact15(row).astype(float), precise(row, 1.5), rtol=0, atol=1e-15)


@pytest.mark.parametrize("experts", [1, 2, 30, 200])
@pytest.mark.parametrize("alpha", [1.001, 1.1, 1.3, 1.7, 1.99, 2.0, 2.2, 3.0, 6.0])
def test_any_alpha_is_exact(alpha, experts):
    x = np.random.default_rng(experts).standard_normal((2, experts))
    x[1] = np.round(x[1])
    # for α > 2 slopes at the edge of the support have no bound: there rounding counts for more
    tolerance = 1e-12 if alpha <= 2 else 1e-6
    for scale in (1e-3, 1.0, 20.0):
        want = np.stack([precise(row, alpha) for row in x * scale])
        np.testing.assert_allclose(entmax(x * scale, alpha), want, rtol=0, atol=tolerance)
        single = (x * scale).astype(np.float32)
        want = np.stack([precise(row, alpha) for row in single])
        np.testing.assert_allclose(
            entmax(single, alpha), want, rtol=0, atol=2e-6 if alpha <= 2 else 2e-3
        )


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_logits_share_equally(alpha, dtype):
    for experts in (1, 3, 1000):
        got = entmax(np.full((2, experts), 7.25, dtype), alpha)
        np.testing.assert_allclose(got, 1 / experts, rtol=40 * np.finfo(dtype).eps)


@pytest.mark.parametrize("alpha", [1.02, 1.1, 1.8, 3.0, 5.0])
def test_rows_sum_to_one_in_float32(alpha):
    x = np.random.default_rng(0).standard_normal((20, 5000)).astype(np.float32)
    sums = entmax(x, alpha).astype(np.float64).sum(axis=-1)
    np.testing.assert_allclose(sums, 1, atol=5e-7)


def test_alpha_near_one_tends_to_softmax():
    x = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    np.testing.assert_allclose(entmax(x, 1 + 1e-6), softmax(x), rtol=2e-5)


def test_sparsemax_and_softmax_by_other_means():
    x = np.random.default_rng(1).standard_normal((5, 40))
    want = np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(softmax(x), want, rtol=1e-13)
    order = np.sort(x)[:, ::-1]
    tau = (np.cumsum(order, axis=-1) - 1) / np.arange(1, 41)
    size = np.count_nonzero(order > tau, axis=-1)
    want = np.maximum(x - tau[np.arange(5), size - 1][:, None], 0)
    np.testing.assert_allclose(sparsemax(x), want, atol=1e-14)


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0, 3.0])
class TestMasksAndInfinities:
    def test_masked_experts_are_as_if_absent(self, alpha):
        rng = np.random.default_rng(2)
        x = rng.standard_normal((6, 20))
        mask = rng.random((6, 20)) < 0.6
        mask[:, 3] = True
        filled = np.where(mask, x, np.nan)  # whatever a masked logit holds
        for given_x, given_mask in ((filled, mask), (np.where(mask, x, -np.inf), None)):
            got = entmax(given_x, alpha, mask=given_mask)
            assert np.all(got[~mask] == 0)
            for row, use, have in zip(x, mask, got, strict=True):
                np.testing.assert_allclose(have[use], entmax(row[use], alpha), atol=1e-13)

    def test_masks_broadcast(self, alpha):
        x = np.random.default_rng(3).standard_normal((2, 3, 4))
        mask = np.array([True, False, True, True])
        want = entmax(x, alpha, mask=np.broadcast_to(mask, x.shape))
        np.testing.assert_array_equal(entmax(x, alpha, mask=mask), want)
        assert np.all(want[..., 1] == 0)

    def test_infinite_logits_share_the_row(self, alpha):
        x = np.array([[np.inf, 0.0, np.inf, -np.inf], [1.0, np.inf, 3.0, 1e30]])
        want = [[0.5, 0, 0.5, 0], [0, 1, 0, 0]]
        np.testing.assert_allclose(entmax(x, alpha), want, atol=1e-15)
        mask = np.array([[False, True, True, True]])
        np.testing.assert_allclose(entmax(x, alpha, mask=mask)[0], [0, 0, 1, 0], atol=1e-15)

    def test_rows_without_experts_are_errors(self, alpha):
        x = np.zeros((3, 2))
        mask = np.array([[True, True], [True, False], [False, False]])
        with pytest.raises(GateError, match=r"row 2"):
            entmax(x, alpha, mask=mask)
        with pytest.raises(GateError, match=r"row 1"):
            entmax(np.array([[0.0, 1.0], [-np.inf, -np.inf]]), alpha)

    def test_nan_is_an_error_with_its_place(self, alpha):
        x = np.zeros((400, 300), np.float32)
        x[317, 41] = np.nan
        with pytest.raises(GateError, match=r"row 317, expert 41"):
            entmax(x, alpha)
        with pytest.raises(GateError, match=r"row 317, expert 41"):
            entmax(x, alpha, mask=np.ones((1, 300), bool))

    def test_saturated_rows(self, alpha):
        low = float(np.finfo(np.float32).min)
        x = np.array([[1e4, 0, -1e4], [low, low, 0], [1e30, 0, low]], np.float32)
        np.testing.assert_array_equal(entmax(x, alpha), [[1, 0, 0], [0, 0, 1], [1, 0, 0]])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (2, 3, 5), (1, 1)])
def test_shapes_are_kept(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for alpha in (1.0, 1.5, 2.0, 3.0):
        got = entmax(x, alpha)
        assert got.shape == shape
        assert got.dtype == np.float32
        np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)


def test_axis():
    x = np.random.default_rng(0).standard_normal((4, 5, 6))
    mask = np.random.default_rng(1).random((4, 5, 6)) < 0.8
    for axis in (0, 1, -2, -3):
        want = np.moveaxis(
            entmax(np.moveaxis(x, axis, -1), mask=np.moveaxis(mask, axis, -1)), -1, axis
        )
        np.testing.assert_array_equal(entmax(x, axis=axis, mask=mask), want)


def test_half_precision_is_computed_in_float32():
    x = np.random.default_rng(0).standard_normal((3, 500)).astype(np.float16)
    got = entmax(x)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, entmax(x.astype(np.float32)))


def test_inputs_are_not_written_to():
    x = np.random.default_rng(0).standard_normal((3, 50))
    kept = x.copy()
    x.flags.writeable = False
    for alpha in (1.0, 1.3, 1.5, 2.0, 3.0):
        entmax(x, alpha)
    np.testing.assert_array_equal(x, kept)


def test_blocks_do_not_show():
    x = np.random.default_rng(0).standard_normal((700, 300)).astype(np.float32)
    whole = entmax(x)
    np.testing.assert_allclose(whole, np.stack([entmax(row) for row in x]), atol=2e-7)


finite_rows = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    elements=st.floats(-50, 50, width=32),
)


@settings(deadline=None)
@given(x=finite_rows, alpha=st.sampled_from([1.0, 1.1, 1.5, 2.0, 2.5]), data=st.data())
def test_properties(x, alpha, data):
    got = entmax(x, alpha)
    assert np.all(got >= 0)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-12)
    tolerance = 1e-12 if alpha <= 2 else 1e-5
    order = data.draw(st.permutations(range(x.shape[1])))
    np.testing.assert_allclose(entmax(x[:, order], alpha), got[:, order], atol=tolerance)
    moved = data.draw(st.integers(-100, 100))
    np.testing.assert_allclose(entmax(x + moved, alpha), got, atol=100 * tolerance)
    for row, weights in zip(x, got, strict=True):
        ranked = weights[np.argsort(row, kind="stable")]
        assert np.all(np.diff(ranked) >= -tolerance)
        if alpha > 1:  # what lies 1/(α-1) below the top is outside every support
            assert np.all(weights[row < row.max() - 1 / (alpha - 1)] == 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: entmax(x, 0.5), "alpha must be finite and at least 1; got 0.5"),
        (lambda x: entmax(x, float("nan")), "alpha must be finite"),
        (lambda x: entmax(x, "1.5"), "alpha must be a number"),
        (lambda x: entmax(x.astype(int)), "real floating point; got dtype int64"),
        (lambda x: entmax(x, axis=2), r"axis must be in \[-2, 2\); got 2"),
        (lambda x: entmax(x, axis=None), "axis must be an integer"),
        (lambda x: entmax(x[:, :0]), "at least one expert"),
        (lambda x: entmax(x, mask=np.ones((2, 3))), "mask must be boolean"),
        (lambda x: entmax(x, mask=np.ones((3, 3), bool)), r"broadcast .* got shape \(3, 3\)"),
        (lambda x: entmax(x, mask=np.ones((1, 2, 3), bool)), "mask must broadcast"),
        (lambda x: entmax(x[0, 0]), "axis must be in"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(GateError, match=words):
        call(np.zeros((2, 3)))
