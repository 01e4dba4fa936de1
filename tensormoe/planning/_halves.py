"""One expert's network, cut into the half that reads inputs and the half that writes outputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import prod

from tensormoe.factorizations import INPUT, OUTPUT, Factor, Leg, Network
from tensormoe.planning._program import Operand, Program
from tensormoe.planning._weight_programs import contraction


@dataclass(frozen=True)
class Halves:
    """Programs of the two matrices whose product is an expert's.

    Args:
        reads: the program of (in, r).
        writes: the program of (r, out).
        inner: r, the product of the sizes of the legs that were cut.
    """

    reads: Program
    writes: Program
    inner: int


@lru_cache(maxsize=256)
def expert_halves(network: Network) -> Halves | None:
    """The smallest cut of one expert's network between input and output.

    Programs take factors whose expert modes were indexed away.

    Args:
        network: of the layer.

    Returns:
        None where there is no cut smaller than the expert's matrix is on its smaller side: a sum of
        several networks, or a factor that has both input and output.
    """
    if len(network.terms) > 1:
        return None
    factors = network.terms[0].factors
    others = [each for each in factors if not {INPUT, OUTPUT} & {*each.legs}]
    first = [each for each in factors if INPUT in each.legs]
    last = [each for each in factors if OUTPUT in each.legs]
    if len(first) + len(last) + len(others) != len(factors):
        return None
    cuts = []
    for count in range(len(others) + 1):
        for some in combinations(others, count):
            left = [*first, *some]
            right = [each for each in factors if each not in left]
            legs = _legs(network, left)
            shared = tuple(leg for leg in legs if leg in _legs(network, right))
            cuts.append((prod(network.sizes[leg] for leg in shared), shared, left, right))
    inner, shared, left, right = min(cuts, key=lambda cut: cut[0])
    if inner >= min(network.in_features, network.out_features):
        return None
    return Halves(
        _contracted(network, left, (INPUT, *shared)),
        _contracted(network, right, (*shared, OUTPUT)),
        inner,
    )


def _legs(network: Network, factors: list[Factor]) -> tuple[Leg, ...]:
    """Legs of some factors of one expert, each once."""
    listed = (leg for each in factors for leg in each.legs if leg not in network.expert_legs)
    return tuple(dict.fromkeys(listed))


def _contracted(network: Network, factors: list[Factor], output: tuple[Leg, ...]) -> Program:
    operands = tuple(Operand(each.name, _legs(network, [each]), "factor") for each in factors)
    return contraction(operands, output, network.sizes)
