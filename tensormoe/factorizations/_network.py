"""A tensor network: named factors, the legs they share, and the sizes of those legs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import prod

__all__ = ["BATCH", "INPUT", "OUTPUT", "Factor", "Leg", "Network", "expert_leg"]

Leg = str
"""A leg is known by its name; legs of one name are one (hyper)edge of the network."""

BATCH: Leg = "b"
INPUT: Leg = "i"
OUTPUT: Leg = "o"


def expert_leg(level: int) -> Leg:
    """The expert mode of one level of the hierarchy."""
    return f"n{level}"


@dataclass(frozen=True, slots=True)
class Factor:
    """One array of a network: its mode first, then its bonds, contiguous in that order."""

    name: str
    legs: tuple[Leg, ...]


@dataclass(frozen=True)
class Network:
    """Factors whose contraction over all bonds is 𝒲, and the bias row as its own small factor.

    A leg may be shared by any number of factors; a mode that is also shared between factors (the
    output leg of a Hadamard network) is a hyperedge that stays open.

    Args:
        factors: the arrays of the network, in canonical order.
        size_items: pairs (leg, size), one for every leg.
        bias: the factor that takes the input factor's place for the constant input 1, if any.
    """

    factors: tuple[Factor, ...]
    size_items: tuple[tuple[Leg, int], ...]
    bias: Factor | None = None

    @cached_property
    def sizes(self) -> Mapping[Leg, int]:
        """The size of every leg."""
        return dict(self.size_items)

    @cached_property
    def all_factors(self) -> tuple[Factor, ...]:
        """The factors and, last, the bias."""
        return self.factors if self.bias is None else (*self.factors, self.bias)

    @cached_property
    def expert_legs(self) -> tuple[Leg, ...]:
        """The expert modes, outermost level first."""
        levels = sum(1 for leg in self.sizes if leg.startswith("n"))
        return tuple(expert_leg(level) for level in range(levels))

    @cached_property
    def input_factor(self) -> Factor:
        """The factor that carries the input mode."""
        return next(factor for factor in self.factors if INPUT in factor.legs)

    def shape(self, factor: Factor) -> tuple[int, ...]:
        """The array shape of ``factor``."""
        return tuple(self.sizes[leg] for leg in factor.legs)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The array shape of every factor, the bias included, by name."""
        return {factor.name: self.shape(factor) for factor in self.all_factors}

    @cached_property
    def num_parameters(self) -> int:
        """The number of stored entries."""
        return sum(prod(shape) for shape in self.shapes.values())

    def generic_rank(self, rows: Iterable[Leg], columns: Iterable[Leg]) -> int:
        """The rank that almost all values of the factors give the unfolding ``rows × columns``.

        It is the smallest product of leg sizes that separates the two sets of open legs (a
        minimum cut). Open legs in neither set are held at one index.
        """
        cuts = self.minimal_cuts(rows, columns)
        return min(prod(self.sizes[leg] for leg in cut) for cut in cuts)

    def minimal_cuts(
        self, rows: Iterable[Leg], columns: Iterable[Leg]
    ) -> tuple[tuple[Leg, ...], ...]:
        """The sets of legs that separate the open legs ``rows`` from ``columns``.

        They depend on the structure alone: the products of their sizes are the terms of the closed
        form min(∏, ∏, …) of :meth:`generic_rank`, for any sizes. Sets that contain another of
        them are left out.
        """
        structure = tuple(factor.legs for factor in self.factors)
        return _minimal_cuts(structure, frozenset(rows), frozenset(columns))


@lru_cache(maxsize=256)
def _minimal_cuts(
    structure: tuple[tuple[Leg, ...], ...], rows: frozenset[Leg], columns: frozenset[Leg]
) -> tuple[tuple[Leg, ...], ...]:
    """The cuts that no other cut is a part of: the terms of a closed form min(∏, ∏, …)."""
    closed = rows | columns
    held = {leg for legs in structure for leg in legs if leg[0] in "ion" and leg not in closed}
    edges = {leg for legs in structure for leg in legs} - held
    cuts = set()
    for sides in product((False, True), repeat=len(structure)):
        cut = set()
        for leg in edges:
            ends = {side for legs, side in zip(structure, sides, strict=True) if leg in legs}
            ends |= {False} if leg in rows else set()
            ends |= {True} if leg in columns else set()
            if len(ends) > 1:
                cut.add(leg)
        cuts.add(frozenset(cut))
    minimal = [cut for cut in cuts if not any(other < cut for other in cuts)]
    return tuple(sorted(tuple(sorted(cut)) for cut in minimal))
