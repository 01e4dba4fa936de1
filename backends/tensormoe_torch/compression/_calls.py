"""Calls of experts: what a router gives them, and who looks on."""

from __future__ import annotations

from torch import Tensor, nn

from tensormoe.errors import ShapeError
from tensormoe_torch._factors import Factors
from tensormoe_torch._layer import MuMoE


def check_choices(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> tuple[tuple[int, ...], int]:
    """The leading shape of a call of experts, and how many each token has.

    Raises:
        ShapeError: indices or weights that do not fit the input.
    """
    batch_shape = tuple(hidden_states.shape[:-1])
    if top_k_index.shape[:-1] != batch_shape or top_k_weights.shape != top_k_index.shape:
        raise ShapeError(
            f"top_k_index and top_k_weights must both have shape {(*batch_shape, 'k')}, one row "
            f"per token; got {tuple(top_k_index.shape)} and {tuple(top_k_weights.shape)}. Give "
            "what the router gives."
        )
    return batch_shape, top_k_index.shape[-1]


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is one of ours, whole, and nobody watches or changes its calls."""
    if type(layer) is not MuMoE or type(layer.factors) is not Factors or layer._part is not None:
        return False
    return not any(_is_watched(each) for each in (layer, layer.factors))


def _is_watched(module: nn.Module) -> bool:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(map(bool, hooks)) or "forward" in vars(module)
