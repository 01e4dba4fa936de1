"""tensormoe on CuPy: NumPy's layers on an NVIDIA GPU."""

from __future__ import annotations

from tensormoe._extras import missing

if absent := missing("tensormoe_cupy", ("cupy",), "cupy"):
    raise absent

from tensormoe_cupy._adapter import BACKEND, CupyBackend
from tensormoe_cupy._layers import (
    CartesianMoE,
    ConvMoE,
    DiverseMoE,
    MonetMoE,
    MultiGateMoE,
    MuMoE,
    MuMoEEmbedding,
    MuMoEMLP,
    ProductMoE,
    ResidualExperts,
    SoftMoE,
    SparseMoE,
)
from tensormoe_numpy import Adam, Gradients, Prepared

__all__ = [
    "BACKEND",
    "Adam",
    "CartesianMoE",
    "ConvMoE",
    "CupyBackend",
    "DiverseMoE",
    "Gradients",
    "MonetMoE",
    "MuMoE",
    "MuMoEEmbedding",
    "MuMoEMLP",
    "MultiGateMoE",
    "Prepared",
    "ProductMoE",
    "ResidualExperts",
    "SoftMoE",
    "SparseMoE",
]
