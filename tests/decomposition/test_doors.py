"""Arrays that cannot be decomposed since they are sparse, nested, masked, or without values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tensormoe.decomposition import decompose
from tensormoe.errors import BackendError, ShapeError, SpecError

WEIGHTS = torch.ones(3, 4, 5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (WEIGHTS.to_sparse(), "plain and dense; got torch.Tensor"),
        (
            torch.nested.nested_tensor([WEIGHTS[0]] * 3, layout=torch.jagged),
            "plain and dense; got torch.NestedTensor",
        ),
        (WEIGHTS.to("meta"), "weights must have values; got arrays without .* Load them first"),
        (np.ma.masked_array(np.ones((3, 4, 5)), mask=True), "got numpy.MaskedArray"),
    ],
    ids=["sparse", "nested", "meta", "masked"],
)
def test_weights_that_are_not_plain_arrays(weights: Any, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        decompose(weights, "cp", rank=2)


def test_a_list() -> None:
    with pytest.raises(ShapeError, match=r"weights must be one array .*; got a list of 1. Stack"):
        decompose([[[1.0]]], "cp", rank=2)


def test_traced_weights() -> None:
    def traced(weights: jax.Array) -> jax.Array:
        return decompose(weights, "cp", rank=2).factors["input"]

    with pytest.raises(BackendError, match="decompose outside transformations"):
        jax.jit(traced)(jnp.ones((3, 4, 5)))


@pytest.mark.parametrize("seed", [None, True, 1.5, -1, "a", [1, 2]])
def test_seeds(seed: Any) -> None:
    with pytest.raises(SpecError, match="seed must be a non-negative integer; got"):
        decompose(np.ones((3, 4, 5)), "cp", rank=2, seed=seed)
