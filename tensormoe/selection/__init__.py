"""Budget → rank of a layer or a whole model, the front of ranks, and costs of other layers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tensormoe.selection._allocate import allocate
from tensormoe.selection._allocation import AllocatedLayer, Allocation
from tensormoe.selection._baselines import dense_moe_cost, linear_cost, mlp_cost, sparse_moe_cost
from tensormoe.selection._budget import Budget, mlp_budgets
from tensormoe.selection._select import OBJECTIVES, RankChoice, rank_front, select_rank
from tensormoe.selection._select_block import select_block
from tensormoe.selection._sensitivity import Sensitivity, SensitivityPoint
from tensormoe.selection._sites import LayerSite, Projection
from tensormoe.selection._useful import excess

if TYPE_CHECKING:
    from tensormoe.choosing import explore

__all__ = [
    "OBJECTIVES",
    "AllocatedLayer",
    "Allocation",
    "Budget",
    "LayerSite",
    "Projection",
    "RankChoice",
    "Sensitivity",
    "SensitivityPoint",
    "allocate",
    "dense_moe_cost",
    "excess",
    "explore",
    "linear_cost",
    "mlp_budgets",
    "mlp_cost",
    "rank_front",
    "select_block",
    "select_rank",
    "sparse_moe_cost",
]


def __getattr__(name: str) -> Any:
    # it compares with mixtures, which stand above: imported when it is asked for
    if name == "explore":
        return import_module("tensormoe.choosing").explore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
