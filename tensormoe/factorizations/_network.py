"""A tensor network: named factors, the legs they share, and the sizes of those legs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import prod

__all__ = ["BATCH", "INPUT", "OUTPUT", "Factor", "Leg", "Network", "Term", "expert_leg"]

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
    """One array of a network: its mode first, then its bonds, contiguous in that order.

    Args:
        name: of the array.
        legs: of its axes.
        term: the term of a sum that it is a part of.
    """

    name: str
    legs: tuple[Leg, ...]
    term: int = 0


@dataclass(frozen=True)
class Term:
    """Factors that are multiplied: a network that is no sum, or one term of a sum.

    A term without some expert leg is the same for all experts of that level.

    Args:
        factors: its arrays.
        bias: the factor that takes the input factor's place for the constant input 1, if any.
    """

    factors: tuple[Factor, ...]
    bias: Factor | None = None

    @cached_property
    def input_factor(self) -> Factor:
        """The factor that carries the input mode."""
        return next(factor for factor in self.factors if INPUT in factor.legs)

    @cached_property
    def legs(self) -> frozenset[Leg]:
        """The legs of all its factors."""
        return frozenset(leg for factor in self.factors for leg in factor.legs)

    @cached_property
    def bias_factors(self) -> tuple[Factor, ...]:
        """The factors that make the bias: those of the matrix, the input's exchanged."""
        assert self.bias is not None
        return tuple(
            self.bias if factor == self.input_factor else factor for factor in self.factors
        )


@dataclass(frozen=True)
class Network:
    """Factors whose contraction over all bonds is 𝒲, and bias rows as small factors of their own.

    A leg may be shared by any number of factors; a mode that is also shared between factors (the
    output leg of a Hadamard network) is a hyperedge that stays open. 𝒲 may be a sum of several
    such contractions: every factor knows its term, and terms share no bonds.

    Args:
        factors: the arrays of the network, in canonical order.
        size_items: pairs (leg, size), one for every leg.
        biases: one for every term, or none: what takes the input factor's place for the constant
            input 1.
    """

    factors: tuple[Factor, ...]
    size_items: tuple[tuple[Leg, int], ...]
    biases: tuple[Factor, ...] = ()

    @cached_property
    def sizes(self) -> Mapping[Leg, int]:
        """The size of every leg."""
        return dict(self.size_items)

    @cached_property
    def all_factors(self) -> tuple[Factor, ...]:
        """The factors and, last, the biases."""
        return (*self.factors, *self.biases)

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """What is summed; one term for most networks."""
        biases = {factor.term: factor for factor in self.biases}
        numbers = dict.fromkeys(factor.term for factor in self.factors)
        return tuple(
            Term(tuple(each for each in self.factors if each.term == number), biases.get(number))
            for number in numbers
        )

    @property
    def input_factor(self) -> Factor:
        """The factor that carries the input mode; of a sum, that of the first term."""
        return self.terms[0].input_factor

    @cached_property
    def expert_legs(self) -> tuple[Leg, ...]:
        """The expert modes, outermost level first."""
        levels = sum(1 for leg in self.sizes if leg.startswith("n"))
        return tuple(expert_leg(level) for level in range(levels))

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

        For a term it is the smallest product of leg sizes that separates the two sets of open legs
        (a minimum cut); those of the terms add up, as far as the unfolding has room. Open legs in
        neither set are held at one index.
        """
        sums = self.minimal_cuts(rows, columns)
        return min(sum(prod(self.sizes[leg] for leg in cut) for cut in cuts) for cuts in sums)

    def minimal_cuts(
        self, rows: Iterable[Leg], columns: Iterable[Leg]
    ) -> tuple[tuple[tuple[Leg, ...], ...], ...]:
        """The sets of legs that separate the open legs ``rows`` from ``columns``.

        They depend on the structure alone. Each entry has one cut for every term of the network, or
        a single one, which is of the open legs themselves; the sums of the products of their sizes
        are what :meth:`generic_rank` takes the smallest of, for any sizes: its closed form
        min(∏, ∏ + ∏, …). Cuts of a term that contain another of its cuts are left out.
        """
        sides = frozenset(rows), frozenset(columns)
        by_term = [
            _minimal_cuts(tuple(factor.legs for factor in term.factors), *sides)
            for term in self.terms
        ]
        if len(by_term) == 1:
            return tuple((cut,) for cut in by_term[0])
        return (*((tuple(sorted(side)),) for side in sides), *product(*by_term))


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
