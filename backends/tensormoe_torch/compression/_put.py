"""New experts in the place of old ones; a sparse mixture's configuration follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tensormoe import LayerSpec
from tensormoe.factorizations import Dense
from tensormoe.functional import LayerConfig
from tensormoe.mixtures import ExpertsConfig, SparseConfig
from tensormoe_torch._layer import MuMoE
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.surgery._replace import swap


def dense_layers(weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> dict[str, MuMoE]:
    """Layers by role that hold stacks (experts, in, out) as they are, and biases (experts, out)."""
    layers = {}
    for role, weight in weights.items():
        count, rows, columns = weight.shape
        spec = LayerSpec(rows, columns, (count,), Dense(), bias=role in biases)
        arrays = {"factors.weight": weight.contiguous()}
        if role in biases:
            arrays["factors.bias"] = biases[role].contiguous()
        layers[role] = MuMoE.restore(LayerConfig(spec, None), arrays)
    return layers


def sparse_parent(model: nn.Module, name: str) -> Any:
    """The sparse mixture that a module of experts belongs to; None for models of others."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return parent if isinstance(getattr(parent, "config", None), SparseConfig) else None


def put_experts(
    model: nn.Module,
    name: str,
    old: nn.Module,
    new: FactorizedExperts,
    *,
    groups: tuple[int, ...] | None = None,
    kept: Sequence[int] | None = None,
) -> None:
    """Put new experts where old ones were.

    Args:
        model: it holds them.
        name: of the old ones.
        old: the module.
        new: takes its place; in models of others it knows its groups.
        groups: of a sparse mixture whose experts were merged, the new expert behind each output of
            its router; as before by default.
        kept: the outputs that a sparse mixture's router keeps; all by default.
    """
    parent = sparse_parent(model, name)
    swap(model, name, old, new)
    if parent is None:
        return
    config: SparseConfig = parent.config
    layers: dict[str, Any] = dict(new.projections.items())
    specs = {role: layer.spec for role, layer in layers.items()}
    up = specs.get("gate_up_proj", specs.get("up_proj"))
    experts = ExpertsConfig(config.experts.kind, up, specs["down_proj"], config.experts.act_layer)
    followed = replace(config, experts=experts, groups=config.groups if groups is None else groups)
    parent.follow(followed, kept)
