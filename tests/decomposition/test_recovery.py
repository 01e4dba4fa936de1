"""Planted factors are found again: without noise to rounding, with noise to its level."""

from __future__ import annotations

import numpy as np
import pytest

from tensormoe import (
    CP,
    BaseDelta,
    Hadamard,
    LayerSpec,
    LowRank,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.decomposition import Search, decompose
from tests.decomposition._cases import NAMES, planted, relative, weights_of, with_noise

LONG = Search(starts=4, sweeps=1000)
CASES = 100


@pytest.mark.parametrize("name", NAMES)
def test_planted_ranks_are_recovered(name: str) -> None:
    """To 1e-6 in at least 95 of 100 random cases."""
    missed = []
    for seed in range(CASES):
        spec, weights = planted(name, seed)
        found = decompose(weights, spec.factorization, search=LONG, compare=False, seed=seed)
        error = relative(weights_of(spec, found.factors), weights)
        assert error == pytest.approx(found.report.error, rel=1e-3, abs=1e-12)
        if error > 1e-6:
            missed.append((seed, error))
    assert len(missed) <= 5, missed


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_what_is_left(name: str) -> None:
    """The error is within 2 % of the planted noise level, in as many cases."""
    missed = []
    for seed in range(CASES):
        spec, clean = planted(name, seed)
        weights, level = with_noise(clean, 0.1, seed)
        found = decompose(weights, spec.factorization, search=LONG, compare=False, seed=seed)
        if found.report.error > 1.02 * level:
            missed.append((seed, found.report.error / level))
    assert len(missed) <= 5, missed


@pytest.mark.parametrize("name", NAMES)
def test_large_tensors_go_through_a_core(name: str) -> None:
    """Modes much larger than the bonds: the same factors from a compressed tensor."""
    kinds = {
        "cp": CP(4),
        "tensor_ring": TensorRing((2, 2, 2)),
        "tensor_train": TensorTrain((3, 4)),
        "tucker": Tucker((3, 4, 4)),
        "low_rank": LowRank(3),
        "hadamard": Hadamard(),
        "shared_basis": SharedBasis((3, 4)),
        "base_delta": BaseDelta(3),
        "shared_delta": SharedDelta(3),
    }
    spec = LayerSpec(80, 70, 6, kinds[name], bias=False)
    rng = np.random.default_rng(0)
    factors = {key: rng.standard_normal(shape) for key, shape in spec.shapes.items()}
    clean = weights_of(spec, factors)
    found = decompose(clean, spec.factorization, search=LONG)
    assert found.report.error < 1e-6
    weights, level = with_noise(clean, 0.2, 1)
    found = decompose(weights, spec.factorization, search=LONG)
    assert found.report.error <= 1.02 * level
    history = found.report.history
    assert history[-1] == pytest.approx(found.report.error, rel=1e-3)
