"""tensormoe on PyTorch: layers as modules, for training, compiling and exporting."""

from __future__ import annotations

from tensormoe_torch._adapter import BACKEND as BACKEND
from tensormoe_torch._adapter import TorchBackend as TorchBackend
from tensormoe_torch._embedding import MuMoEEmbedding as MuMoEEmbedding
from tensormoe_torch._gate import ExpertGate as ExpertGate
from tensormoe_torch._layer import MuMoE as MuMoE
from tensormoe_torch._mlp import MuMoEMLP as MuMoEMLP

__all__ = [
    "BACKEND",
    "ExpertGate",
    "MuMoE",
    "MuMoEEmbedding",
    "MuMoEMLP",
    "TorchBackend",
]
