"""Layers that differ in the sizes of their free bonds alone, and their capacity."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any, cast

from tensormoe._spec import LayerSpec
from tensormoe._validation import positive_int
from tensormoe.errors import BudgetError, RankError
from tensormoe.factorizations import (
    INPUT,
    OUTPUT,
    Dense,
    Factorization,
    Leg,
    Network,
    factorization_class,
    sample,
)
from tensormoe.selection._polynomial import Polynomial, least

Choice = tuple[int, int]
"""The sizes of the outer and the inner symbol; 1 for a symbol that the family does not have."""

OUTER, INNER = 0, 1


class Family:
    """All layers of one factorization whose free bonds vary by symbol.

    Bonds of one symbol are equally large. The last symbol of the pattern is the inner one, which
    is solved for; the one before it, if any, is the outer one, which is searched over.

    Args:
        factorization: a name or a class.
        in_features: I.
        out_features: O.
        experts: N, or one size per level.
        bias: whether every expert has a bias.
        bonds: for every bond a size that is fixed, a symbol, or None, which is a symbol like any
            other; by default the factorization's own pattern.
    """

    def __init__(
        self,
        factorization: str | type[Factorization],
        in_features: int,
        out_features: int,
        experts: int | tuple[int, ...],
        bias: bool,
        bonds: Sequence[int | str | None] | None,
    ) -> None:
        kind = factorization_class(factorization)
        # sizes are checked as every spec's are, before there is a rank
        sizes = LayerSpec(in_features, out_features, experts, Dense(), bias)
        self.sizes = sizes
        self._given = factorization
        # with_rank makes the ranks from a value of the factorization; its own rank is not used
        self._kind = sample(kind)
        self.name = kind.name
        pattern = self._kind.rank_pattern(sizes.levels)
        self.by_pattern = bonds is None
        self.bonds = pattern if bonds is None else _checked_bonds(bonds, pattern, kind.name)
        free = [bond for bond in self.bonds if not isinstance(bond, int)]
        symbols = list(dict.fromkeys(free))
        if len(symbols) > 2:
            raise BudgetError(
                f"bonds must vary by at most two symbols; got {len(symbols)} in {self.bonds!r}. "
                "Fix the sizes of some bonds, or give bonds the same symbol."
            )
        self._places = {name: INNER - k for k, name in enumerate(reversed(symbols))}
        self.symbols = len(symbols)
        self.place_of: dict[Leg, int] = {}
        """Index in the rank of every bond that follows it."""
        self.legs = self._symbolic_sizes(self.place_of)
        self._network = self.spec((1, 1)).network
        self._symbolic = _symbolic(self._network, self.legs)
        self.parameters = self._symbolic.num_parameters
        self._at = cache(lambda outer: [_at(terms, outer) for terms in self._figures])

    @cached_property
    def _figures(self) -> tuple[tuple[Polynomial, ...], ...]:
        """Expert rank and expert span, each the least of its terms; costs are known without."""
        unfoldings = (({INPUT}, {OUTPUT}), (self._network.expert_legs, {INPUT, OUTPUT}))
        return tuple(
            self._symbolic.generic_ranks(*sides, Polynomial.constant(1), least)
            for sides in unfoldings
        )

    def with_bonds(self, bonds: Sequence[int | str | None]) -> Family:
        """The layers of these sizes with other bonds fixed."""
        given = self.sizes
        return Family(
            self._given, given.in_features, given.out_features, given.experts, given.bias, bonds
        )

    def with_experts(self, experts: tuple[int, ...]) -> Family:
        """The layers with as many experts in other levels; only where no bonds were given."""
        given = self.sizes
        return Family(self._given, given.in_features, given.out_features, experts, given.bias, None)

    def rank(self, sizes: Choice) -> tuple[int, ...]:
        """One size per bond."""
        return tuple(
            bond if isinstance(bond, int) else sizes[self._places[bond]] for bond in self.bonds
        )

    def spec(self, sizes: Choice) -> LayerSpec:
        """The layer with these bonds."""
        return replace(self.sizes, factorization=self._kind.with_rank(self.rank(sizes)))

    def figures(self, sizes: Choice) -> tuple[int, int]:
        """Expert rank and expert span."""
        outer, inner = sizes
        (rank, sums), (span, more) = self._at(outer)
        # searches ask this more often than anything else
        least = [min([value * inner**power for power, value in each]) for each in (rank, span)]
        for index, others in enumerate((sums, more)):
            for term in others:
                least[index] = min(least[index], term(outer, inner))
        return int(least[0]), int(least[1])

    def saturation(self, symbol: int) -> int:
        """The size from which on a symbol changes neither figure, whatever the other's size."""
        size = 1
        for terms in self._figures:
            # every unfolding has a cut through its open legs alone
            bound = min(term.terms[0, 0] for term in terms if {*term.terms} == {(0, 0)})
            for term in terms:
                if any(powers[symbol] for powers in term.terms):
                    size = _reaching(term, symbol, bound, size)
        return size

    def _symbolic_sizes(self, places: dict[Leg, int]) -> Mapping[Leg, Polynomial]:
        """The size of every leg as a polynomial in the symbols; says what follows the rank."""
        count = len(self.bonds)
        given = self.sizes
        # two ranks without a number in common, which tell what each leg's size follows
        probes = [self._kind.with_rank(tuple(range(k + 1, k + 1 + count))) for k in (0, count)]
        low, high = (each.bond_sizes(given.experts, given.out_features) for each in probes)
        network = probes[0].network(
            given.experts, given.in_features, given.out_features, given.bias
        )
        legs = {leg: Polynomial.constant(size) for leg, size in network.sizes.items()}
        for leg, number in low.items():
            if high[leg] == number:
                continue  # the factorization's own, whatever the rank
            if high[leg] != number + count or number > count:
                raise RankError(
                    f"every bond of {self.name} must be as large as one entry of its rank, or "
                    f"always the same, for a rank to be chosen; got another size for leg {leg!r}. "
                    "Give rank=…."
                )
            places[leg] = number - 1
            bond = self.bonds[number - 1]
            if not isinstance(bond, int):
                legs[leg] = Polynomial.symbol(self._places[bond])
            else:
                legs[leg] = Polynomial.constant(bond)
        return legs


