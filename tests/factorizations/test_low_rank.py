"""Low rank: products of every expert's own, and the best ones by singular values."""

from __future__ import annotations

import numpy as np
import pytest

from tensormoe import LayerSpec, LowRank, select_rank
from tensormoe.decomposition import Moments, decompose
from tensormoe.errors import RankError
from tensormoe_numpy import MuMoE

NOISE = np.random.default_rng(0)


def test_experts_share_nothing() -> None:
    made = MuMoE(7, 5, (3, 2), LowRank(2), dtype="float64", seed=0)
    assert made.spec.shapes == {
        "input": (7, 3, 2, 2),
        "output": (5, 3, 2, 2),
        "bias": (3, 2, 2),
    }
    before = made.expert(1, 1)[0].copy()
    made.factors["input"][:, 0, 0] = 0.0
    assert not made.expert(0, 0)[0].any()
    np.testing.assert_array_equal(made.expert(1, 1)[0], before)


def test_the_largest_rank_within_a_budget_is_selected() -> None:
    assert select_rank("low_rank", 40, 30, 8, budget=8 * 5 * 70, gate=None, bias=False) == 5


@pytest.mark.parametrize("rank", [0, (2, 3), 1.5])
def test_ranks_that_cannot_be(rank: object) -> None:
    with pytest.raises(RankError, match="rank must be"):
        LowRank(rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(5, 24, 16), (4, 12, 30)])
def test_a_decomposition_is_the_svd_of_every_expert(shape: tuple[int, int, int]) -> None:
    weights = NOISE.standard_normal(shape)
    found = decompose(weights, LowRank(6), compare=False)
    layer = MuMoE.restore(found.config(), found.parameters)
    for expert, matrix in enumerate(weights):
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        np.testing.assert_allclose(layer.expert(expert)[0], u[:, :6] * s[:6] @ v[:6], atol=1e-10)


def test_weighted_by_moments_it_is_the_whitened_svd() -> None:
    weights = NOISE.standard_normal((3, 10, 8))
    mixed = NOISE.standard_normal((10, 10))
    moments = Moments(inputs=mixed @ mixed.T, ridge=1e-9)
    found = decompose(weights, LowRank(3), moments=moments, compare=False)
    root = np.linalg.cholesky(moments.inputs)
    layer = MuMoE.restore(found.config(), found.parameters)
    for expert, matrix in enumerate(weights):
        u, s, v = np.linalg.svd(root.T @ matrix, full_matrices=False)
        want = np.linalg.solve(root.T, u[:, :3] * s[:3] @ v[:3])
        np.testing.assert_allclose(layer.expert(expert)[0], want, atol=1e-6)


def test_capacity() -> None:
    spec = LayerSpec(9, 7, (4, 3), LowRank(5), bias=False)
    assert (spec.expert_rank, spec.expert_span, spec.num_parameters) == (5, 12, 12 * 5 * 16)
