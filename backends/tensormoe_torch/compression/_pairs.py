"""Experts in factors as plain linear layers, which run without this library."""

from __future__ import annotations

import torch
from torch import nn

from tensormoe.errors import SpecError
from tensormoe.functional import expert_factors
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._layer import MuMoE
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.surgery._replace import at


@torch.no_grad()
def to_linear_pairs(experts: FactorizedExperts) -> nn.ModuleList:
    """Every expert's projections as two ``nn.Linear`` each, one behind the other.

    Projection W_n (in, out) becomes ``nn.Sequential(nn.Linear(in, r), nn.Linear(r, out))``, where r
    is the smallest product of bonds between input and output: of ``low_rank`` and ``cp`` the rank.
    That is exact. What experts share is stored once per expert then, so that there are
    N·r·(in + out) entries, whatever the factors had.

    Args:
        experts: what :func:`compress` put in the place of dense experts.

    Returns:
        One ``nn.ModuleDict`` per expert of the router, with an ``nn.Sequential`` for each of the
        roles of the experts. Where experts were merged, those of a group are one module.

    Raises:
        SpecError: experts of full rank (``base_delta``, ``dense``, …), or ones that are spread over
            devices or have adapters.

    >>> import torch
    >>> layers = {
    ...     role: MuMoE(i, o, 4, "low_rank", rank=2, bias=False, gate=None)
    ...     for role, i, o in [("gate_proj", 6, 8), ("up_proj", 6, 8), ("down_proj", 8, 6)]
    ... }
    >>> experts = FactorizedExperts(layers, nn.functional.silu)
    >>> pairs, x = to_linear_pairs(experts), torch.randn(5, 6)
    >>> pairs[3]["up_proj"]
    Sequential(
      (0): Linear(in_features=6, out_features=2, bias=False)
      (1): Linear(in_features=2, out_features=8, bias=False)
    )
    >>> gate, up, down = (pairs[3][role] for role in ("gate_proj", "up_proj", "down_proj"))
    >>> torch.allclose(down(nn.functional.silu(gate(x)) * up(x)), experts[3](x), atol=1e-6)
    True
    """
    if not isinstance(experts, FactorizedExperts):
        raise TypeError(
            f"experts must be FactorizedExperts; got {type(experts).__qualname__}. Pass those of a "
            "compressed model, such as model.model.layers[0].mlp.experts."
        )
    if experts.boundary is not None:
        raise SpecError(
            "experts must be whole to be written as linear layers; got a device's part. Load the "
            "model on one device."
        )
    made = []
    for number in range(experts.down_proj.spec.num_experts):
        roles = {}
        for role, layer in experts.projections.items():
            with at(role):
                bias = experts._parameters.get(f"{role}_bias")
                roles[role] = _pair(layer, number, None if bias is None else bias[number])
        made.append(nn.ModuleDict(roles))
    groups = range(len(made)) if experts.groups is None else experts.groups.tolist()
    return nn.ModuleList(made[group] for group in groups)


def _pair(layer: nn.Module, number: int, beside: torch.Tensor | None) -> nn.Sequential:
    if type(layer) is not MuMoE:
        raise SpecError(
            f"layers must be the experts' own; got a {type(layer).__qualname__}. Merge or take off "
            "its adapters first."
        )
    reads, writes, bias = expert_factors(layer.config, layer._weights(), [number], BACKEND)
    if beside is not None:
        bias = beside if bias is None else bias + beside
    return nn.Sequential(_linear(reads, None), _linear(writes, bias))


def _linear(matrix: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    rows, columns = matrix.shape
    options = {"device": matrix.device, "dtype": matrix.dtype}
    linear = nn.utils.skip_init(nn.Linear, rows, columns, bias=bias is not None, **options)
    linear.weight.copy_(matrix.T)
    if bias is not None:
        linear.bias.copy_(bias)
    return linear
