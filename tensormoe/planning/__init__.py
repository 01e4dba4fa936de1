"""Network → path → program → cost, and from cost to ranks: all on shapes, without arrays."""

from __future__ import annotations

from tensormoe.planning._baselines import dense_moe_cost as dense_moe_cost
from tensormoe.planning._baselines import linear_cost as linear_cost
from tensormoe.planning._baselines import mlp_cost as mlp_cost
from tensormoe.planning._baselines import sparse_moe_cost as sparse_moe_cost
from tensormoe.planning._block_cost import block_cost as block_cost
from tensormoe.planning._budget import Budget as Budget
from tensormoe.planning._budget import mlp_budgets as mlp_budgets
from tensormoe.planning._cost import Cost as Cost
from tensormoe.planning._cost import StepCost as StepCost
from tensormoe.planning._draft import Routing as Routing
from tensormoe.planning._layer_cost import gate_cost as gate_cost
from tensormoe.planning._plan import Plan as Plan
from tensormoe.planning._plan import plan_layer as plan_layer
from tensormoe.planning._program import Operand as Operand
from tensormoe.planning._program import Program as Program
from tensormoe.planning._program import Step as Step
from tensormoe.planning._regimes import Regimes as Regimes
from tensormoe.planning._regimes import plan_regimes as plan_regimes
from tensormoe.planning._reverse import Reverse as Reverse
from tensormoe.planning._reverse import reverse as reverse
from tensormoe.planning._roofline import PUBLISHED_ROOFLINES as PUBLISHED_ROOFLINES
from tensormoe.planning._roofline import Roofline as Roofline
from tensormoe.planning._select import OBJECTIVES as OBJECTIVES
from tensormoe.planning._select import RankChoice as RankChoice
from tensormoe.planning._select import rank_front as rank_front
from tensormoe.planning._select import select_rank as select_rank
from tensormoe.planning._select_block import select_block as select_block
from tensormoe.planning._useful import excess as excess
from tensormoe.planning._weight_programs import contraction as contraction
from tensormoe.planning._weight_programs import weight_program as weight_program

__all__ = [
    "OBJECTIVES",
    "PUBLISHED_ROOFLINES",
    "Budget",
    "Cost",
    "Operand",
    "Plan",
    "Program",
    "RankChoice",
    "Regimes",
    "Reverse",
    "Roofline",
    "Routing",
    "Step",
    "StepCost",
    "block_cost",
    "contraction",
    "dense_moe_cost",
    "excess",
    "gate_cost",
    "linear_cost",
    "mlp_budgets",
    "mlp_cost",
    "plan_layer",
    "plan_regimes",
    "rank_front",
    "reverse",
    "select_block",
    "select_rank",
    "sparse_moe_cost",
    "weight_program",
]
