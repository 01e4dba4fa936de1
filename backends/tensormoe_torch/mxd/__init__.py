"""Mixture of decoders: an MLP's second layer as tens of thousands of experts, few per token."""

from __future__ import annotations

from tensormoe_torch.mxd._block import MixtureOfDecoders as MixtureOfDecoders
from tensormoe_torch.mxd._distill import distill as distill
from tensormoe_torch.mxd._distill import imitate as imitate
from tensormoe_torch.mxd._report import Distillation as Distillation

__all__ = ["Distillation", "MixtureOfDecoders", "distill", "imitate"]
