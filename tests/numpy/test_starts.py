"""How large the NumPy layers are by default, and what they hold when they are made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensormoe import CP, TensorRing
from tensormoe_numpy import MuMoE, MuMoEEmbedding
from tests._numpy_helpers import KINDS, same


def test_seeds_mean_one_thing() -> None:
    first, second, other = (
        MuMoE(6, 5, (3, 2), TensorRing(3), seed=seed, dtype=dtype)
        for seed, dtype in ((7, "float32"), (7, "float64"), (8, "float32"))
    )
    for name, array in first.parameters.items():
        np.testing.assert_allclose(array, second.parameters[name], rtol=1e-6)
    assert not same(first, other)
    assert same(first, MuMoE(6, 5, (3, 2), TensorRing(3), seed=np.random.default_rng(7)))


def test_experts_start_with_equal_shares() -> None:
    layer = MuMoE(6, 5, (3, 2), CP(3), seed=0)
    x = np.random.default_rng(0).standard_normal((4, 6)).astype("float32")
    for level, found in enumerate(layer.coefficients(x)):
        np.testing.assert_allclose(found, 1 / layer.spec.experts[level], rtol=1e-6)


@pytest.mark.parametrize("name", ["cp", "tensor_ring", "tensor_train", "tucker"])
def test_a_layer_is_as_large_as_the_linear_layer_by_default(name: str) -> None:
    """The budget is never exceeded, and not left unused."""
    layer = MuMoE(128, 96, 64, name)
    linear = 128 * 96 + 96
    assert 0.9 * linear <= layer.spec.num_parameters <= linear
    assert layer.num_parameters == layer.spec.num_parameters + 128 * 64
    within = MuMoE(128, 96, 64, name, budget="linear")
    assert 0.9 * linear <= within.num_parameters <= linear
    assert MuMoE(128, 96, 64, name, budget=9000).num_parameters <= 9000


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_embeddings_start_with_variance_one(kind: Any) -> None:
    """As rows of ``torch.nn.Embedding``: each is used alone."""
    samples = []
    for seed in range(300):
        table = MuMoEEmbedding(20, 8, (4, 2), kind, seed=seed, dtype="float64")
        weights, bias = table.materialize()
        assert bias is None
        samples.append(np.mean(weights**2))
    error = np.std(samples) / np.sqrt(len(samples))
    assert error < 0.2
    assert abs(np.mean(samples) - 1) < 5 * error
