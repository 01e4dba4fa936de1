"""Routing robustness: a model whose tokens each lose their most probable expert."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tensormoe.errors import SpecError
from tensormoe.routing import Routes, without_best
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch.mixtures._router import SparseRouter


@contextmanager
def without_best_experts(model: nn.Module) -> Iterator[nn.Module]:
    """Disable each token's most probable expert in every sparse router, for a while.

    Su et al. 2025 (CartesianMoE, table 4) measure by it how much a model depends on single experts.
    Both halves of a :class:`CartesianMoE` lose an expert each. Routers are wrapped by forward
    hooks, so that compiled functions have to be made anew.

    Args:
        model: any module with :class:`SparseMoE` or :class:`CartesianMoE` inside.

    Raises:
        GateError: at the call of a router that chooses every expert, so that none is left.
        SpecError: a model without sparse routers.

    >>> import torch
    >>> from tensormoe_torch import SparseMoE
    >>> layer, x = SparseMoE(8, 16, experts=4, top_k=2), torch.randn(3, 8)
    >>> best = layer.route(x).top_k_index[:, 0]
    >>> with without_best_experts(layer):
    ...     chosen = layer.route(x).top_k_index
    >>> bool((chosen == best[:, None]).any())
    False
    """
    routers = [module for module in model.modules() if isinstance(module, SparseRouter)]
    if not routers:
        raise SpecError(
            f"the model must have a sparse router; got {type(model).__name__} without. Pass a "
            "model with SparseMoE or CartesianMoE layers."
        )
    hooks = [router.register_forward_hook(_disable) for router in routers]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _disable(router: nn.Module, given: Any, routes: Routes) -> Routes:
    assert isinstance(router, SparseRouter)
    bias = dict(router.named_buffers(recurse=False)).get("choice_bias")
    rule = router.config.router
    return without_best(rule, routes, choice_bias=bias, backend=BACKEND)