def _checked_bonds(
    bonds: Sequence[int | str | None], pattern: tuple[str, ...], name: str
) -> tuple[int | str | None, ...]:
    if isinstance(bonds, str) or not isinstance(bonds, Sequence) or len(bonds) != len(pattern):
        raise RankError(
            f"bonds must have {len(pattern)} entries for {name!r}; got {bonds!r}. Give a size, or "
            "None where it is to be chosen, for every bond."
        )
    checked: list[int | str | None] = []
    for index, bond in enumerate(bonds):
        if bond is None or isinstance(bond, str):
            checked.append(bond)
        else:
            checked.append(positive_int(bond, f"bonds, at bond {index},", RankError))
    return tuple(checked)


def _symbolic(network: Network, legs: Mapping[Leg, Polynomial]) -> Any:
    # counting multiplies and adds sizes, and polynomials can be multiplied and added
    return Network(network.factors, cast(Any, tuple(legs.items())), network.biases)


def _at(
    terms: Iterable[Polynomial], outer: int
) -> tuple[list[tuple[int, float]], list[Polynomial]]:
    """A minimum of terms at an outer size, as far as it depends on the inner one.

    Returns:
        The least coefficient of every power of the inner size, and the terms that are sums.
    """
    single: dict[int, float] = {}
    sums = []
    for term in terms:
        if len(term.terms) > 1:
            sums.append(term)
            continue
        for (first, second), value in term.terms.items():
            there = value * outer**first
            single[second] = min(single.get(second, there), there)
    return list(single.items()), sums


def _reaching(term: Polynomial, symbol: int, bound: float, low: int) -> int:
    """The smallest size of a symbol, at least ``low``, at which a term reaches ``bound``."""

    def reaches(size: int) -> bool:
        return term(*(size if place == symbol else 1 for place in (OUTER, INNER))) >= bound

    high = low
    while not reaches(high):
        high *= 2
    return low + bisect_left(range(low, high), True, key=reaches)
