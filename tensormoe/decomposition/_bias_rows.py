"""Biases as one more row of the input mode, and apart again."""

from __future__ import annotations

from collections.abc import Mapping

from tensormoe.backend import Array, Backend
from tensormoe.factorizations import INPUT, Network


def with_bias_rows(
    network: Network, factors: Mapping[str, Array], backend: Backend
) -> dict[str, Array]:
    """Factors whose input mode ends in the bias.

    Args:
        network: whose terms have biases.
        factors: arrays by name, the biases included.
        backend: the adapter of their library.
    """
    xp, found = backend.namespace, dict(factors)
    for term in network.terms:
        if term.bias is not None:
            axis = term.input_factor.legs.index(INPUT)
            row = xp.expand_dims(found.pop(term.bias.name), axis=axis)
            name = term.input_factor.name
            found[name] = xp.concat([found[name], row], axis=axis)
    return found


def without_bias_rows(network: Network, factors: Mapping[str, Array]) -> dict[str, Array]:
    """The inverse of :func:`with_bias_rows`."""
    found = dict(factors)
    for term in network.terms:
        if term.bias is not None:
            name = term.input_factor.name
            axis = (slice(None),) * term.input_factor.legs.index(INPUT)
            found[term.bias.name] = found[name][(*axis, -1)]
            found[name] = found[name][(*axis, slice(None, -1))]
    return found
