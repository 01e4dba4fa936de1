"""Adapters for models of others: mixtures of low-rank experts that are added to frozen layers.

:func:`add_adapters` puts :class:`tensormoe_torch.ResidualExperts` around linear layers and around
every projection of a sparse model's experts, in place. The model trains as before; only adapters
have gradients. :func:`save_adapters` writes them to one small file, and :func:`merge_adapters` adds
them to the weights.
"""

from __future__ import annotations

from tensormoe_torch.adapters._add import add_adapters, freeze
from tensormoe_torch.adapters._experts import AdaptedExperts
from tensormoe_torch.adapters._files import load_adapters, save_adapters
from tensormoe_torch.adapters._find import has_adapters
from tensormoe_torch.adapters._merge import merge_adapters
from tensormoe_torch.adapters._report import AdapterReport, AddedAdapter

__all__ = [
    "AdaptedExperts",
    "AdapterReport",
    "AddedAdapter",
    "add_adapters",
    "freeze",
    "has_adapters",
    "load_adapters",
    "merge_adapters",
    "save_adapters",
]
