"""Mixtures whose experts are run one by one."""

from __future__ import annotations

from tensormoe_numpy.mixtures._base import MixtureLayer as MixtureLayer
from tensormoe_numpy.mixtures._cartesian import CartesianMoE as CartesianMoE
from tensormoe_numpy.mixtures._conv import ConvMoE as ConvMoE
from tensormoe_numpy.mixtures._diverse import DiverseMoE as DiverseMoE
from tensormoe_numpy.mixtures._monet import MonetMoE as MonetMoE
from tensormoe_numpy.mixtures._multi_gate import MultiGateMoE as MultiGateMoE
from tensormoe_numpy.mixtures._product import ProductMoE as ProductMoE
from tensormoe_numpy.mixtures._residual import ResidualExperts as ResidualExperts
from tensormoe_numpy.mixtures._soft import SoftMoE as SoftMoE
from tensormoe_numpy.mixtures._sparse import SparseMoE as SparseMoE

__all__ = [
    "CartesianMoE",
    "ConvMoE",
    "DiverseMoE",
    "MixtureLayer",
    "MonetMoE",
    "MultiGateMoE",
    "ProductMoE",
    "ResidualExperts",
    "SoftMoE",
    "SparseMoE",
]
