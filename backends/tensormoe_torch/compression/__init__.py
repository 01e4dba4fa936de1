"""Experts of sparse models, compressed in place: their router stays."""

from __future__ import annotations

from tensormoe_torch.compression._compress import compress as compress
from tensormoe_torch.compression._experts import FactorizedExperts as FactorizedExperts
from tensormoe_torch.compression._report import CompressedModule as CompressedModule
from tensormoe_torch.compression._report import CompressedProjection as CompressedProjection
from tensormoe_torch.compression._report import CompressionReport as CompressionReport

__all__ = [
    "CompressedModule",
    "CompressedProjection",
    "CompressionReport",
    "FactorizedExperts",
    "compress",
]
