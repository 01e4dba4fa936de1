"""The same tensor from factors that rounding hurts least.

A matrix and its inverse, put between two factors that share a bond, change both and not what they
make together. Factors that a search ends with may be nearly dependent along a bond, and their large
parts cancel; rounded to bfloat16, whose entries have eight bits, little is left of such a sum. In a
network without cycles, all factors but one can be made orthonormal instead (Oseledets 2011 for
tensor trains), and then rounding errors are not amplified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, frexp, fsum, log
from typing import TYPE_CHECKING, Any

from tensormoe.decomposition._solve import orthonormal_columns
from tensormoe.factorizations import INPUT, OUTPUT, Factor, Leg, Network, Term

if TYPE_CHECKING:
    from numpy.typing import NDArray


def robust(network: Network, factors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The same tensor from factors that can be rounded: orthonormal where possible, of one size.

    Args:
        network: a bias of which is a row of the input's factor.
        factors: NumPy arrays by name.
    """
    found = dict(factors)
    for term in network.terms:
        names = [factor.name for factor in term.factors]
        found |= even(orthonormal(term, {name: found[name] for name in names}))
    return found


def orthonormal(term: Term, factors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Factors of a term without cycles, all but one orthonormal towards that one.

    Others stay as they are, and so do factors that are too small to be orthonormal.

    Args:
        term: of a network, mostly all of it.
        factors: NumPy arrays by name.
    """
    import numpy as np

    found = dict(factors)
    legs = {factor.name: factor.legs for factor in term.factors}
    for name, leg, parent in _upwards(term.factors):
        axis = legs[name].index(leg)
        moved = np.moveaxis(found[name], axis, -1)
        matrix = moved.reshape(-1, moved.shape[-1])
        if len(matrix) < matrix.shape[1]:
            continue
        basis, rest = orthonormal_columns(matrix)
        found[name] = np.moveaxis(basis.reshape(moved.shape), -1, axis)
        index = legs[parent].index(leg)
        found[parent] = np.moveaxis(np.tensordot(rest, found[parent], (1, index)), 0, index)
    return found


def even(factors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The same network with factors of one size: a dtype of few exponents loses the least so.

    A network is linear in each factor, so scales pass from one to the other.
    """
    import numpy as np

    sizes = {name: float(np.abs(array).max()) for name, array in factors.items()}
    if not all(sizes.values()):
        return dict(factors)
    mean = exp(fsum(log(size) for size in sizes.values()) / len(sizes))
    return {name: array * (mean / sizes[name]) for name, array in factors.items()}


def stretched(network: Network, factors: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The factors of a tensor times a power of two, which all factors of a term have a part in.

    So each stays far from the ends of its dtype's range.

    Args:
        network: its terms may have biases.
        factors: arrays of any library, by name.
        scale: the power of two.
    """
    found, exponent = dict(factors), frexp(scale)[1] - 1
    if not exponent:
        return found
    for term in network.terms:
        count = len(term.factors)
        for index, factor in enumerate(term.factors):
            part = 2.0 ** (exponent * (index + 1) // count - exponent * index // count)
            found[factor.name] = found[factor.name] * part
            # the bias takes the place of the input's factor
            if term.bias is not None and factor == term.input_factor:
                found[term.bias.name] = found[term.bias.name] * part
    return found


def _upwards(factors: Sequence[Factor]) -> list[tuple[str, Leg, str]]:
    """Each factor but one, its bond towards that one, and the factor there; leaves come first.

    Empty where bonds are shared by more than two factors, or make a cycle.
    """
    holders: dict[Leg, list[str]] = {}
    for factor in factors:
        for leg in factor.legs:
            if leg not in (INPUT, OUTPUT) and not leg.startswith("n"):
                holders.setdefault(leg, []).append(factor.name)
    names = [factor.name for factor in factors]
    if any(len(set(each)) != 2 for each in holders.values()) or len(holders) != len(names) - 1:
        return []
    bonds = {name: [leg for leg, each in holders.items() if name in each] for name in names}
    # the one with most bonds is in the middle
    root = max(names, key=lambda name: len(bonds[name]))
    order: list[tuple[str, Leg, str]] = []
    reached, waiting = {root}, [root]
    while waiting:
        parent = waiting.pop()
        for leg in bonds[parent]:
            (other,) = set(holders[leg]) - {parent}
            if other not in reached:
                reached.add(other)
                waiting.append(other)
                order.append((other, leg, parent))
    # as many bonds as a tree has, and all reached: no cycle
    return order[::-1] if len(reached) == len(names) else []
