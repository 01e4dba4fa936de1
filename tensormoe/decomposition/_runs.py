"""Runs of the search: for a rank that is given, and for ranks that have to be found."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, prod

from tensormoe._spec import LayerSpec
from tensormoe._validation import non_negative_int
from tensormoe.backend import Array
from tensormoe.decomposition._choose import Sizes, candidates, checked_tolerance, smallest
from tensormoe.decomposition._contractions import structures
from tensormoe.decomposition._fit import fit
from tensormoe.decomposition._search import Search
from tensormoe.decomposition._source import Source
from tensormoe.errors import BudgetError, SpecError
from tensormoe.factorizations import (
    INPUT,
    OUTPUT,
    Factorization,
    FactorizationLike,
    resolve_factorization,
)
from tensormoe.planning import Budget

__all__ = ["LARGE", "TRIAL", "Runs"]

TRIAL = Search(starts=1, sweeps=8, polish=0)
"""Enough to tell candidates apart."""

LARGE = 2**24
"""Entries from which on trials of several ranks would take too long."""


@dataclass(frozen=True, eq=False)
class Runs:
    """The search for the factors of one tensor.

    Args:
        source: the tensor.
        sizes: in, out, and the experts.
        bias: whether the layer has biases, which are one more row of the tensor's matrices.
        search: how long to search.
        seed: of the random starts.
    """

    source: Source
    sizes: Sizes
    bias: bool
    search: Search
    seed: int

    def __post_init__(self) -> None:
        non_negative_int(self.seed, "seed")

    def run(
        self, kind: Factorization, search: Search | None = None
    ) -> tuple[dict[str, Array], tuple[float, ...]]:
        """Factors, and the error after every sweep."""
        import numpy as np

        rows, columns, experts = self.sizes
        spec = LayerSpec(rows, columns, experts, kind, bias=False)
        network = spec.network
        open_legs = (*network.expert_legs, INPUT, OUTPUT)
        wider = {**network.sizes, INPUT: rows + self.bias}
        terms = structures(network, open_legs, wider)
        return fit(terms, self.source, search or self.search, np.random.default_rng(self.seed))

    def resolve(
        self,
        factorization: FactorizationLike,
        rank: int | tuple[int, ...] | None,
        budget: Budget | float | None,
        tolerance: float | None,
    ) -> Factorization:
        """The factorization with its rank.

        Raises:
            SpecError, RankError, BudgetError: one that cannot be.
        """
        given = [each is not None for each in (rank, budget, tolerance)]
        if isinstance(factorization, Factorization) or not any(given):
            if any(given):
                raise SpecError(
                    "a factorization that is a value has its rank; got rank, budget or tolerance "
                    "besides. Give its name instead."
                )
            return resolve_factorization(factorization, None)
        if sum(given) > 1:
            raise SpecError("one of rank, budget and tolerance must be given; got several.")
        if rank is not None:
            return resolve_factorization(factorization, rank)
        if budget is not None:
            return self._best(factorization, self._budget(budget))
        assert tolerance is not None
        return self._within(factorization, checked_tolerance(tolerance))

    @property
    def _dense(self) -> int:
        rows, columns, experts = self.sizes
        return prod(experts) * (rows + self.bias) * columns

    def _budget(self, budget: Budget | float) -> Budget | int:
        """A budget, with a share of the weights' own entries as a number of them."""
        if not isinstance(budget, float):
            return budget
        if not 0 < budget <= 1:
            raise BudgetError(
                f"a budget that is a float is a share of the weights' entries, in (0, 1]; got "
                f"{budget!r}. Give an integer for a number of parameters."
            )
        return int(budget * self._dense)

    def _best(self, kind: str | type[Factorization], budget: Budget | int) -> Factorization:
        """The candidate within a budget whose short search ends lowest."""
        found = candidates(kind, self.sizes, budget, self.bias)
        if len(found) == 1 or self._dense > LARGE:
            return found[0]
        return min(found, key=lambda each: min(self.run(each, TRIAL)[1], default=inf))

    def _within(self, name: str | type[Factorization], tolerance: float) -> Factorization:
        """The rank of the smallest budget that reaches a tolerance."""

        def at(budget: int) -> Factorization | None:
            try:
                return self._best(name, budget)
            except BudgetError:
                return None

        errors: dict[Factorization, float] = {}

        def reaches(budget: int) -> bool:
            kind = at(budget)
            if kind is None:
                return False
            if kind not in errors:
                errors[kind] = self.run(kind)[1][-1]
            return errors[kind] <= tolerance

        kind = at(smallest(1, self._dense, reaches, tolerance))
        assert kind is not None
        return kind
