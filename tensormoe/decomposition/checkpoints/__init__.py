"""Whole checkpoints: the experts of a model on disk → factors, or matrices rebuilt from them."""

from __future__ import annotations

from tensormoe.decomposition.checkpoints._groups import Group as Group
from tensormoe.decomposition.checkpoints._measure import GroupReport as GroupReport
from tensormoe.decomposition.checkpoints._patterns import LAYOUTS as LAYOUTS
from tensormoe.decomposition.checkpoints._patterns import PRESETS as PRESETS
from tensormoe.decomposition.checkpoints._patterns import Pattern as Pattern
from tensormoe.decomposition.checkpoints._patterns import Preset as Preset
from tensormoe.decomposition.checkpoints._plan import CompressionPlan as CompressionPlan
from tensormoe.decomposition.checkpoints._plan import GroupPlan as GroupPlan
from tensormoe.decomposition.checkpoints._plan import plan_compression as plan_compression
from tensormoe.decomposition.checkpoints._run import CompressionResult as CompressionResult
from tensormoe.decomposition.checkpoints._run import Progress as Progress
from tensormoe.decomposition.checkpoints._run import compress_checkpoint as compress_checkpoint
from tensormoe.decomposition.checkpoints._settings import Compression as Compression
from tensormoe.decomposition.checkpoints._shards import Model as Model
from tensormoe.decomposition.checkpoints._shards import Shard as Shard

__all__ = [
    "LAYOUTS",
    "PRESETS",
    "Compression",
    "CompressionPlan",
    "CompressionResult",
    "Group",
    "GroupPlan",
    "GroupReport",
    "Model",
    "Pattern",
    "Preset",
    "Progress",
    "Shard",
    "compress_checkpoint",
    "plan_compression",
]
