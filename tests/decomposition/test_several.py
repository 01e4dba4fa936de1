"""Several factorizations to choose from, and moments of every expert's own inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensormoe import CP, LowRank, SharedBasis
from tensormoe.decomposition import Moments, Search, decompose
from tensormoe.errors import BudgetError, ShapeError, SpecError
from tensormoe_numpy import MuMoE

RNG = np.random.default_rng(0)
SHORT = Search(starts=1, sweeps=10, polish=0)


def apart(count: int = 5, rank: int = 2) -> Any:
    """Experts of low rank that share nothing."""
    return RNG.standard_normal((count, 16, rank)) @ RNG.standard_normal((count, rank, 12))


def alike(count: int = 5) -> Any:
    """Experts that are mixtures of a few rank-one matrices."""
    left, right = RNG.standard_normal((16, 4)), RNG.standard_normal((12, 4))
    return np.einsum("nr,ir,or->nio", RNG.standard_normal((count, 4)), left, right)


def test_the_one_that_loses_least_is_chosen() -> None:
    found = decompose(apart(), "auto", budget=5 * 2 * 28, search=SHORT)
    assert found.spec.factorization == LowRank(2)
    assert found.report.error < 1e-6
    found = decompose(alike(), "auto", budget=4 * 33, search=Search(starts=4, sweeps=60))
    assert found.spec.factorization == CP(4)
    errors = dict(found.report.tried)
    assert errors[CP(4)] == min(errors.values())
    assert len({kind.name for kind in errors}) > 3


def test_only_those_that_are_listed_are_tried() -> None:
    found = decompose(alike(), ("low_rank", SharedBasis), budget=150, search=SHORT)
    assert {kind.name for kind, _ in found.report.tried} == {"low_rank", "shared_basis"}
    shown = found.report.to_dict()["tried"]
    assert {each["name"] for each in shown} == {"low_rank", "shared_basis"}
    assert "of those tried the closest" in str(found.report)


def test_those_that_a_budget_leaves_out_are_not_tried() -> None:
    # a base alone has 192
    found = decompose(alike(), ("base_delta", "low_rank"), budget=150, search=SHORT)
    assert [kind.name for kind, _ in found.report.tried] == ["low_rank"]
    with pytest.raises(BudgetError, match="base_delta"):
        decompose(alike(), ("base_delta", "dense"), budget=150)


@pytest.mark.parametrize(
    ("choice", "options", "message"),
    [
        ((), {"budget": 0.5}, "at least one"),
        (("cp", CP(3)), {"budget": 0.5}, "names or classes"),
        (("cp", "nothing"), {"budget": 0.5}, "nothing"),
        ("auto", {"rank": 3}, "within a budget"),
        ("auto", {"tolerance": 0.1}, "within a budget"),
        ("auto", {}, "within a budget"),
    ],
)
def test_choices_that_cannot_be(choice: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        decompose(alike(), choice, **options)


def spread(count: int, size: int) -> Any:
    """Moments with a few large directions, other ones for every expert."""
    found = []
    for _ in range(count):
        turned = np.linalg.qr(RNG.standard_normal((size, size)))[0]
        found.append(turned * np.geomspace(100.0, 0.01, size) @ turned.T)
    return np.stack(found)


def test_every_expert_is_weighted_by_its_own_inputs() -> None:
    weights, moments = RNG.standard_normal((5, 16, 12)), spread(5, 16)
    own = Moments(moments, ridge=1e-9)
    found = decompose(weights, LowRank(3), moments=own, compare=False)
    layer = MuMoE.restore(found.config(), found.parameters)
    for expert, matrix in enumerate(weights):
        root = np.linalg.cholesky(moments[expert])
        u, s, v = np.linalg.svd(root.T @ matrix, full_matrices=False)
        want = np.linalg.solve(root.T, u[:, :3] * s[:3] @ v[:3])
        np.testing.assert_allclose(layer.expert(expert)[0], want, rtol=1e-3, atol=1e-5)
    pooled = decompose(weights, LowRank(3), moments=own.pooled(), compare=False)
    other = MuMoE.restore(pooled.config(), pooled.parameters)
    pairs = [(w, w - other.expert(n)[0]) for n, w in enumerate(weights)]
    assert found.report.weighted_error is not None
    assert found.report.weighted_error < 0.9 * own.error(pairs)


@pytest.mark.parametrize("bias", [False, True])
def test_networks_with_a_shared_side_are_weighted_by_the_mean(bias: bool) -> None:
    weights, moments = RNG.standard_normal((5, 16, 12)), spread(5, 16 + bias)
    biases = RNG.standard_normal((5, 12)) if bias else None
    own = Moments(moments)
    options: Any = {"bias": biases, "compare": False, "search": SHORT}
    found = decompose(weights, CP(6), moments=own, **options)
    again = decompose(weights, CP(6), moments=own.pooled(), **options)
    np.testing.assert_array_equal(found.factors["input"], again.factors["input"])
    # the errors are those of every expert's own
    assert found.report.weighted_error != again.report.weighted_error
    # one with its own input side, biases included
    mine = decompose(weights, "low_rank", rank=4, moments=own, **options)
    theirs = decompose(weights, "low_rank", rank=4, moments=own.pooled(), **options)
    assert mine.report.weighted_error is not None
    pairs = []
    layer = MuMoE.restore(theirs.config(), theirs.parameters)
    for n in range(5):
        matrix, row = layer.expert(n)
        whole = weights[n] if biases is None else np.concatenate([weights[n], biases[n : n + 1]])
        near = matrix if row is None else np.concatenate([matrix, row[None]])
        pairs.append((whole, whole - near))
    assert mine.report.weighted_error < own.error(pairs)


def test_choices_are_compared_in_the_moments_of_every_expert() -> None:
    weights, moments = RNG.standard_normal((5, 16, 12)), Moments(spread(5, 16))
    found = decompose(
        weights, ("low_rank", "cp", "tucker"), budget=0.4, moments=moments, search=SHORT
    )
    errors = dict(found.report.tried)
    assert found.report.weighted_error == pytest.approx(errors[found.spec.factorization], rel=1e-4)
    assert errors[found.spec.factorization] == min(errors.values())


def test_moments_of_other_experts_are_refused() -> None:
    with pytest.raises(ShapeError, match="experts of moments must have 4"):
        decompose(apart(4), LowRank(2), moments=Moments(spread(5, 16)))
    with pytest.raises(ShapeError, match="one level"):
        decompose(RNG.standard_normal((2, 2, 6, 5)), LowRank(2), moments=Moments(spread(2, 6)))
    few = Moments(spread(5, 16), experts=np.ones(4))
    with pytest.raises(ShapeError, match="as many as inputs"):
        decompose(apart(5), LowRank(2), moments=few)
    with pytest.raises(ShapeError, match="symmetric"):
        Moments(RNG.standard_normal((3, 4, 4)))


def test_factors_are_compared_as_they_are_stored() -> None:
    """Shared matrices that cancel one another fit best, and lose all of it in four bits."""
    rng = np.random.default_rng(5)
    shared, own = rng.standard_normal((24, 3)), rng.standard_normal((6, 3, 20))
    tilt = 1e-2 * rng.standard_normal((6, 24, 3))
    weights = (shared + tilt) @ own
    for bits in (None, 4):
        found = decompose(
            weights, ("shared_basis", "low_rank"), budget=0.6, bits=bits, search=SHORT
        )
        errors = dict(found.report.tried)
        chosen = found.spec.factorization
        assert errors[chosen] == min(errors.values())
        assert found.report.error == pytest.approx(errors[chosen], rel=1e-3, abs=1e-6)


def test_weights_out_of_range_are_compared_at_their_own_scale() -> None:
    moments = Moments(spread(5, 16))
    weights = RNG.standard_normal((5, 16, 12)).astype("float32") * np.float32(1e-18)
    found = decompose(weights, ("low_rank", "cp"), budget=0.4, moments=moments, search=SHORT)
    errors = dict(found.report.tried)
    assert found.report.weighted_error == pytest.approx(errors[found.spec.factorization], rel=1e-2)
