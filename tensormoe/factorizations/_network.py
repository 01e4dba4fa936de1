"""A tensor network: named factors, the legs they share, and the sizes of those legs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from tensormoe._validation import choice, positive_int
from tensormoe.errors import SpecError
from tensormoe.factorizations._cuts import cut_sizes

Leg = str
"""A leg is known by its name; legs of one name are one (hyper)edge of the network."""

BATCH: Leg = "b"
"""The leg of inputs in a batch, which no factor has."""
INPUT: Leg = "i"
"""The leg of an input's features."""
OUTPUT: Leg = "o"
"""The leg of an output's features."""


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


@dataclass(frozen=True, slots=True)
class Cut:
    """A leg of a network, cut into equal slices, one per device.

    Args:
        leg: that is cut.
        devices: P, the number of slices.
    """

    leg: Leg
    devices: int


@dataclass(frozen=True)
class Term:
    """Factors that are multiplied: a network that is not a sum, or one term of a sum.

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
        cut: the leg of which this is one device's slice, as :meth:`slice` makes it; its size is
            that of the slice. None for a whole network.
    """

    factors: tuple[Factor, ...]
    size_items: tuple[tuple[Leg, int], ...]
    biases: tuple[Factor, ...] = ()
    cut: Cut | None = None

    @cached_property
    def _hash(self) -> int:
        return hash((self.factors, self.size_items, self.biases, self.cut))

    def __hash__(self) -> int:
        # computed once: networks key the caches of plans and programs
        return self._hash

    def __reduce__(self) -> tuple[type[Network], tuple[Any, ...]]:
        # rebuilt rather than restored: hashes of strings differ from one process to the next
        return Network, (self.factors, self.size_items, self.biases, self.cut)

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
        """Terms of the sum; one for most networks."""
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

    @cached_property
    def experts(self) -> tuple[int, ...]:
        """The number of experts of every level, outermost first."""
        return tuple(self.sizes[leg] for leg in self.expert_legs)

    @property
    def in_features(self) -> int:
        """The size of the input mode."""
        return self.sizes[INPUT]

    @property
    def out_features(self) -> int:
        """The size of the output mode."""
        return self.sizes[OUTPUT]

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

    @cached_property
    def shardable_legs(self) -> tuple[Leg, ...]:
        """The legs that can be cut: modes, and the bonds that every term of a sum has."""
        modes = {*self.expert_legs, INPUT, OUTPUT}
        return tuple(
            leg
            for leg in self.sizes
            if leg in modes or all(leg in each.legs for each in self.terms)
        )

    def slice(self, leg: Leg, devices: int) -> Network:
        """One device's part of the network: the same network with a smaller leg.

        Every factor that has the leg holds its slice of it, and the others are whole. The result
        of the part is a slice for the output leg, and for all others a term of a sum over the
        devices. Biases count once: where the input leg is cut, each device has its share of them.

        Args:
            leg: to be cut; one of :attr:`shardable_legs`.
            devices: P, the number of slices.

        Raises:
            SpecError: no such leg, one that cannot be cut or does not divide, or a network that is
                a slice already.
        """
        positive_int(devices, "devices")
        if self.cut is not None:
            raise SpecError(
                f"a network must be whole to be cut; got a slice along {self.cut.leg!r} already. "
                "Cut the whole one, along one leg."
            )
        choice(leg, self.shardable_legs, "leg", SpecError)
        size = self.sizes[leg]
        if size % devices:
            divisible = [each for each in self.shardable_legs if self.sizes[each] % devices == 0]
            raise SpecError(
                f"the size of a leg must be a multiple of the {devices} devices; got {size} for "
                f"leg {leg!r}. {_dividing(divisible)}"
            )
        return self._resized(leg, size // devices, Cut(leg, devices))

    @cached_property
    def whole(self) -> Network:
        """The network that this is a slice of; the network itself where it is not a slice."""
        if self.cut is None:
            return self
        leg, devices = self.cut.leg, self.cut.devices
        return self._resized(leg, self.sizes[leg] * devices, None)

    def _resized(self, leg: Leg, size: int, cut: Cut | None) -> Network:
        items = tuple((each, size if each == leg else old) for each, old in self.size_items)
        return replace(self, size_items=items, cut=cut)

    @cached_property
    def expert_rank(self) -> int:
        """The rank that a single expert's matrix (in, out) has for almost all factor values."""
        return self.generic_rank({INPUT}, {OUTPUT})

    @cached_property
    def expert_span(self) -> int:
        """The dimension of the space that all experts' matrices span, for almost all factors.

        It is the rank of the unfolding experts × (in·out): how different experts can be.
        """
        return self.generic_rank(self.expert_legs, {INPUT, OUTPUT})

    def generic_rank(self, rows: Iterable[Leg], columns: Iterable[Leg]) -> int:
        """The rank that almost all values of the factors give the unfolding ``rows × columns``.

        For a term it is the smallest product of leg sizes that separates the two sets of open legs
        (a minimum cut); those of the terms add up, as far as the unfolding has room. Open legs in
        neither set are held at one index.
        """
        rank: int = self.generic_ranks(rows, columns, 1, lambda sums: (min(sums),))[0]
        return rank

    def generic_ranks(
        self,
        rows: Iterable[Leg],
        columns: Iterable[Leg],
        one: Any,
        keep: Callable[[Iterable[Any]], tuple[Any, ...]],
    ) -> tuple[Any, ...]:
        """Terms whose minimum :meth:`generic_rank` takes, for sizes that are not numbers.

        Given polynomials as sizes, these are the terms of the closed form min(∏, ∏ + ∏, …).

        Args:
            rows: open legs.
            columns: other open legs.
            one: the size of the empty product.
            keep: the part of some products or sums of products that the smallest can come from.
        """
        sides = frozenset(rows), frozenset(columns)
        total: tuple[Any, ...] = ()
        for term in self.terms:
            structure = tuple(factor.legs for factor in term.factors)
            found = cut_sizes(structure, *sides, self.sizes, one, keep)
            total = keep(a + b for a in total for b in found) if total else found
        if len(self.terms) > 1:
            # the rank of the sum is at most the product of its open legs
            rooms = (prod((self.sizes[leg] for leg in side), start=one) for side in sides)
            total = keep((*rooms, *total))
        return total


def _dividing(legs: list[Leg]) -> str:
    """Remedy for a leg that does not divide."""
    if not legs:
        return "No leg of this layer divides: take other sizes, or another number of devices."
    return f"Legs that divide are {', '.join(map(repr, legs))}."
