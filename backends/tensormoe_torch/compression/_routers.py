"""The router of a model's experts, found by the shape of its weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.compression._put import sparse_parent

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_experts", "out_features")
"""Attributes of modules and configurations that may say how many experts there are."""
_NAMES = ("gate", "router")
_LIMITS = ("n_group", "num_group", "num_expert_group")


def find_router(model: nn.Module, experts: DenseExperts) -> nn.Module:
    """The module beside some experts that holds their router's weight (experts, in).

    Raises:
        SpecError: none, or several.
    """
    sparse = sparse_parent(model, experts.name)
    if sparse is not None:
        router: nn.Module = sparse.router
        return router
    parent = model.get_submodule(experts.name.rpartition(".")[0])
    first = next(role for role in experts.stacks)
    shape = (experts.count, experts.stacks[first].sizes[0])
    inside = {id(each) for each in experts.module.modules()}
    found = {
        name: module
        for name, module in parent.named_modules()
        if id(module) not in inside and _shape(module) == shape
    }
    named = {k: each for k, each in found.items() if k.rpartition(".")[2] in _NAMES}
    if len(named or found) != 1:
        raise SpecError(
            f"experts must have a router beside them, a module with a weight of shape {shape}; "
            f"{experts.name!r} has {', '.join(map(repr, found)) or 'none'}. Leave it out of the "
            "selection."
        )
    return next(iter((named or found).values()))


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    weight = module._parameters.get("weight")
    return None if weight is None else tuple(weight.shape)


@torch.no_grad()
def router_logits(router: nn.Module, x: Tensor) -> Tensor:
    """Logits (tokens, experts) in float32 at least, of inputs (tokens, in) of the experts."""
    held = dict(router.named_parameters(recurse=False))
    weight = held["weight"].T if "weight" in held else held["projection"]
    wide = torch.promote_types(weight.dtype, torch.float32)
    bias = held.get("bias")
    logits = x.to(wide) @ weight.to(wide)
    return logits if bias is None else logits + bias.to(wide)


def check_prunable(model: nn.Module, experts: DenseExperts, router: nn.Module) -> None:
    """Refuse routers that can't lose outputs.

    Raises:
        SpecError: they choose groups of experts first, all of one size.
    """
    parent = model.get_submodule(experts.name.rpartition(".")[0])
    for module in (router, parent):
        for name in _LIMITS:
            if isinstance(value := getattr(module, name, None), int) and value > 1:
                raise SpecError(
                    f"experts can't be pruned where the router chooses groups of them first; that "
                    f"of {experts.name!r} has {name}={value}. Merge them: how='merge'."
                )


def above(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that a module lies in, the model first."""
    parts = name.split(".")
    for count in range(len(parts)):
        yield model.get_submodule(".".join(parts[:count]))
