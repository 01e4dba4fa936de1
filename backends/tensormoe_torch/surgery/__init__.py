"""Surgery on existing models: linear layers and MLP blocks become mixtures of experts."""

from __future__ import annotations

from tensormoe_torch.surgery._convert import from_linear, from_mlp
from tensormoe_torch.surgery._replace import replace
from tensormoe_torch.surgery._report import Replacement, Surgery

__all__ = ["Replacement", "Surgery", "from_linear", "from_mlp", "replace"]
