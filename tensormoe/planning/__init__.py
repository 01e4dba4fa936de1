"""Network → path → program → plan → cost: all on shapes, without arrays."""

from __future__ import annotations

from tensormoe.planning._block_cost import block_cost
from tensormoe.planning._cost import Collective, Cost, StepCost
from tensormoe.planning._draft import Routing
from tensormoe.planning._fit_roofline import fit_roofline
from tensormoe.planning._gate_cost import gate_cost
from tensormoe.planning._legs import CutLayer, compare_legs
from tensormoe.planning._library import Library
from tensormoe.planning._plan import Plan, plan_layer
from tensormoe.planning._program import Operand, Program, Step
from tensormoe.planning._published import PUBLISHED_ROOFLINES, published_roofline
from tensormoe.planning._regimes import Regimes, plan_regimes
from tensormoe.planning._reverse import Reverse, reverse
from tensormoe.planning._roofline import Roofline
from tensormoe.planning._weight_programs import contraction, weight_program

__all__ = [
    "PUBLISHED_ROOFLINES",
    "Collective",
    "Cost",
    "CutLayer",
    "Library",
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
    "compare_legs",
    "contraction",
    "fit_roofline",
    "gate_cost",
    "plan_layer",
    "plan_regimes",
    "published_roofline",
    "reverse",
    "weight_program",
]
