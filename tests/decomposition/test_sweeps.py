"""One sweep: what it solves, what it says of the error, and the sizes of factors after it."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest

from tensormoe import BaseDelta, LayerSpec, Tucker
from tensormoe.backend import backend_of
from tensormoe.decomposition._als import _spans, solve_factor, sweep, uses_tree
from tensormoe.decomposition._contractions import Structure, structures
from tensormoe.decomposition._search import Problem
from tensormoe.decomposition._solve import inverse
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._starts import given
from tensormoe.factorizations import INPUT, OUTPUT
from tests._kinds import ONE_LEVEL
from tests.decomposition._cases import weights_of


def setting(kind: Any, rng: np.random.Generator, dtype: str = "float64") -> Any:
    """A spec, its terms, a random tensor and random factors, of very different sizes."""
    spec = LayerSpec(12, 9, 6, kind, bias=False)
    network = spec.network
    terms = structures(network, (*network.expert_legs, INPUT, OUTPUT), network.sizes)
    weights = rng.standard_normal((6, 12, 9)).astype(dtype)
    source = Source(weights, backend_of(weights))
    factors: dict[str, Any] = {}
    for term in terms:
        factors |= given(term, source)
        for power, factor in enumerate(term.wanted):
            drawn = rng.standard_normal(term.shape(factor)).astype(dtype)
            factors[factor.name] = drawn * 10.0**power
    return spec, terms, source, factors


def true_error(spec: LayerSpec, factors: Any, source: Source) -> float:
    made = weights_of(spec, {name: factors[name] for name in spec.shapes})
    return float(np.linalg.norm(source.array - made) / np.linalg.norm(source.array))


@pytest.mark.parametrize("kind", ONE_LEVEL, ids=str)
def test_a_sweep_leaves_factors_of_one_size(kind: Any, rng: np.random.Generator) -> None:
    """All of a term but the last one, which has the scale; and says the error of what it leaves."""
    spec, terms, source, factors = setting(kind, rng)
    for _ in range(3):
        factors, error = sweep(terms, source, source.squared_norm(), factors, 0)
        for term in terms:
            *others, last = (factor.name for factor in term.wanted)
            for name in others:
                assert abs(factors[name]).max() == pytest.approx(1.0, rel=1e-12)
            assert np.isfinite(factors[last]).all()
        assert error == pytest.approx(true_error(spec, factors, source), rel=1e-9)


def test_factors_do_not_run_off_in_float32(rng: np.random.Generator) -> None:
    """Sizes of 1e30 and 1e-30 that cancel are taken out before squares are taken."""
    spec, terms, source, factors = setting(Tucker((3, 4, 5)), rng, "float32")
    names = [factor.name for factor in terms[0].wanted]
    factors = {name: factors[name] / abs(factors[name]).max() for name in names}
    with np.errstate(over="raise", invalid="raise"):
        for _ in range(40):
            # a gauge that a search may drift in: the same tensor from factors of other sizes
            factors[names[0]] = factors[names[0]] * np.float32(1e3)
            factors[names[-1]] = factors[names[-1]] * np.float32(1e-3)
            factors, _ = sweep(terms, source, source.squared_norm(), factors, 0)
    assert max(abs(factors[name]).max() for name in names[:-1]) == pytest.approx(1.0)
    assert true_error(spec, factors, source) < 1.0


@pytest.mark.parametrize("kind", ONE_LEVEL, ids=str)
def test_a_sweep_is_the_same_with_and_without_room(kind: Any, rng: np.random.Generator) -> None:
    """Whether the tensor is contracted with the last factor once for all others, or each time."""
    _, terms, source, factors = setting(kind, rng)
    norm = source.squared_norm()
    alone = sweep(terms, source, norm, dict(factors), 0)
    roomy = sweep(terms, source, norm, dict(factors), 10**6)
    assert not any(uses_tree(term, 0) for term in terms)
    assert alone[1] == pytest.approx(roomy[1], rel=1e-9)
    for name, array in alone[0].items():
        np.testing.assert_allclose(roomy[0][name], array, rtol=1e-6, atol=1e-9)


def test_room_is_for_twice_what_is_made(rng: np.random.Generator) -> None:
    _, (term,), _, _ = setting(Tucker((3, 4, 5)), rng)
    # the tensor with its last factor, the output's: 6 × 12 × 5
    assert not uses_tree(term, 2 * 6 * 12 * 5 - 1)
    assert uses_tree(term, 2 * 6 * 12 * 5)


def dense(term: Structure, name: str, factors: Any) -> np.ndarray:
    """The tensor as a matrix that multiplies one factor's entries."""
    shape = term.shape(term.factor(name))
    columns = []
    for place in range(int(np.prod(shape))):
        unit = np.zeros(shape)
        unit.flat[place] = 1.0
        letters: dict[str, str] = {}
        for factor in term.factors:
            for leg in factor.legs:
                letters.setdefault(leg, chr(97 + len(letters)))
        inputs = ["".join(letters[leg] for leg in factor.legs) for factor in term.factors]
        output = "".join(letters[leg] for leg in term.open_legs)
        arrays = [unit if each.name == name else factors[each.name] for each in term.factors]
        columns.append(np.einsum(f"{','.join(inputs)}->{output}", *arrays).ravel())
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("kind", ONE_LEVEL[:5], ids=str)
def test_each_factor_is_a_least_squares_solution(kind: Any, rng: np.random.Generator) -> None:
    _, (term,), source, factors = setting(kind, rng)
    for factor in term.wanted:
        found, explained = solve_factor(term, factor.name, source, factors, 0.0)
        matrix = dense(term, factor.name, factors)
        wanted, *_ = np.linalg.lstsq(matrix, source.array.ravel(), rcond=None)
        made = matrix @ found.ravel()
        np.testing.assert_allclose(made, matrix @ wanted, rtol=1e-7, atol=1e-7)
        # the part of the squared norm that is no longer missing
        assert explained == pytest.approx(made @ made, rel=1e-7)


