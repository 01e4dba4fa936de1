"""Mixtures whose experts are run one by one."""

from __future__ import annotations

from tensormoe_jax.nnx.mixtures._base import MixtureModule as MixtureModule
from tensormoe_jax.nnx.mixtures._cartesian import CartesianMoE as CartesianMoE
from tensormoe_jax.nnx.mixtures._conv import ConvMoE as ConvMoE
from tensormoe_jax.nnx.mixtures._diverse import DiverseMoE as DiverseMoE
from tensormoe_jax.nnx.mixtures._monet import MonetMoE as MonetMoE
from tensormoe_jax.nnx.mixtures._multi_gate import MultiGateMoE as MultiGateMoE
from tensormoe_jax.nnx.mixtures._product import ProductMoE as ProductMoE
from tensormoe_jax.nnx.mixtures._residual import AdapterFilter as AdapterFilter
from tensormoe_jax.nnx.mixtures._residual import ResidualExperts as ResidualExperts
from tensormoe_jax.nnx.mixtures._residual import adapter_filter as adapter_filter
from tensormoe_jax.nnx.mixtures._soft import SoftMoE as SoftMoE
from tensormoe_jax.nnx.mixtures._sparse import SparseMoE as SparseMoE

__all__ = [
    "AdapterFilter",
    "CartesianMoE",
    "ConvMoE",
    "DiverseMoE",
    "MixtureModule",
    "MonetMoE",
    "MultiGateMoE",
    "ProductMoE",
    "ResidualExperts",
    "SoftMoE",
    "SparseMoE",
    "adapter_filter",
]
