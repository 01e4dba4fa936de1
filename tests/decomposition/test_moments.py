"""Decompositions weighted by second moments, against errors summed over the inputs themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormoe import CP, BaseDelta, Hadamard, LowRank, SharedDelta, TensorRing, Tucker
from tensormoe.decomposition import Moments, Search, _errors, _weighted, decompose
from tensormoe.errors import ShapeError, SpecError
from tensormoe.testing import reconstruct

QUICK = Search(starts=1, sweeps=6, polish=1)
KINDS = [CP(3), TensorRing((2, 2, 3)), Tucker((2, 3, 3)), BaseDelta(2)]


def _uneven(rng: np.random.Generator, samples: int, size: int) -> Any:
    """Samples that vary far more in some directions, none of them an axis."""
    scales = np.logspace(0, -2, size)
    turned, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return (rng.standard_normal((samples, size)) * scales) @ turned + 0.1


def _missing(weights: Any, bias: Any, found: Any) -> Any:
    """Rows of inputs, then one of the biases where there are any."""
    rebuilt = np.asarray(reconstruct(found.spec.factorization, found.factors))
    if bias is not None:
        weights = np.concatenate([weights, bias[:, None]], axis=1)
    return weights, weights - rebuilt


@settings(max_examples=12)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    biased=st.booleans(),
    both=st.booleans(),
    shares=st.booleans(),
)
def test_the_error_is_that_of_all_inputs_summed(
    kind: Any, seed: int, biased: bool, both: bool, shares: bool
) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((4, 6, 5))
    bias = rng.standard_normal((4, 5)) if biased else None
    x = _uneven(rng, 40, 6)
    x = np.concatenate([x, np.ones((40, 1))], axis=1) if biased else x
    scale = rng.standard_normal((30, 5)) * np.array([5.0, 1.0, 1.0, 0.2, 1.0]) if both else None
    p = rng.random(4) if shares else None
    moments = Moments(x.T @ x / 40, None if scale is None else scale.T @ scale, p)
    found = decompose(weights, kind, bias=bias, moments=moments, search=QUICK, compare=False)
    whole, missing = _missing(weights, bias, found)
    sums = [0.0, 0.0]
    for n in range(4):
        for place, matrix in enumerate((missing[n], whole[n])):
            out = x @ matrix if scale is None else x @ matrix @ scale.T
            sums[place] += (1.0 if p is None else p[n]) * float((out**2).sum())
    assert found.report.weighted_error == pytest.approx((sums[0] / sums[1]) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, LowRank(2), SharedDelta(2)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_errors_of_large_matrices_are_read_off_the_weighted_tensor(
    kind: Any, biased: bool, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ridge that is half of the second moments is no part of them."""
    rng = np.random.default_rng(2)
    weights = 1e-20 * rng.standard_normal((4, 6, 5))
    bias = 1e-20 * rng.standard_normal((4, 5)) if biased else None
    x = np.stack([_uneven(rng, 40, 6 + biased) for _ in range(4)])
    x[..., 6:] = 1.0
    inputs = np.swapaxes(x, 1, 2) @ x / 40
    inputs = inputs if apart else inputs.mean(axis=0)
    moments = Moments(inputs, experts=rng.random(4), ridge=0.5)
    options: Any = {"bias": bias, "moments": moments, "search": QUICK, "compare": False}
    found = decompose(weights, kind, **options)

    def refused(*_: Any) -> Any:
        raise AssertionError("a product of moments with a whole matrix")

    read_off = not apart or kind.name == "low_rank"
    monkeypatch.setattr(_errors, "LARGE", 0)
    if read_off:
        monkeypatch.setattr(Moments, "error", refused)
    again = decompose(weights, kind, **options)
    assert again.report.weighted_error == pytest.approx(found.report.weighted_error, rel=1e-9)
    monkeypatch.setattr(_weighted, "KEPT", 0)
    if read_off:
        with pytest.raises(AssertionError, match="whole matrix"):
            decompose(weights, kind, **options)
    monkeypatch.undo()
    monkeypatch.setattr(_weighted, "KEPT", 0)
    passes = decompose(weights, kind, **options)
    assert passes.report.history[-1] == pytest.approx(found.report.history[-1], rel=1e-6)
    assert passes.report.weighted_error == pytest.approx(found.report.weighted_error, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_white_inputs_and_outputs_weigh_nothing(kind: Any) -> None:
    weights = np.random.default_rng(3).standard_normal((4, 6, 5))
    white = Moments(7.0 * np.eye(6), 0.3 * np.eye(5), np.full(4, 0.25))
    options: Any = {"search": QUICK, "compare": False}
    plain = decompose(weights, kind, **options)
    found = decompose(weights, kind, moments=white, **options)
    np.testing.assert_allclose(found.report.history, plain.report.history, rtol=1e-9)
    rebuilt = [np.asarray(reconstruct(kind, each.factors)) for each in (plain, found)]
    np.testing.assert_allclose(rebuilt[0], rebuilt[1], rtol=1e-6, atol=1e-8)
    assert found.report.weighted_error == pytest.approx(found.report.error, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_weighted_gets_smaller(kind: Any) -> None:
    rng = np.random.default_rng(5)
    weights, x = rng.standard_normal((4, 12, 10)), _uneven(rng, 60, 12)
    out = _uneven(rng, 60, 10)
    search = Search(starts=2, sweeps=30)
    for moments in (
        Moments(x.T @ x / 60),
        Moments(outputs=out.T @ out),
        Moments(x.T @ x / 60, out.T @ out),
        Moments(experts=np.array([1.0, 0.02, 0.02, 0.02])),
    ):
        weighted = decompose(weights, kind, moments=moments, search=search, compare=False)
        plain = decompose(weights, kind, search=search, compare=False)
        rebuilt = np.asarray(reconstruct(kind, plain.factors))
        before = moments.error(zip(weights, weights - rebuilt, strict=True))
        assert weighted.report.weighted_error is not None
        assert weighted.report.weighted_error < 0.99 * before
        assert weighted.report.error > plain.report.error


def test_moments_of_samples_are_the_samples() -> None:
    rng = np.random.default_rng(1)
    weights, x = rng.standard_normal((4, 6, 5)), _uneven(rng, 50, 6)
    p = rng.random((50, 4))
    by_samples = decompose(weights, CP(3), inputs=x, coefficients=p, weighted=True, search=QUICK)
    moments = Moments(x.T @ x, experts=(p**2).mean(axis=0))
    by_moments = decompose(weights, CP(3), moments=moments, search=QUICK)
    for name, factor in by_samples.factors.items():
        np.testing.assert_allclose(factor, by_moments.factors[name], rtol=1e-7, atol=1e-9)


def test_what_cannot_be_is_refused() -> None:
    weights = np.ones((4, 6, 5))
    with pytest.raises(SpecError, match="need one factor that has the outputs"):
        decompose(weights, Hadamard(), moments=Moments(outputs=np.eye(5)))
    both: Any = {"inputs": np.ones((3, 6)), "weighted": True}
    with pytest.raises(SpecError, match="one of weighted and moments"):
        decompose(weights, "cp", rank=1, moments=Moments(np.eye(6)), **both)
    with pytest.raises(ShapeError, match="inputs of moments must have 6 entries"):
        decompose(weights, "cp", rank=1, moments=Moments(np.eye(5)))
    with pytest.raises(ShapeError, match="7 entries per axis with the row of the biases"):
        decompose(weights, "cp", rank=1, bias=np.ones((4, 5)), moments=Moments(np.eye(6)))
    many = Moments(experts=np.ones(2))
    with pytest.raises(ShapeError, match="weights of one level"):
        decompose(np.ones((2, 2, 6, 5)), "cp", rank=1, moments=many)
    with pytest.raises(ShapeError, match="positive definite"):
        decompose(weights, "cp", rank=1, moments=Moments(outputs=np.ones((5, 5))))
    for bad, match in (
        (np.full((6, 6), np.nan), "finite"),
        (np.triu(np.ones((6, 6))), "symmetric"),
        (np.ones((6, 5)), "square"),
        (-np.eye(6), "not negative"),
        (np.eye(6, dtype=int), "floats"),
    ):
        with pytest.raises(ShapeError, match=match):
            Moments(bad)
    with pytest.raises(ShapeError, match="not all 0"):
        Moments(experts=np.zeros(3))
    with pytest.raises(SpecError, match="got none of them"):
        Moments()
    with pytest.raises(SpecError, match="ridge must be a positive float"):
        Moments(np.eye(2), ridge=0.0)
