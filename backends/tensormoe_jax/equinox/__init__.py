"""tensormoe's layers as modules of Equinox.

>>> import jax, jax.numpy as jnp
>>> from tensormoe_jax.equinox import MuMoE
>>> layer = MuMoE(64, 10, experts=32, factorization="cp", rank=16, key=jax.random.key(0))
>>> layer(jnp.ones((5, 7, 64))).shape
(5, 7, 10)
"""

from __future__ import annotations

from tensormoe._extras import missing

if absent := missing("tensormoe_jax.equinox", ("equinox",), "equinox"):
    raise absent

from tensormoe_jax.equinox._embedding import MuMoEEmbedding
from tensormoe_jax.equinox._gate import ExpertGate
from tensormoe_jax.equinox._layer import MuMoE
from tensormoe_jax.equinox._mlp import MuMoEMLP
from tensormoe_jax.equinox._parallel import parallelize, partition_specs
from tensormoe_jax.equinox._rules import parameter_rules
from tensormoe_jax.equinox.mixtures import (
    CartesianMoE,
    ConvMoE,
    DiverseMoE,
    MonetMoE,
    MultiGateMoE,
    ProductMoE,
    ResidualExperts,
    SoftMoE,
    SparseMoE,
    adapter_filter,
)

__all__ = [
    "CartesianMoE",
    "ConvMoE",
    "DiverseMoE",
    "ExpertGate",
    "MonetMoE",
    "MuMoE",
    "MuMoEEmbedding",
    "MuMoEMLP",
    "MultiGateMoE",
    "ProductMoE",
    "ResidualExperts",
    "SoftMoE",
    "SparseMoE",
    "adapter_filter",
    "parallelize",
    "parameter_rules",
    "partition_specs",
]
