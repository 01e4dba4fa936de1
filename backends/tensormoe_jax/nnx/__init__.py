"""tensormoe's layers as modules of Flax NNX.

>>> import jax.numpy as jnp
>>> from flax import nnx
>>> from tensormoe_jax.nnx import MuMoE
>>> layer = MuMoE(64, 10, experts=32, factorization="cp", rank=16, rngs=nnx.Rngs(0))
>>> layer(jnp.ones((5, 7, 64))).shape
(5, 7, 10)
"""

from __future__ import annotations

from tensormoe._extras import missing

if absent := missing("tensormoe_jax.nnx", ("flax",), "flax"):
    raise absent

from tensormoe_jax.nnx._embedding import MuMoEEmbedding
from tensormoe_jax.nnx._gate import ExpertGate
from tensormoe_jax.nnx._layer import MuMoE
from tensormoe_jax.nnx._mlp import MuMoEMLP
from tensormoe_jax.nnx._parallel import parallelize
from tensormoe_jax.nnx._rules import parameter_rules
from tensormoe_jax.nnx.mixtures import (
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
]
