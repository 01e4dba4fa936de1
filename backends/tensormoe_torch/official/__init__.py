"""State dicts of the paper's released code, in both directions."""

from __future__ import annotations

from tensormoe_torch._pre_normed import PreNormed
from tensormoe_torch.official._read import from_official
from tensormoe_torch.official._write import to_official

__all__ = ["PreNormed", "from_official", "to_official"]
