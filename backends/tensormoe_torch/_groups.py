"""Which parameters decay: groups for an optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any

from torch import nn

from tensormoe.errors import SpecError
from tensormoe.factorizations import INPUT
from tensormoe_torch._base import Mixture

__all__ = ["parameter_groups"]

_EXEMPT = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of a model in two groups for an optimizer: decaying, and not.

    Decay pulls a parameter towards zero, so it suits those that start around zero. In a μMoE layer
    these decay: input, output and core factors, dense weights, and the gate's projections. These
    don't:

    - expert factors. They start at ones or identities plus noise, which is what all experts share;
      pulled towards zero, they would take the shared part of every expert along, and decay the
      product of factors once more.
    - biases of experts and gates, whatever their number of axes.
    - the table of an embedding, whose rows decay in steps that never see them.

    The rest of a model follows the usual rule: parameters of fewer than two axes don't decay,
    neither do embeddings and norms, and all else does. (The released code of Oldfield et al. 2024
    goes by the number of axes alone, so its expert factors and biases of tensor rings decay too.)

    Args:
        model: any module, with μMoE layers anywhere inside.
        weight_decay: of the first group, not negative.

    Returns:
        Two groups, the decaying one first; either may be empty. Every trainable parameter is in
        exactly one of them, shared ones too: what one module keeps from decay does not decay.
        Frozen ones are left out.

    Raises:
        TypeError: ``model`` is no module.
        SpecError: ``weight_decay`` is no number, negative or not finite.

    >>> import torch
    >>> from tensormoe_torch import MuMoE
    >>> model = torch.nn.Sequential(MuMoE(8, 4, experts=3, rank=2), torch.nn.Linear(4, 2))
    >>> decayed, kept = parameter_groups(model, weight_decay=0.1)
    >>> [tuple(each.shape) for each in decayed["params"]]
    [(8, 2), (4, 2), (8, 3), (2, 4)]
    >>> [tuple(each.shape) for each in kept["params"]]
    [(2,), (3, 2), (2,)]
    >>> optimizer = torch.optim.AdamW([decayed, kept], lr=1e-3)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__qualname__}.")
    number = isinstance(weight_decay, int | float) and not isinstance(weight_decay, bool)
    if not number or not isfinite(weight_decay) or weight_decay < 0:
        raise SpecError(
            f"weight_decay must be a number of at least 0; got {weight_decay!r}. Use 0.1 or less."
        )
    exempt = {id(each) for module in model.modules() for each in _exempt(module)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and id(parameter) not in exempt
            (decayed if decays else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": float(weight_decay)},
        {"params": kept, "weight_decay": 0.0},
    ]


def _exempt(module: nn.Module) -> Iterator[nn.Parameter]:
    """A module's own parameters that must not decay, whatever their number of axes."""
    if isinstance(module, _EXEMPT):
        yield from module.parameters(recurse=False)
    if not isinstance(module, Mixture):
        return
    network = module.spec.network
    starts = module.spec.initializers(module.init)
    for factor in network.all_factors:
        around_zero = starts[factor.name].center in ("zero", "shared")
        table = module.config.indexed_input and INPUT in factor.legs
        if factor in network.biases or table or not around_zero:
            yield module.factors[factor.name]
