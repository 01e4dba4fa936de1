"""Mixtures whose experts are run one by one, as modules."""

from __future__ import annotations

from tensormoe_torch.mixtures._base import MixtureModule as MixtureModule
from tensormoe_torch.mixtures._router import SparseRouter as SparseRouter
from tensormoe_torch.mixtures._soft import SoftMoE as SoftMoE
from tensormoe_torch.mixtures._soft import SoftRouter as SoftRouter
from tensormoe_torch.mixtures._sparse import SparseMoE as SparseMoE

__all__ = ["MixtureModule", "SoftMoE", "SoftRouter", "SparseMoE", "SparseRouter"]
