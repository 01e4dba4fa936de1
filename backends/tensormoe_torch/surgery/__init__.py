"""Surgery on existing models: linear layers and MLP blocks become mixtures of experts."""

from __future__ import annotations

from tensormoe_torch.surgery._convert import from_linear as from_linear
from tensormoe_torch.surgery._convert import from_mlp as from_mlp
from tensormoe_torch.surgery._replace import replace as replace
from tensormoe_torch.surgery._report import Replacement as Replacement
from tensormoe_torch.surgery._report import Surgery as Surgery

__all__ = ["Replacement", "Surgery", "from_linear", "from_mlp", "replace"]
