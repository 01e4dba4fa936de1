"""Experts scaled, silenced, replaced, merged or permuted; coefficients, logits and routes steered.

Edits of experts take a layer's configuration and its arrays by canonical name, of any library, and
return a dictionary with new arrays where something changed. Nothing is changed in place, so that
keeping the old dictionary is enough to take an edit back. Edits of coefficients and logits take and
return arrays, and edits of routes the records of routers.

>>> import numpy as np
>>> from tensormoe_numpy import MuMoE
>>> layer = MuMoE(8, 4, experts=3, rank=2, seed=0)
>>> silent = silence_experts(layer.config, layer.parameters, 1)
>>> edited = MuMoE.restore(layer.config, silent)
>>> float(abs(edited.expert(1)[0]).max()), bool((edited.expert(0)[0] == layer.expert(0)[0]).all())
(0.0, True)
"""

from __future__ import annotations

from tensormoe.editing._coefficients import steer_experts as steer_experts
from tensormoe.editing._coefficients import subgroup_coefficients as subgroup_coefficients
from tensormoe.editing._edit import replace_expert as replace_expert
from tensormoe.editing._edit import scale_experts as scale_experts
from tensormoe.editing._edit import silence_experts as silence_experts
from tensormoe.editing._merge import merge_experts as merge_experts
from tensormoe.editing._permute import permute_experts as permute_experts
from tensormoe.editing._routing import scale_routes as scale_routes
from tensormoe.editing._routing import silence_routes as silence_routes
from tensormoe.editing._routing import steer_routes as steer_routes
from tensormoe.editing._threshold import oversampled_indices as oversampled_indices
from tensormoe.editing._threshold import threshold_blindly as threshold_blindly
from tensormoe.editing._threshold import threshold_experts as threshold_experts

__all__ = [
    "merge_experts",
    "oversampled_indices",
    "permute_experts",
    "replace_expert",
    "scale_experts",
    "scale_routes",
    "silence_experts",
    "silence_routes",
    "steer_experts",
    "steer_routes",
    "subgroup_coefficients",
    "threshold_blindly",
    "threshold_experts",
]
