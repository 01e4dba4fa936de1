"""Factors that store the experts of a level, for editing single experts."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from tensormoe.factorizations._network import Network, expert_leg


def expert_axes(network: Network, level: int) -> Mapping[str, int]:
    """The axis of a level's experts in every array that has one, the bias included, by name.

    Copying these slices from one expert to another copies the expert, weights and bias.

    >>> from tensormoe import CP, Dense, LayerSpec
    >>> expert_axes(LayerSpec(6, 5, (4, 3), CP(2)).network, 1)
    {'expert_1': 0}
    >>> expert_axes(LayerSpec(6, 5, (4, 3), Dense()).network, 1)
    {'weight': 1, 'bias': 1}
    """
    leg = expert_leg(level)
    return {
        factor.name: factor.legs.index(leg) for factor in network.all_factors if leg in factor.legs
    }


def expert_carriers(network: Network, level: int) -> tuple[str, ...]:
    """Names of arrays in whose slices a level's experts are linear, each once.

    An expert's matrix and its bias each depend on exactly one of these slices, all else fixed:
    scaled together, they scale the expert. That is one factor where it has a part in both, or the
    one that carries the input mode and its counterpart, the bias. Where several factors have a part
    of the expert, the largest is taken, in which it is freest. Of a sum, every term that tells
    experts apart has its own; experts are affine in these slices where others do not
    (:func:`has_common_part`).

    >>> from tensormoe import Dense, Hadamard, LayerSpec
    >>> expert_carriers(LayerSpec(6, 5, 4, Hadamard()).network, 0)
    ('expert_0',)
    >>> expert_carriers(LayerSpec(6, 5, 4, Dense()).network, 0)
    ('weight', 'bias')
    """
    leg = expert_leg(level)
    names: list[str] = []
    for term in network.terms:
        held = [factor for factor in term.factors if leg in factor.legs]
        if not held:
            continue
        best = max(held, key=lambda factor: prod(network.shape(factor)))
        names.append(best.name)
        if best == term.input_factor and term.bias is not None:
            names.append(term.bias.name)
    return tuple(names)


def has_common_part(network: Network, level: int) -> bool:
    """Whether some term is the same for all experts of a level, so that none is scaled alone.

    >>> from tensormoe import BaseDelta, Dense, LayerSpec
    >>> has_common_part(LayerSpec(6, 5, 4, Dense()).network, 0)
    False
    >>> has_common_part(LayerSpec(6, 5, 4, BaseDelta(2)).network, 0)
    True
    """
    return any(expert_leg(level) not in term.legs for term in network.terms)
