"""Layers of a model that a budget can be shared out over, and what the model loses by them."""

from __future__ import annotations

from tensormoe_torch.allocation._measure import measure_sensitivities
from tensormoe_torch.allocation._sites import model_sites
from tensormoe_torch.allocation._transformers import empty_model

__all__ = ["empty_model", "measure_sensitivities", "model_sites"]
