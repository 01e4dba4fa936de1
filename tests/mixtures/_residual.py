"""Residual mixtures that their tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tensormoe_jax.equinox
import tensormoe_jax.nnx
from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Hadamard,
    SharedBasis,
    SharedDelta,
    Tucker,
)
from tensormoe import TensorRing as Ring
from tensormoe import TensorTrain as Train
from tensormoe_torch import ResidualExperts

FACTORIZATIONS = {
    "cp": CP(3),
    "ring": Ring(2),
    "train": Train(2),
    "tucker": Tucker(3),
    "hadamard": Hadamard(),
    "dense": Dense(),
    "base and deltas": BaseDelta(2),
    "shared delta": SharedDelta(2),
    "shared basis": SharedBasis((2, 3)),
}
NNX, EQUINOX = tensormoe_jax.nnx, tensormoe_jax.equinox

each_factorization = pytest.mark.parametrize(
    "factorization", FACTORIZATIONS.values(), ids=FACTORIZATIONS.keys()
)


def base_of(rows: int = 6, columns: int = 5, **options: Any) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(rows, columns, **options)


def layer_of(base: nn.Module | None = None, **options: Any) -> ResidualExperts:
    options = {"experts": 4, "rank": 2} | options
    torch.manual_seed(0)
    return ResidualExperts(base_of() if base is None else base, **options)


def moved(layer: ResidualExperts) -> ResidualExperts:
    """The layer with a mixture that is not zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for each in layer.adapter.parameters():
            each.normal_()
    return layer


def inputs(*shape: int, features: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, features, generator=generator, dtype=dtype)


def double(x: Any) -> Any:
    return 2 * x
