"""Network → path → program → plan → cost: all on shapes, without arrays."""

from __future__ import annotations

from tensormoe.planning._block_cost import block_cost as block_cost
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
from tensormoe.planning._weight_programs import contraction as contraction
from tensormoe.planning._weight_programs import weight_program as weight_program

__all__ = [
    "PUBLISHED_ROOFLINES",
    "Cost",
    "Operand",
    "Plan",
    "Program",
    "Regimes",
    "Reverse",
    "Roofline",
    "Routing",
    "Step",
    "StepCost",
    "block_cost",
    "contraction",
    "gate_cost",
    "plan_layer",
    "plan_regimes",
    "reverse",
    "weight_program",
]
