"""Modules that an allocation names, and what it gives them."""

from __future__ import annotations

from typing import Any

from torch import nn

from tensormoe.errors import SpecError
from tensormoe.functional import Options
from tensormoe.selection import AllocatedLayer, Allocation
from tensormoe_torch.surgery._select import nearby, select_modules


def check_alone(function: str, given: dict[str, Any]) -> None:
    """Refuse arguments that an allocation has itself.

    Raises:
        SpecError: one is given.
    """
    for name, value in given.items():
        if value is not None:
            raise SpecError(
                f"{name} must be left out of {function} with an allocation, which has its own; got "
                f"{name}={value!r}. Drop one."
            )


def allocated_modules(
    model: nn.Module, allocation: Allocation, kinds: tuple[str, ...], other: str
) -> dict[str, nn.Module]:
    """The modules of an allocation by name, all places of each.

    Args:
        model: it holds them.
        allocation: which ones.
        kinds: that are possible here.
        other: the function that takes the other kinds.

    Raises:
        SpecError: layers of another kind, or that the model does not have.
    """
    rest = [each for each in allocation.layers if each.kind not in kinds]
    if rest:
        listed = ", ".join(map(repr, kinds))
        raise SpecError(
            f"an allocation must hold layers of kind {listed} alone here; {rest[0].name!r} is of "
            f"kind {rest[0].kind!r}. Give allocation.of_kind({listed}), and the rest to {other}."
        )
    if not allocation.layers:
        raise SpecError("an allocation must hold at least one layer; got none.")
    named = dict(model.named_modules())
    for name in allocation.names:
        if name not in named:
            raise SpecError(
                f"an allocation must be of the model's own modules; it has no {name!r}."
                f"{nearby(name, named)}"
            )
    wanted = {id(named[name]) for name in allocation.names}
    return select_modules(model, lambda _, module: id(module) in wanted)


def layer_of(
    allocation: Allocation, name: str, sizes: dict[str, tuple[int, int]]
) -> AllocatedLayer:
    """The layer of a name, for projections of these sizes.

    Raises:
        SpecError: it has others.
    """
    found = allocation[name]
    wanted = {each.role: (each.in_features, each.out_features) for each in found.site.projections}
    if wanted != sizes:
        raise SpecError(
            f"an allocation must have the sizes of the model's layers; {name!r} has "
            f"{_shown(sizes)}, the allocation {_shown(wanted)}. Allocate anew for this model."
        )
    return found


def options_of(layer: AllocatedLayer) -> Options:
    """Arguments of the layer that takes the place of a linear layer or an MLP."""
    kinds = layer.factorizations
    return Options(
        layer.experts,
        kinds[0] if len(kinds) == 1 else (kinds[0], kinds[1]),
        gate=layer.gate,
    )


def _shown(sizes: dict[str, tuple[int, int]]) -> str:
    listed = (f"{role} {rows} → {columns}".strip() for role, (rows, columns) in sizes.items())
    return f"({'; '.join(listed)})"
