"""Response of a layer's output to moves of a factor's entries, from the network alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt

from tensormoe.factorizations._initialization import Initializer
from tensormoe.factorizations._network import INPUT, OUTPUT, Factor, Leg, Network

__all__ = ["Response", "responses"]


@dataclass(frozen=True, slots=True)
class Response:
    """Change of an output's entries when every entry of a factor moves by ±1.

    Args:
        energy: its mean square if the signs follow the gradients of very many inputs: what the
            other factors make of an input of unit mean square.
        alignment: factor by which that grows if they follow the gradient of a single input.
    """

    energy: float
    alignment: float

    def size(self, directions: float) -> float:
        """Root mean square of the change if gradients have so many independent directions.

        A weight of a linear layer has ``Response(in, in)``: √in for very many directions, and
        nearly in for a single one.
        """
        return sqrt(self.energy * (1.0 + self.alignment / directions))


def responses(
    network: Network, starts: Mapping[str, Initializer], *, indexed_input: bool = False
) -> dict[str, Response]:
    """The response to every factor and bias, by name.

    Coefficients are taken to sum to one, and the entries of all experts to move alike.

    Args:
        network: of the layer.
        starts: the initial values of every factor, the biases included.
        indexed_input: whether inputs pick a row each instead of summing over all.
    """
    picked = {*network.expert_legs} | ({INPUT} if indexed_input else set())
    found: dict[str, Response] = {}
    for term in network.terms:
        found |= _of_product(term.factors, network, starts, picked)
        if term.bias is not None:
            name = term.bias.name
            found[name] = _of_product(term.bias_factors, network, starts, picked)[name]
    return found


def _of_product(
    factors: tuple[Factor, ...],
    network: Network,
    starts: Mapping[str, Initializer],
    picked: set[Leg],
) -> dict[str, Response]:
    sizes = network.sizes
    squares = {each.name: starts[each.name].mean_square(network.shape(each)) for each in factors}
    legs = {leg for factor in factors for leg in factor.legs}
    energy = prod(squares.values()) * prod(sizes[leg] for leg in legs - picked - {OUTPUT})
    found = {}
    for factor in factors:
        own = {*factor.legs} - picked
        others = [each for each in factors if each != factor]
        behind = _reached(OUTPUT, others, picked | {INPUT})
        before = _reached(INPUT, others, picked | {OUTPUT})
        # a gradient is an outer product of what comes from inputs, from experts, and of the rest;
        # experts have a part in common, which is the same direction for every input
        incoming, common, entries = (
            prod(sizes[leg] for leg in legs)
            for legs in ((own & before) - behind, own - before - behind, own)
        )
        alignment = max(incoming, entries / (common * sizes[OUTPUT]))
        found[factor.name] = Response(common * energy / squares[factor.name], alignment)
    return found


def _reached(start: Leg, factors: list[Factor], closed: set[Leg]) -> set[Leg]:
    """The legs that are connected with ``start`` through ``factors``."""
    reached, size = {start}, 0
    while size < len(reached):
        size = len(reached)
        for factor in factors:
            legs = {*factor.legs} - closed
            if legs & reached:
                reached |= legs
    return reached
