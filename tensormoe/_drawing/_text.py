"""Tensor networks as text: a wire for every array, a rail for every leg."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tensormoe.factorizations import INPUT, OUTPUT, Leg, Network, Term

Role = Literal["data", "factor", "result", "leg", "wire"]
Segment = tuple[str, Role]

_INDENT = 2


@dataclass(frozen=True)
class Array:
    """One array of a network with the legs that are drawn: all but the batch."""

    name: str
    legs: tuple[Leg, ...]
    role: Role


def network_lines(network: Network) -> list[list[list[Segment]]]:
    """Lines of coloured segments, for every term of a sum.

    Every array is a horizontal wire with a dot where it carries a leg; every leg is a rail from
    the first array that carries it to the last one. A rail with three dots or more is a hyperedge.
    Data stand before the factors that they meet, first those that meet none, and the result last.
    The bias is left out: it takes the place of the input and its factor.
    """
    return [_lines(_arrays_of(network, term), network.sizes) for term in network.terms]


def _arrays_of(network: Network, term: Term) -> list[Array]:
    data = [Array(f"coefficients_{k}", (leg,), "data") for k, leg in enumerate(network.expert_legs)]
    data.append(Array("x", (INPUT,), "data"))
    # the coefficients of what is common to all experts are summed
    found = [each for each in data if each.legs[0] not in term.legs]
    data = [each for each in data if each not in found]
    # a core, which meets no data, stands behind the factors that it joins
    for factor in sorted(term.factors, key=lambda each: _is_core(each.legs)):
        met = [each for each in data if each.legs[0] in factor.legs]
        data = [each for each in data if each not in met]
        found += [*met, Array(factor.name, factor.legs, "factor")]
    return [*found, Array("y", (OUTPUT,), "result")]


def _is_core(legs: tuple[Leg, ...]) -> bool:
    """Whether an array carries bonds alone."""
    return not any(leg in (INPUT, OUTPUT) or leg.startswith("n") for leg in legs)


def _lines(arrays: list[Array], sizes: Mapping[Leg, int]) -> list[list[Segment]]:
    legs = list(dict.fromkeys(leg for array in arrays for leg in array.legs))
    rows = {leg: [k for k, array in enumerate(arrays) if leg in array.legs] for leg in legs}
    # odd, so that a rail has a middle to run in
    width = (max(max(len(leg), len(str(sizes[leg]))) for leg in legs) + 2) | 1
    margin = max(len(array.name) for array in arrays) + _INDENT + 1
    blank: Segment = (" " * margin, "wire")
    names: list[Segment] = [(leg.center(width), "leg") for leg in legs]
    counts: list[Segment] = [(str(sizes[leg]).center(width), "wire") for leg in legs]
    lines = [[blank, *names], [blank, *counts]]
    for row, array in enumerate(arrays):
        if row:
            passing = (rows[leg][0] < row <= rows[leg][-1] for leg in legs)
            rails = "".join(("│" if rail else " ").center(width) for rail in passing)
            lines.append([blank, (rails.rstrip(), "wire")])
        last = max(legs.index(leg) for leg in array.legs)
        line: list[Segment] = [((" " * _INDENT + array.name).ljust(margin), array.role)]
        for index, leg in enumerate(legs):
            rail = rows[leg][0] < row < rows[leg][-1]
            if index > last:
                line.append((("│" if rail else " ").center(width), "wire"))
                continue
            middle = "●" if leg in array.legs else "┼" if rail else "─"
            half = width // 2
            line.append(("─" * half, "wire"))
            line.append((middle, array.role if middle == "●" else "wire"))
            line.append((("─" if index < last else " ") * half, "wire"))
        lines.append(line)
    return lines