@pytest.mark.parametrize("kind", ONE_LEVEL[:5], ids=str)
def test_equations_are_solved_for_the_change(kind: Any, rng: np.random.Generator) -> None:
    """Damped directions of a factor stay as they are, and are not set to zero."""
    _, (term,), source, factors = setting(kind, rng)
    for factor in term.wanted:
        found, _ = solve_factor(term, factor.name, source, factors, 1e12)
        np.testing.assert_allclose(found, factors[factor.name], rtol=1e-3, atol=1e-3)


def test_sums_are_swept_term_by_term(rng: np.random.Generator) -> None:
    """Each for what the others leave: the last one is best for the others as they are."""
    _, terms, source, factors = setting(BaseDelta(2), rng)
    norm = source.squared_norm()
    found, error = sweep(terms, source, norm, factors, 0)
    left = source.without(terms[:-1], found)
    last = [factor.name for factor in terms[-1].wanted][-1]
    best, _ = solve_factor(terms[-1], last, left, found, 0.0)
    np.testing.assert_allclose(best, found[last], rtol=1e-6, atol=1e-9)
    assert error == pytest.approx(Problem(terms, source, norm, 0).error(found), rel=1e-9)


def test_an_inverse_is_of_components_alike(rng: np.random.Generator) -> None:
    scale = np.logspace(0, -3, 6)
    factor = rng.standard_normal((40, 6)) * scale
    gram = factor.T @ factor
    np.testing.assert_allclose(inverse(gram) @ gram, np.eye(6), atol=1e-9)
    # a ridge of the diagonal's size, whatever the components' sizes
    damped = inverse(gram, 1.0)
    diagonal = np.diag(np.diag(gram))
    np.testing.assert_allclose(damped, np.linalg.inv(gram + diagonal), rtol=1e-9)
    # several at once, each by itself
    both = inverse(np.stack([gram, 1e6 * gram]))
    np.testing.assert_allclose(both[1] * 1e6, both[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_inverse_of_singular_matrices_is_finite(dtype: str, rng: np.random.Generator) -> None:
    one = np.ones((5, 5), dtype)
    zero = np.zeros((5, 5), dtype)
    low = rng.standard_normal((5, 2)).astype(dtype)
    for gram in (one, zero, low @ low.T):
        found = inverse(gram)
        assert np.isfinite(found).all()
        # what rounding hides is not followed: of the diagonal's ones, to within their number
        assert abs(found).max() <= 2.0 / (5 * np.finfo(dtype).eps) / max(np.diag(gram).min(), 1e-3)


def test_components_that_are_rounding_are_not_followed() -> None:
    """A residual of rounding errors, divided by almost zero, would be huge."""
    sizes = np.array([1.0, 1e-20], "float32")
    gram = np.diag(sizes**2 + np.float32(1e-38))
    step = inverse(gram) @ (sizes * 1e-7)
    assert abs(step[1]) < 1.0


def test_elimination_that_ends_at_a_zero_is_tried_with_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The ridge doubles until there is an inverse."""
    added, real = [], np.linalg.inv

    def failing(matrix: Any) -> Any:
        added.append(float(matrix[0, 0]) - 1.0)
        if len(added) < 4:
            raise np.linalg.LinAlgError
        return real(matrix)

    monkeypatch.setattr(np.linalg, "inv", failing)
    found = inverse(np.eye(3), 1e-3)
    assert added == pytest.approx([1e-3, 2e-3, 4e-3, 8e-3])
    np.testing.assert_allclose(found, np.eye(3) / (1.0 + added[-1]))


@pytest.mark.parametrize("shape", [(1, 100_000), (3, 40, 5_000), (200, 5_000), (5_000, 70), (2, 0)])
def test_equations_are_solved_for_many_columns_at_a_time(shape: tuple[int, ...]) -> None:
    """As few calls as small copies allow: a column of one bond is one entry."""
    spans = [*_spans(shape, 1)]
    columns = [k for span in spans for k in range(shape[-1])[span]]
    assert columns == [*range(shape[-1])]
    rows = prod(shape[:-1])
    assert all(rows * len(range(shape[-1])[span]) <= max(4096, 32 * rows) for span in spans)
    assert len(spans) <= 1 + shape[-1] / max(32, 4096 // rows)
