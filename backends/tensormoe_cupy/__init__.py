"""tensormoe on CuPy: NumPy's layers on an NVIDIA GPU."""

from __future__ import annotations

from tensormoe._extras import missing

if absent := missing("tensormoe_cupy", ("cupy",), "cupy"):
    raise absent

from tensormoe_cupy._adapter import BACKEND as BACKEND
from tensormoe_cupy._adapter import CupyBackend as CupyBackend
from tensormoe_cupy._layers import MuMoE as MuMoE
from tensormoe_cupy._layers import MuMoEEmbedding as MuMoEEmbedding
from tensormoe_cupy._layers import MuMoEMLP as MuMoEMLP
from tensormoe_numpy import Adam as Adam
from tensormoe_numpy import Gradients as Gradients
from tensormoe_numpy import Prepared as Prepared

__all__ = [
    "BACKEND",
    "Adam",
    "CupyBackend",
    "Gradients",
    "MuMoE",
    "MuMoEEmbedding",
    "MuMoEMLP",
    "Prepared",
]
