"""Decomposition at other scales: the same factors, and reports that are true."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensormoe import CP, BaseDelta, Hadamard, Tucker
from tensormoe.decomposition import Search, decompose, error_curves
from tensormoe.testing import reconstruct_by_einsum
from tests._kinds import ONE_LEVEL
from tests.decomposition._cases import weights_of

SCALES = {"float32": (1e-35, 1e-25, 1e-12, 1e18, 1e35), "float64": (1e-300, 1e-140, 1e140, 1e300)}
QUICK = Search(starts=1, sweeps=20, polish=3)


def wide(factors: Any, scale: float, count: int) -> dict[str, Any]:
    """Factors in long double, whose range holds any scale, for a tensor near one."""
    part = np.longdouble(scale) ** (np.longdouble(-1) / count)
    return {name: np.asarray(array, np.longdouble) * part for name, array in factors.items()}


def true_errors(found: Any, weights: np.ndarray, scale: float) -> tuple[float, np.ndarray]:
    """The error of all experts and of each, in long double."""
    term, *more = found.spec.network.terms
    if more:
        made = sum_of(found, scale)
    else:
        factors = {k: v for k, v in found.factors.items() if not k.startswith("bias")}
        near = wide(factors, scale, len(term.factors))
        made = np.asarray(reconstruct_by_einsum(found.spec.factorization, near))
    given = np.asarray(weights, np.longdouble) / np.longdouble(scale)
    squares = ((given - made) ** 2).sum((-2, -1)), (given**2).sum((-2, -1))
    each = np.sqrt(squares[0] / squares[1])
    return float(np.sqrt(squares[0].sum() / squares[1].sum())), np.ravel(each).astype(float)


def sum_of(found: Any, scale: float) -> Any:
    """The tensor of a sum of networks, whose terms have different numbers of factors."""
    total: Any = 0.0
    for place, term in enumerate(found.spec.network.terms):
        factors = {}
        for index, other in enumerate(found.spec.network.terms):
            names = [each.name for each in other.factors]
            chosen = {name: found.factors[name] for name in names}
            near = wide(chosen, scale, len(term.factors) if index == place else 1)
            factors |= near if index == place else {k: 0 * v for k, v in near.items()}
        total = total + np.asarray(reconstruct_by_einsum(found.spec.factorization, factors))
    return total


def random_weights(rng: np.random.Generator) -> np.ndarray:
    return np.asarray(rng.standard_normal((5, 12, 9)) + rng.standard_normal((12, 9)))


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("kind", [*ONE_LEVEL, Hadamard()], ids=str)
def test_errors_do_not_depend_on_the_scale(kind: Any, dtype: str, rng: np.random.Generator) -> None:
    weights = random_weights(rng)
    weights /= abs(weights).max()
    wanted = decompose(weights.astype(dtype), kind, search=QUICK).report
    for scale in SCALES[dtype]:
        given = (weights * scale).astype(dtype)
        found = decompose(given, kind, search=QUICK)
        assert all(np.isfinite(array).all() for array in found.factors.values())
        report = found.report
        assert report.error == pytest.approx(wanted.error, rel=1e-3)
        assert report.svd_error == pytest.approx(wanted.svd_error, rel=1e-3)
        error, each = true_errors(found, given, scale)
        assert report.error == pytest.approx(error, rel=1e-4)
        assert report.expert_errors == pytest.approx(each, rel=1e-4)
        assert report.history[-1] == pytest.approx(error, rel=1e-3)
        # random starts have a scale of their own
        assert report.history[0] == pytest.approx(wanted.history[0], rel=1e-3)


@pytest.mark.parametrize("small", [1e-8, 1e-19, 1e-30])
def test_a_tiny_expert_is_not_reported_exact(small: float, rng: np.random.Generator) -> None:
    """Its error is relative to itself, however little it counts."""
    weights = random_weights(rng)
    weights[3] *= small
    weights = weights.astype("float32")
    for scale in (1.0, 1e-5, 1e20):
        given = (weights.astype("f8") * scale).astype("float32")
        report = (found := decompose(given, CP(4), search=QUICK)).report
        _, each = true_errors(found, given, scale)
        assert report.expert_errors == pytest.approx(each, rel=1e-3)
        assert report.expert_errors[3] > 0.1


def test_an_expert_of_zeros_is_measured_by_the_others(rng: np.random.Generator) -> None:
    weights = random_weights(rng)
    weights[1] = 0.0
    found = decompose(weights, BaseDelta(1), search=QUICK)
    made = weights_of(found.spec, found.factors)
    mean = np.linalg.norm(weights) / np.sqrt(len(weights))
    assert found.report.expert_errors[1] == pytest.approx(np.linalg.norm(made[1]) / mean)
    assert found.report.expert_errors[1] > 0.01


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [(1e-30, 1e-25), (1e25, 1e20), (1e-20, 1e20), (1e30, 1e-3)])
def test_inputs_and_biases_of_any_scale(
    sizes: tuple[float, float], weighted: bool, rng: np.random.Generator
) -> None:
    """Outputs would overflow or underflow; their relative errors do not."""
    scale, loud = sizes
    weights, bias = random_weights(rng), rng.standard_normal((5, 9))
    inputs = rng.standard_normal((40, 12)) * np.logspace(0, -1, 12)
    coefficients = rng.dirichlet(np.ones(5), 40)
    options: dict[str, Any] = {"weighted": weighted, "search": QUICK, "compare": False}

    def at(size: float, x: float, a: float) -> Any:
        given = (weights * size).astype("float32")
        return decompose(
            given,
            CP(4),
            # of the size of the outputs
            bias=(bias * size * x).astype("float32"),
            inputs=(inputs * x).astype("float32"),
            coefficients=(coefficients * a).astype("float32"),
            **options,
        ).report

    if abs(np.log10(scale * loud)) < 30 and not weighted:
        # the bias is one more row, so that sizes of inputs decide what is minimized
        assert at(scale, loud, 1.0).output_error < 1.5
    plain = at(1.0, 1.0, 1.0)
    found = at(scale, 1.0, loud)
    assert found.error == pytest.approx(plain.error, rel=1e-3)
    assert found.bias_error == pytest.approx(plain.bias_error, rel=1e-3)
    assert found.output_error == pytest.approx(plain.output_error, rel=1e-3)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_every_library(library: str, rng: np.random.Generator) -> None:
    weights = random_weights(rng)
    weights /= abs(weights).max()
    wanted = decompose(weights.astype("float32"), Tucker((2, 3, 3)), search=QUICK).report
    for scale in (1e-33, 1e33):
        given: Any = (weights * scale).astype("float32")
        if library == "torch":
            torch = pytest.importorskip("torch")
            given = torch.tensor(given)
        else:
            given = pytest.importorskip("jax.numpy").asarray(given)
        report = decompose(given, Tucker((2, 3, 3)), search=QUICK).report
        assert report.error == pytest.approx(wanted.error, rel=1e-3)
        assert report.expert_errors == pytest.approx(wanted.expert_errors, rel=1e-3)


def test_budgets_tolerances_and_curves_at_any_scale(rng: np.random.Generator) -> None:
    weights = random_weights(rng)
    tiny = (weights * 1e-28).astype("float32")
    wanted, found = (error_curves(w, ["cp"], (0.2, 0.4), search=QUICK) for w in (weights, tiny))
    for a, b in zip(wanted[0].points, found[0].points, strict=True):
        assert b.report.error == pytest.approx(a.report.error, rel=1e-2)
    assert decompose(tiny, "cp", tolerance=0.5, search=QUICK).report.error <= 0.51
