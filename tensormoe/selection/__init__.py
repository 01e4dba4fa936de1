"""Budget → rank, and the front of ranks; costs of the layers that mixtures are compared with."""

from __future__ import annotations

from tensormoe.selection._baselines import dense_moe_cost, linear_cost, mlp_cost, sparse_moe_cost
from tensormoe.selection._budget import Budget, mlp_budgets
from tensormoe.selection._select import OBJECTIVES, RankChoice, rank_front, select_rank
from tensormoe.selection._select_block import select_block
from tensormoe.selection._useful import excess

__all__ = [
    "OBJECTIVES",
    "Budget",
    "RankChoice",
    "dense_moe_cost",
    "excess",
    "linear_cost",
    "mlp_budgets",
    "mlp_cost",
    "rank_front",
    "select_block",
    "select_rank",
    "sparse_moe_cost",
]
