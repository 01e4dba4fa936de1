"""Bonds that are larger than any tensor of a layer's shape can use."""

from __future__ import annotations

from math import prod

from tensormoe._spec import LayerSpec
from tensormoe.factorizations import INPUT, OUTPUT, Leg
from tensormoe.selection._family import Family


def excess(spec: LayerSpec) -> dict[Leg, int]:
    """Bonds that are larger than any tensor of a shape can use, and the size that it can.

    Every bond: the tensor's entries over its longest mode, with which a sum of rank-one terms is
    exact. A bond between two factors besides: the sizes of either factor's other legs, those left
    out that both have, since a matrix has no higher rank than rows.
    """
    network = spec.network
    sizes = {**network.sizes, INPUT: spec.in_features + spec.bias}
    modes = {*network.expert_legs, INPUT, OUTPUT}
    entries = prod(sizes[mode] for mode in modes)
    found = {}
    for term in network.terms:
        for leg in sorted(term.legs - modes):
            holders = [set(factor.legs) for factor in term.factors if leg in factor.legs]
            most = entries // max(sizes[mode] for mode in modes)
            if len(holders) == 2:
                shared = set.intersection(*holders)
                most = min([most, *(prod(sizes[each] for each in end - shared) for end in holders)])
            if sizes[leg] > most:
                found[leg] = most
    return found


def beyond_use(family: Family, spec: LayerSpec) -> dict[int, int]:
    """The free bonds of a layer that are too large, by index, with the largest useful size."""
    places, found = family.place_of, excess(spec)
    over = {places[leg]: most for leg, most in found.items() if leg in places}
    return {place: most for place, most in over.items() if not isinstance(family.bonds[place], int)}


def without_waste(family: Family, rest: Family, spec: LayerSpec) -> Family | None:
    """The family with bonds capped at the largest useful size; None if there are none to cap.

    Where the bond between input and output is one of them, the others stay as they are: they are
    the smallest that reach the same figures.

    Args:
        family: where bonds are free that may be cut.
        rest: the same after some have been cut.
        spec: the layer that was chosen from it.
    """
    over = beyond_use(family, spec)
    if not over:
        return None
    sizes = spec.factorization.bonds(spec.levels)
    last = next((bond for bond in rest.bonds[::-1] if not isinstance(bond, int)), None)
    inner = any(rest.bonds[place] == last for place in over)
    bonds = [
        over.get(place, sizes[place] if inner and bond != last else bond)
        for place, bond in enumerate(rest.bonds)
    ]
    return rest.with_bonds(bonds)


def with_bonds(spec: LayerSpec, changed: dict[int, int]) -> LayerSpec:
    """A layer with other sizes of some bonds, by index."""
    sizes = spec.factorization.bonds(spec.levels)
    rank = tuple(changed.get(index, size) for index, size in enumerate(sizes))
    value = spec.factorization.with_rank(rank)
    return LayerSpec(spec.in_features, spec.out_features, spec.experts, value, spec.bias)
