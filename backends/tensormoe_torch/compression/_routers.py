"""The router of a model's experts, found by the shape of its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.compression._put import sparse_parent

COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "n_experts",
    "moe_num_experts",
    "out_features",
)
"""Attributes of modules and configurations that may say how many experts there are."""
_NAMES = ("gate", "router")
_LIMITS = ("n_group", "num_group", "num_expert_group")


def find_router(model: nn.Module, experts: DenseExperts) -> nn.Module:
    """The module beside some experts that holds their router's weight (experts, features).

    Raises:
        SpecError: none, or several.
    """
    sparse = sparse_parent(model, experts.name)
    if sparse is not None:
        router: nn.Module = sparse.router
        return router
    return router_beside(model, experts.name, experts.module, experts.count)


def router_beside(model: nn.Module, name: str, experts: nn.Module, count: int) -> nn.Module:
    """The router of a model of others, with ``count`` outputs, beside its experts.

    Raises:
        SpecError: none, or several.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    inside = {id(each) for each in experts.modules()}
    found = {
        place: module
        for place, module in parent.named_modules()
        if id(module) not in inside and _outputs(module) == count
    }
    named = {k: each for k, each in found.items() if k.rpartition(".")[2] in _NAMES}
    if len(named or found) != 1:
        raise SpecError(
            "experts must have one router beside them, a module with a weight of shape "
            f"({count}, features); {name!r} has "
            f"{', '.join(map(repr, found)) or 'none'}. Leave it out of the selection."
        )
    return next(iter((named or found).values()))


def _outputs(module: nn.Module) -> int | None:
    weight = module._parameters.get("weight")
    return None if weight is None or weight.ndim != 2 else weight.shape[0]


@contextmanager
def watched(routers: Sequence[nn.Module], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hand over logits (tokens, experts) of routers, in float32 at least, of every call meanwhile.

    A router of others may be one part of several, so its logits are made of what reaches it.

    Args:
        routers: of the model.
        take: called with a router's place in the list and its logits.
    """
    handles = []
    for place, router in enumerate(routers):
        make = _record if "projection" in router._parameters else _product
        handles.append(router.register_forward_hook(make(partial(take, place))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record(take: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, __: object, routes: Any) -> None:
        take(routes.logits.detach().flatten(0, -2))

    return hook


def _product(take: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(router: nn.Module, args: tuple[Tensor, ...], _: object) -> None:
        weight = router.get_parameter("weight")
        wide = torch.promote_types(weight.dtype, torch.float32)
        bias = router._parameters.get("bias")
        x = args[0].detach().reshape(-1, weight.shape[1]).to(wide)
        logits = x @ weight.detach().to(wide).T
        take(logits if bias is None else logits + bias.detach().to(wide))

    return hook


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
