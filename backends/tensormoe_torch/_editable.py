"""Modules whose experts can be edited, and the arrays of their gates."""

from __future__ import annotations

from torch import Tensor

from tensormoe_torch._base import Mixture
from tensormoe_torch._gate import ExpertGate
from tensormoe_torch._mlp import MuMoEMLP
from tensormoe_torch._pre_normed import PreNormed

Editable = Mixture | MuMoEMLP | PreNormed
"""Modules that have experts by number; both layers of a block are edited together."""


def mixtures_of(layer: Editable) -> list[Mixture]:
    """The layers to edit."""
    block = layer.block if isinstance(layer, PreNormed) else layer
    if isinstance(block, MuMoEMLP):
        return [block.first, block.second]
    if isinstance(block, Mixture):
        return [block]
    raise TypeError(
        "layer must be a MuMoE, MuMoEMLP, MuMoEEmbedding or PreNormed; got "
        f"{type(layer).__qualname__}. Pass the layer inside whose experts you mean."
    )


def gate_of(layer: Editable) -> ExpertGate | None:
    """The gate of a layer, if it has one of its own."""
    mixtures_of(layer)
    found = getattr(layer.block if isinstance(layer, PreNormed) else layer, "gate", None)
    return found if isinstance(found, ExpertGate) else None


def gate_arrays(gate: ExpertGate) -> dict[str, Tensor]:
    """Parameters and buffers of a gate that are stored under their own names, by these."""
    config = gate.config
    names = (*config.parameter_shapes(), *config.buffer_shapes())
    # of sharded parameters the shards, also where a call has gathered them
    held = gate.state_dict(keep_vars=True)
    own = [name.partition(".")[2] for name in names if name.startswith("gate.")]
    return {name: held[name] for name in own if name in held}
