"""tensormoe on NumPy: layers that run, train and save with nothing but NumPy."""

from __future__ import annotations

from tensormoe._extras import missing

if absent := missing("tensormoe_numpy", ("numpy", "scipy"), "numpy"):
    raise absent

from tensormoe_numpy._activations import ACTIVATIONS as ACTIVATIONS
from tensormoe_numpy._adam import Adam as Adam
from tensormoe_numpy._adapter import BACKEND as BACKEND
from tensormoe_numpy._adapter import NumpyBackend as NumpyBackend
from tensormoe_numpy._base import Gradients as Gradients
from tensormoe_numpy._embedding import MuMoEEmbedding as MuMoEEmbedding
from tensormoe_numpy._layer import MuMoE as MuMoE
from tensormoe_numpy._layer import Prepared as Prepared
from tensormoe_numpy._like_numpy import NumpyLikeBackend as NumpyLikeBackend
from tensormoe_numpy._mlp import MuMoEMLP as MuMoEMLP

__all__ = [
    "ACTIVATIONS",
    "BACKEND",
    "Adam",
    "Gradients",
    "MuMoE",
    "MuMoEEmbedding",
    "MuMoEMLP",
    "NumpyBackend",
    "NumpyLikeBackend",
    "Prepared",
]
