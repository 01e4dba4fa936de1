"""Experts of sparse models, compressed in place: factorized, merged, or pruned.

Before that, :func:`calibrate` gathers second moments of what experts get and give on data; after
it, :func:`evaluate` says what became of the model's predictions, and :func:`heal` trains the model
to predict again what the original does.
"""

from __future__ import annotations

from tensormoe_torch.compression._calibrate import calibrate, calibration_memory
from tensormoe_torch.compression._calibrate_checkpoint import (
    CalibrationProgress,
    calibrate_checkpoint,
)
from tensormoe_torch.compression._compare import Comparison, compare_checkpoints
from tensormoe_torch.compression._compress import compress
from tensormoe_torch.compression._evaluate import Evaluation, LayerEffect, evaluate
from tensormoe_torch.compression._evaluate_checkpoints import evaluate_checkpoints
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._healing import (
    Healing,
    HealingProgress,
    HealingReport,
    heal,
    heal_checkpoint,
)
from tensormoe_torch.compression._pairs import to_linear_pairs
from tensormoe_torch.compression._reduce import reduce_experts
from tensormoe_torch.compression._reduce_checkpoint import (
    ReductionProgress,
    reduce_checkpoint,
)
from tensormoe_torch.compression._reduce_report import ReducedModule, ReductionReport
from tensormoe_torch.compression._report import (
    CompressedModule,
    CompressedProjection,
    CompressionReport,
)
from tensormoe_torch.compression._text import (
    TextWindows,
    load_model,
    load_tokens,
    next_token_loss,
)

__all__ = [
    "CalibrationProgress",
    "Comparison",
    "CompressedModule",
    "CompressedProjection",
    "CompressionReport",
    "Evaluation",
    "FactorizedExperts",
    "Healing",
    "HealingProgress",
    "HealingReport",
    "LayerEffect",
    "ReducedModule",
    "ReductionProgress",
    "ReductionReport",
    "TextWindows",
    "calibrate",
    "calibrate_checkpoint",
    "calibration_memory",
    "compare_checkpoints",
    "compress",
    "evaluate",
    "evaluate_checkpoints",
    "heal",
    "heal_checkpoint",
    "load_model",
    "load_tokens",
    "next_token_loss",
    "reduce_checkpoint",
    "reduce_experts",
    "to_linear_pairs",
]
