"""Compressed models trained to predict what the original predicts."""

from __future__ import annotations

from tensormoe_torch.compression._healing._checkpoints import heal_checkpoint
from tensormoe_torch.compression._healing._heal import heal
from tensormoe_torch.compression._healing._report import HealingProgress, HealingReport
from tensormoe_torch.compression._healing._settings import Healing

__all__ = ["Healing", "HealingProgress", "HealingReport", "heal", "heal_checkpoint"]
