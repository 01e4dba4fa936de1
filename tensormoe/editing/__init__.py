"""Single experts scaled, silenced or replaced; all others stay as they are.

The functions take a layer's configuration and its arrays by canonical name, of any library, and
return a dictionary with new arrays where something changed. Nothing is changed in place, so that
keeping the old dictionary is enough to take an edit back.

>>> import numpy as np
>>> from tensormoe_numpy import MuMoE
>>> layer = MuMoE(8, 4, experts=3, rank=2, seed=0)
>>> silent = silence_experts(layer.config, layer.parameters, 1)
>>> edited = MuMoE.restore(layer.config, silent)
>>> float(abs(edited.expert(1)[0]).max()), bool((edited.expert(0)[0] == layer.expert(0)[0]).all())
(0.0, True)
"""

from __future__ import annotations

from tensormoe.editing._edit import replace_expert, scale_experts, silence_experts

__all__ = ["replace_expert", "scale_experts", "silence_experts"]
