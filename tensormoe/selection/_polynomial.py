"""Polynomials in the two sizes that rank selection varies.

Costs are sums of products of leg sizes. Given polynomials in place of sizes, the code that counts
a cost gives it as a function of the rank, so that there is no second set of formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Polynomial:
    """Σ c·a^p·s^q with coefficients of one sign or zero, but for differences in between.

    Args:
        terms: the coefficient c of every pair of powers (p, q).
    """

    terms: Mapping[tuple[int, int], float]

    @classmethod
    def constant(cls, value: float) -> Polynomial:
        """The polynomial that is ``value`` everywhere."""
        return cls({(0, 0): value})

    @classmethod
    def symbol(cls, index: int) -> Polynomial:
        """The outer size a (``index`` 0) or the inner size s (1)."""
        return cls({(1 - index, index): 1})

    def __add__(self, other: Polynomial | float) -> Polynomial:
        added = other.terms if isinstance(other, Polynomial) else {(0, 0): other}
        terms = dict(self.terms)
        for powers, value in added.items():
            terms[powers] = terms.get(powers, 0) + value
        return Polynomial(terms)

    __radd__ = __add__

    def __mul__(self, other: Polynomial | float) -> Polynomial:
        if not isinstance(other, Polynomial):
            return Polynomial({powers: value * other for powers, value in self.terms.items()})
        terms: dict[tuple[int, int], float] = {}
        for (p, q), value in self.terms.items():
            for (p2, q2), factor in other.terms.items():
                powers = (p + p2, q + q2)
                terms[powers] = terms.get(powers, 0) + value * factor
        return Polynomial(terms)

    __rmul__ = __mul__

    def __call__(self, outer: int, inner: int) -> float:
        total: float = 0
        for (p, q), value in self.terms.items():
            total += value * outer**p * inner**q
        return total

    def below(self, other: Polynomial) -> bool:
        """Whether no coefficient is larger than the other's, so that no value is."""
        return all(value <= other.terms.get(powers, 0) for powers, value in self.terms.items())


def least(polynomials: Iterable[Polynomial]) -> tuple[Polynomial, ...]:
    """The polynomials that the minimum over all of them needs."""
    kept: list[Polynomial] = []
    for each in polynomials:
        if not any(other.below(each) for other in kept):
            kept = [other for other in kept if not each.below(other)]
            kept.append(each)
    return tuple(kept)
