"""tensormoe on NumPy: layers that run, train and save with nothing but NumPy."""

from __future__ import annotations

from tensormoe._extras import missing

if absent := missing("tensormoe_numpy", ("numpy", "scipy"), "numpy"):
    raise absent

from tensormoe_numpy._activations import ACTIVATIONS
from tensormoe_numpy._adam import Adam
from tensormoe_numpy._adapter import BACKEND, NumpyBackend
from tensormoe_numpy._base import Gradients
from tensormoe_numpy._embedding import MuMoEEmbedding
from tensormoe_numpy._layer import MuMoE, Prepared
from tensormoe_numpy._like_numpy import NumpyLikeBackend
from tensormoe_numpy._mlp import MuMoEMLP
from tensormoe_numpy.mixtures import (
    CartesianMoE,
    ConvMoE,
    DiverseMoE,
    MonetMoE,
    MultiGateMoE,
    ProductMoE,
    ResidualExperts,
    SoftMoE,
    SparseMoE,
)

__all__ = [
    "ACTIVATIONS",
    "BACKEND",
    "Adam",
    "CartesianMoE",
    "ConvMoE",
    "DiverseMoE",
    "Gradients",
    "MonetMoE",
    "MuMoE",
    "MuMoEEmbedding",
    "MuMoEMLP",
    "MultiGateMoE",
    "NumpyBackend",
    "NumpyLikeBackend",
    "Prepared",
    "ProductMoE",
    "ResidualExperts",
    "SoftMoE",
    "SparseMoE",
]
