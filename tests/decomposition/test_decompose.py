"""Decomposition of dense experts: what comes back, and whether the report is true."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensormoe import (
    CP,
    BaseDelta,
    Budget,
    Dense,
    LayerSpec,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.decomposition import Search, decompose
from tensormoe.errors import BudgetError, RankError, ShapeError, SpecError
from tensormoe.factorizations import rank_pattern
from tensormoe_numpy import MuMoE
from tests.decomposition._cases import NAMES, relative, weights_of

EXPERTS = (3, 2)


@pytest.fixture
def stack(rng: np.random.Generator) -> np.ndarray:
    """Experts (3, 2, 12, 10) with something in common."""
    parts = [rng.standard_normal((size, 5)) for size in (*EXPERTS, 12, 10)]
    common = np.einsum("ar,br,ir,or->abio", *parts)
    return common + 0.3 * rng.standard_normal(common.shape)


@pytest.mark.parametrize("name", [*NAMES, "dense"])
@pytest.mark.parametrize("biased", [True, False])
def test_the_report_is_true(
    name: str, biased: bool, stack: np.ndarray, rng: np.random.Generator
) -> None:
    bias = rng.standard_normal((*EXPERTS, 10)) if biased else None
    x = rng.standard_normal((40, 12))
    a = rng.dirichlet(np.full(6, 0.3), 40)
    options: dict[str, Any] = {"budget": 0.5} if rank_pattern(name) else {}
    found = decompose(stack, name, bias=bias, inputs=x, coefficients=a, **options)
    report, spec = found.report, found.spec
    assert spec == LayerSpec(12, 10, EXPERTS, spec.factorization, bias=biased)
    rebuilt = weights_of(spec, found.factors)
    assert report.error == pytest.approx(relative(rebuilt, stack), abs=1e-9)
    each = [relative(rebuilt[k], stack[k]) for k in np.ndindex(EXPERTS)]
    np.testing.assert_allclose(report.expert_errors, each, atol=1e-9)
    layer = MuMoE.restore(found.config(), found.parameters)
    made = [a.reshape(40, 3, 2).sum(2), a.reshape(40, 3, 2)]
    del made  # mixtures of levels are products; the report mixes any
    weights, biases = layer.materialize()
    np.testing.assert_allclose(weights, rebuilt, atol=1e-9)
    wanted = np.einsum("bn,bi,nio->bo", a, x, stack.reshape(6, 12, 10))
    got = np.einsum("bn,bi,nio->bo", a, x, rebuilt.reshape(6, 12, 10))
    if bias is not None:
        # outputs are a layer's own
        wanted += a @ bias.reshape(6, 10)
        got += a @ np.asarray(biases).reshape(6, 10)
    assert report.output_error == pytest.approx(relative(got, wanted), abs=1e-9)
    assert report.parameters == spec.num_parameters == sum(v.size for v in found.factors.values())
    assert report.dense_parameters == stack.size + (0 if bias is None else bias.size)
    if bias is None:
        assert report.bias_error is None
    else:
        assert report.bias_error == pytest.approx(relative(np.asarray(biases), bias), abs=1e-9)
    assert report.sweeps == len(report.history)
    assert str(report).startswith("weights off by")
    assert report.to_dict()["ratio"] == report.parameters / report.dense_parameters


def test_truncated_svds_of_equal_size(stack: np.ndarray) -> None:
    found = decompose(stack, "cp", rank=20)
    kept = found.report.parameters // 22
    values = np.sort(np.linalg.svd(stack.reshape(6, 12, 10), compute_uv=False).ravel())[::-1]
    wanted = np.sqrt((values[kept:] ** 2).sum() / (values**2).sum())
    assert found.report.svd_error == pytest.approx(wanted, abs=1e-7)
    assert decompose(stack, "cp", rank=20, compare=False).report.svd_error is None


def test_outputs_expert_by_expert_without_coefficients(
    stack: np.ndarray, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((30, 12))
    found = decompose(stack, "tensor_ring", rank=(2, 2, 2, 4), inputs=x)
    lost = np.einsum("bi,anio->anbo", x, stack - weights_of(found.spec, found.factors))
    given = np.einsum("bi,anio->anbo", x, stack)
    wanted = np.linalg.norm(lost) / np.linalg.norm(given)
    assert found.report.output_error == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", ["cp", "tensor_ring", "tucker"])
def test_weighted_factors_lower_the_error_of_outputs(
    name: str, biased: bool, stack: np.ndarray, rng: np.random.Generator
) -> None:
    """Inputs that live in few directions, and experts of unequal loads."""
    x = rng.standard_normal((400, 12)) * np.logspace(0, -2, 12)
    a = rng.dirichlet(np.array([5, 1, 1, 0.2, 0.2, 0.1]), 400)
    bias = rng.standard_normal((*EXPERTS, 10)) if biased else None
    errors = [
        decompose(
            stack,
            name,
            budget=0.3,
            bias=bias,
            inputs=x,
            coefficients=a,
            weighted=weighted,
            search=Search(starts=3),
        ).report
        for weighted in (False, True)
    ]
    assert errors[1].output_error < 0.8 * errors[0].output_error
    assert errors[1].error > errors[0].error


@pytest.mark.parametrize("name", ["cp", "tensor_ring", "tensor_train", "tucker"])
def test_budgets_are_kept_and_tolerances_reached(name: str, stack: np.ndarray) -> None:
    for budget in (0.3, 200, Budget(parameters=250)):
        found = decompose(stack, name, budget=budget, search=Search(starts=1, sweeps=3, polish=0))
        most = budget if isinstance(budget, int) else 250
        most = int(budget * stack.size) if isinstance(budget, float) else most
        assert found.report.parameters <= most
    found = decompose(stack, name, tolerance=0.35)
    assert found.report.error <= 0.35 * 1.01
    smaller = decompose(stack, name, budget=int(0.8 * found.report.parameters))
    assert smaller.report.error > 0.35


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtype_is_kept(dtype: str, stack: np.ndarray) -> None:
    given = stack.astype(dtype)
    before = given.copy()
    found = decompose(given, "tucker", rank=(2, 2, 5, 5))
    assert {array.dtype.name for array in found.factors.values()} == {dtype}
    np.testing.assert_array_equal(given, before)
    rebuilt = weights_of(found.spec, found.factors)
    assert found.report.error == pytest.approx(relative(rebuilt, stack), rel=2e-2)


def test_dense_is_exact(stack: np.ndarray) -> None:
    found = decompose(stack, Dense())
    assert found.report.error < 1e-15
    assert found.report.ratio == 1.0


def test_zero_experts_and_one_expert() -> None:
    found = decompose(np.zeros((3, 5, 4)), "cp", rank=2)
    assert found.report.error == 0.0
    assert all(np.isfinite(array).all() for array in found.factors.values())
    one = np.random.default_rng(0).standard_normal((1, 6, 5))
    assert decompose(one, TensorRing((1, 1, 5)), search=Search(sweeps=50)).report.error < 1e-6
    # an expert of zeros among others
    some = np.random.default_rng(0).standard_normal((3, 6, 5))
    some[1] = 0.0
    assert decompose(some, Tucker((3, 6, 5))).report.expert_errors[1] < 1e-12


def test_seeds_repeat(stack: np.ndarray) -> None:
    first, again, other = (decompose(stack, CP(6), seed=seed) for seed in (0, 0, 1))
    for name, array in first.factors.items():
        np.testing.assert_array_equal(array, again.factors[name])
    assert any(not np.array_equal(v, other.factors[k]) for k, v in first.factors.items())


def test_more_starts_are_no_worse(stack: np.ndarray) -> None:
    errors = [
        decompose(stack, TensorRing((2, 2, 2, 2)), search=Search(starts=n)).report.error
        for n in (1, 8)
    ]
    assert errors[1] <= errors[0] * 1.001


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"weights": np.ones((3, 4))}, ShapeError, r"\(experts…, in, out\)"),
        ({"weights": np.ones((3, 0, 4))}, ShapeError, "none of them 0"),
        ({"weights": np.ones((3, 4, 4), "int64")}, ShapeError, "floating point"),
        ({"rank": 2, "budget": 0.5}, SpecError, "one of rank, budget and tolerance"),
        ({"rank": None, "factorization": CP(2), "budget": 0.5}, SpecError, "has its rank"),
        ({"rank": None, "budget": 1.5}, BudgetError, "share of the weights"),
        ({"rank": None, "budget": 1}, BudgetError, "at least"),
        ({"rank": None, "tolerance": 0.0}, SpecError, r"in \(0, 1\)"),
        ({"rank": None, "tolerance": 1e-9}, RankError, "no rank reaches"),
        ({"rank": 0}, RankError, "rank"),
        ({"rank": 19}, RankError, "at most 15 in bond 'r'.*got 19"),
        ({"factorization": Tucker((4, 2, 2)), "rank": None}, RankError, "at most 3.*got 4"),
        ({"factorization": TensorTrain((2, 6)), "rank": None}, RankError, "at most 5.*got 6"),
        ({"factorization": SharedBasis((2, 16)), "rank": None}, RankError, "at most 12.*got 16"),
        ({"factorization": "base_delta", "rank": 6}, RankError, "at most 5.*got 6"),
        ({"factorization": "cpp"}, SpecError, "cpp"),
        ({"bias": np.ones((3, 4))}, ShapeError, "bias must have shape"),
        ({"inputs": np.ones((5, 3))}, ShapeError, "inputs must have shape"),
        ({"coefficients": np.ones((5, 3))}, ShapeError, "need inputs"),
        (
            {"inputs": np.ones((5, 6)), "coefficients": np.ones((4, 3))},
            ShapeError,
            "coefficients must have shape",
        ),
        ({"weighted": True}, SpecError, "needs inputs"),
    ],
)
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    noise = np.random.default_rng(0).standard_normal((3, 6, 5))
    given: dict[str, Any] = {"weights": noise, "factorization": "cp", "rank": 2} | change
    with pytest.raises(kind, match=message):
        decompose(**given)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    weights = np.ones((2, 3, 5, 4))
    weights[1, 1, 2, 2] = value
    with pytest.raises(ShapeError, match="expert 4"):
        decompose(weights, "cp", rank=2)
    bias = np.ones((2, 3, 4))
    bias[0, 0, 0] = value
    with pytest.raises(ShapeError, match="bias must be finite"):
        decompose(np.ones((2, 3, 5, 4)), "cp", rank=2, bias=bias)


def test_ranks_as_large_as_can_be_needed_are_exact(rng: np.random.Generator) -> None:
    weights = rng.standard_normal((3, 6, 5))
    for kind in (CP(15), Tucker((3, 6, 5)), TensorTrain((3, 5)), BaseDelta(5), SharedDelta(6)):
        assert decompose(weights, kind).report.error < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": 0}, "starts must be an integer of at least 1; got 0"),
        ({"sweeps": 2.5}, "sweeps must be an integer of at least 1; got 2.5"),
        ({"polish": -1}, "polish must be an integer of at least 0; got -1"),
        ({"tolerance": 1.0}, r"tolerance of a search must be .* in \[0, 1\); got 1.0"),
        ({"tolerance": np.nan}, "tolerance of a search"),
    ],
)
def test_searches_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Search(**change)
