"""The layer as pure functions of arrays: what every framework's layers are thin wrappers of.

Parameters are mappings from canonical names (:meth:`LayerConfig.parameter_shapes`) to arrays of
any one library. Nothing here keeps state, plans, reads files, or changes what it is given: plans
and costs are methods of the configuration.
"""

from __future__ import annotations

from tensormoe._config import BlockConfig as BlockConfig
from tensormoe._config import LayerConfig as LayerConfig
from tensormoe._resolve import Options as Options
from tensormoe.functional._checks import Coefficients as Coefficients
from tensormoe.functional._checks import check_array as check_array
from tensormoe.functional._checks import check_coefficients as check_coefficients
from tensormoe.functional._checks import check_ids as check_ids
from tensormoe.functional._checks import check_input as check_input
from tensormoe.functional._checks import merged_coefficients as merged_coefficients
from tensormoe.functional._checks import own_gate as own_gate
from tensormoe.functional._each import EachExpert as EachExpert
from tensormoe.functional._each import apply_each as apply_each
from tensormoe.functional._each import level_outputs as level_outputs
from tensormoe.functional._experts import Residuals as Residuals
from tensormoe.functional._experts import apply_experts as apply_experts
from tensormoe.functional._experts import experts_backward as experts_backward
from tensormoe.functional._experts import experts_forward as experts_forward
from tensormoe.functional._experts import experts_vjp as experts_vjp
from tensormoe.functional._experts import prepare as prepare
from tensormoe.functional._fit import Fit as Fit
from tensormoe.functional._initialize import initial_span as initial_span
from tensormoe.functional._initialize import initialize as initialize
from tensormoe.functional._parts import CutAxis as CutAxis
from tensormoe.functional._parts import cut_axes as cut_axes
from tensormoe.functional._parts import part_operands as part_operands
from tensormoe.functional._routing import Routed as Routed
from tensormoe.functional._routing import gate_vjp as gate_vjp
from tensormoe.functional._routing import route as route
from tensormoe.functional._rules import DIRECTIONS as DIRECTIONS
from tensormoe.functional._rules import ParameterRule as ParameterRule
from tensormoe.functional._rules import parameter_rules as parameter_rules
from tensormoe.functional._upcycling import checked_noise as checked_noise
from tensormoe.functional._upcycling import upcycle as upcycle
from tensormoe.functional._weights import expert_factors as expert_factors
from tensormoe.functional._weights import expert_weight as expert_weight
from tensormoe.functional._weights import materialize as materialize

__all__ = [
    "DIRECTIONS",
    "BlockConfig",
    "Coefficients",
    "CutAxis",
    "EachExpert",
    "Fit",
    "LayerConfig",
    "Options",
    "ParameterRule",
    "Residuals",
    "Routed",
    "apply_each",
    "apply_experts",
    "check_array",
    "check_coefficients",
    "check_ids",
    "check_input",
    "checked_noise",
    "cut_axes",
    "expert_factors",
    "expert_weight",
    "experts_backward",
    "experts_forward",
    "experts_vjp",
    "gate_vjp",
    "initial_span",
    "initialize",
    "level_outputs",
    "materialize",
    "merged_coefficients",
    "own_gate",
    "parameter_rules",
    "part_operands",
    "prepare",
    "route",
    "upcycle",
]
