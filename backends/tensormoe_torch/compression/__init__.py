"""Experts of sparse models, compressed in place: their router stays."""

from __future__ import annotations

from tensormoe_torch.compression._compress import compress
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._report import (
    CompressedModule,
    CompressedProjection,
    CompressionReport,
)

__all__ = [
    "CompressedModule",
    "CompressedProjection",
    "CompressionReport",
    "FactorizedExperts",
    "compress",
]
