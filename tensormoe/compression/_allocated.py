"""Groups of experts on disk, and the layers of an allocation that they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensormoe.compression._folder import Place, place_of
from tensormoe.compression._groups import Group
from tensormoe.errors import SpecError
from tensormoe.factorizations import Factorization
from tensormoe.selection import AllocatedLayer, Allocation


def allocated_kinds(groups: Sequence[Group], allocation: Allocation) -> Mapping[str, Factorization]:
    """The factorization of each group by its name.

    A model may be stored under other names than it has in memory, ``block_sparse_moe.experts.*.w1``
    for ``mlp.experts``: layers are told by the numbers in their names, and projections by roles.

    Raises:
        SpecError: groups that the allocation does not have, or that have other sizes there, or
            layers of the allocation that are no group.
    """
    layers = allocation.of_kind("experts").layers
    found: dict[str, Factorization] = {}
    used: set[tuple[str, str]] = set()
    for group in groups:
        place = place_of(group)
        layer = None if place is None else _layer(place.module, layers)
        roles = [] if layer is None else [each.role for each in layer.site.projections]
        if place is None or layer is None or place.role not in roles:
            raise SpecError(
                f"an allocation must have every group of experts; it has none for {group.name!r}. "
                f"{_remedy(place, roles)}"
            )
        index = roles.index(place.role)
        each = layer.site.projections[index]
        sizes = (group.experts, group.in_features, group.out_features)
        wanted = (layer.site.experts, each.in_features, each.out_features)
        if sizes != wanted:
            raise SpecError(
                f"an allocation must have the sizes of the model's experts; {group.name!r} has "
                f"{sizes}, the allocation {wanted}. Allocate anew for this model."
            )
        found[group.name] = layer.factorizations[index]
        used.add((layer.name, place.role))
    for layer in layers:
        for each in layer.site.projections:
            if (layer.name, each.role) not in used:
                raise SpecError(
                    f"every layer of an allocation must be in the model; {each.role} of "
                    f"{layer.name!r} is not among its groups. Widen the patterns."
                )
    return found


def _remedy(place: Place | None, roles: Sequence[str]) -> str:
    if place is not None and place.role == "gate_up_proj" and "gate_proj" in roles:
        return "It has gate and up projection apart: give gate_up='apart' (--gate-up apart)."
    if place is not None and place.role == "gate_proj" and "gate_up_proj" in roles:
        return "It has gate and up projection as one: give gate_up='joined' (--gate-up joined)."
    return "Narrow the patterns, or allocate anew."


def _layer(module: str, layers: Sequence[AllocatedLayer]) -> AllocatedLayer | None:
    """The layer of a name, or else the only one with the same numbers in its name."""
    same = [each for each in layers if each.name == module]
    alike = same or [each for each in layers if _numbers(each.name) == _numbers(module)]
    return alike[0] if len(alike) == 1 else None


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdecimal()]
