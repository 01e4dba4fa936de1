"""Experts of sparse models, compressed in place: factorized, merged, or pruned."""

from __future__ import annotations

from tensormoe_torch.compression._compress import compress
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._reduce import reduce_experts
from tensormoe_torch.compression._reduce_report import ReducedModule, ReductionReport
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
    "ReducedModule",
    "ReductionReport",
    "compress",
    "reduce_experts",
]
