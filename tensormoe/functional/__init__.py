"""The layer as pure functions of arrays: what every framework's layers are thin wrappers of.

Parameters are mappings from canonical names (:meth:`LayerConfig.parameter_shapes`) to arrays of
any one library. Nothing here keeps state, and nothing plans: programs were made with the
configuration.
"""

from __future__ import annotations

from tensormoe._config import BlockConfig as BlockConfig
from tensormoe._config import LayerConfig as LayerConfig
from tensormoe._config import resolve_block as resolve_block
from tensormoe._config import resolve_config as resolve_config
from tensormoe.functional._checks import Coefficients as Coefficients
from tensormoe.functional._checks import check_array as check_array
from tensormoe.functional._checks import check_coefficients as check_coefficients
from tensormoe.functional._checks import check_ids as check_ids
from tensormoe.functional._checks import check_input as check_input
from tensormoe.functional._checks import merged_coefficients as merged_coefficients
from tensormoe.functional._experts import Residuals as Residuals
from tensormoe.functional._experts import apply_experts as apply_experts
from tensormoe.functional._experts import block_cost as block_cost
from tensormoe.functional._experts import chunk_size as chunk_size
from tensormoe.functional._experts import experts_backward as experts_backward
from tensormoe.functional._experts import experts_forward as experts_forward
from tensormoe.functional._experts import experts_vjp as experts_vjp
from tensormoe.functional._experts import layer_cost as layer_cost
from tensormoe.functional._experts import layer_plan as layer_plan
from tensormoe.functional._experts import prepare as prepare
from tensormoe.functional._fit import Fit as Fit
from tensormoe.functional._initialize import initialize as initialize
from tensormoe.functional._routing import Routed as Routed
from tensormoe.functional._routing import gate_vjp as gate_vjp
from tensormoe.functional._routing import route as route
from tensormoe.functional._upcycling import checked_noise as checked_noise
from tensormoe.functional._upcycling import shared_experts as shared_experts
from tensormoe.functional._weights import expert_weight as expert_weight
from tensormoe.functional._weights import materialize as materialize

__all__ = [
    "BlockConfig",
    "Coefficients",
    "Fit",
    "LayerConfig",
    "Residuals",
    "Routed",
    "apply_experts",
    "block_cost",
    "check_array",
    "check_coefficients",
    "check_ids",
    "check_input",
    "checked_noise",
    "chunk_size",
    "expert_weight",
    "experts_backward",
    "experts_forward",
    "experts_vjp",
    "gate_vjp",
    "initialize",
    "layer_cost",
    "layer_plan",
    "materialize",
    "merged_coefficients",
    "prepare",
    "resolve_block",
    "resolve_config",
    "route",
    "shared_experts",
]
