"""Budget → rank, and the front of ranks; costs of the layers that mixtures are compared with."""

from __future__ import annotations

from tensormoe.selection._baselines import dense_moe_cost as dense_moe_cost
from tensormoe.selection._baselines import linear_cost as linear_cost
from tensormoe.selection._baselines import mlp_cost as mlp_cost
from tensormoe.selection._baselines import sparse_moe_cost as sparse_moe_cost
from tensormoe.selection._budget import Budget as Budget
from tensormoe.selection._budget import mlp_budgets as mlp_budgets
from tensormoe.selection._select import OBJECTIVES as OBJECTIVES
from tensormoe.selection._select import RankChoice as RankChoice
from tensormoe.selection._select import rank_front as rank_front
from tensormoe.selection._select import select_rank as select_rank
from tensormoe.selection._select_block import select_block as select_block
from tensormoe.selection._useful import excess as excess

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
