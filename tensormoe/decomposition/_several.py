"""Several factorizations, of which the one that loses the least is to be found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from tensormoe._spec import LayerSpec
from tensormoe.decomposition._choose import Sizes
from tensormoe.decomposition._contractions import structures
from tensormoe.decomposition._moments import Moments
from tensormoe.decomposition._spectral import cuts
from tensormoe.decomposition._weighted import check_metric
from tensormoe.errors import BudgetError, SpecError
from tensormoe.factorizations import (
    FACTORIZATIONS,
    INPUT,
    OUTPUT,
    Factorization,
    FactorizationLike,
    factorization_class,
    resolve_factorization,
)
from tensormoe.selection import Budget, select_rank

AUTO = "auto"
"""Stands for every factorization that is registered and can have fewer entries than the weights."""

Choice: TypeAlias = FactorizationLike | Sequence[str | type[Factorization]]
"""A factorization, ``"auto"``, or several names of which the best is taken."""


@dataclass(frozen=True, eq=False)
class Several:
    """Factorizations to choose from.

    Args:
        names: of them, each without a rank.
        auto: whether all are meant: of a large tensor, then, those that need no search.
        metric: that errors are measured in, which not all networks can be turned by.
        tried: filled with the error that every one of them came to.
    """

    names: tuple[str | type[Factorization], ...]
    auto: bool
    metric: Moments | None = None
    tried: dict[Factorization, float] = field(default_factory=dict)

    def within(
        self, sizes: Sizes, budget: Budget | int, bias: bool, large: bool
    ) -> Iterator[str | type[Factorization]]:
        """Those that a budget and the metric leave.

        Raises:
            BudgetError: none is left; the message is that of the first.
            SpecError: the same, for the metric's sake.
        """
        reason: BudgetError | SpecError | None = None
        left = 0
        for name in self.names:
            try:
                if self.metric is not None:
                    check_metric(name, sizes, self.metric)
                rank = select_rank(name, *sizes, budget=budget, bias=bias, gate=None)
            except (BudgetError, SpecError) as error:
                reason = reason or error
                continue
            if self.auto and large and not _closed(name, rank, sizes):
                continue
            left += 1
            yield name
        if not left and reason is not None:
            raise reason


def several(choice: Choice, metric: Moments | None) -> Several | None:
    """The factorizations of a choice, if it is one.

    Raises:
        SpecError: no factorization, or one that is not a name or a class.
    """
    if choice == AUTO:
        return Several(tuple(name for name in FACTORIZATIONS if name != "dense"), True, metric)
    if not isinstance(choice, tuple | list):
        return None
    if not choice:
        raise SpecError("factorizations to choose from must be at least one; got none.")
    for name in choice:
        if isinstance(name, Factorization):
            raise SpecError(
                f"factorizations to choose from must be names or classes; got {name!r}, which has "
                "its rank. Give its name, and a budget."
            )
        factorization_class(name)
    return Several(tuple(choice), False, metric)


def _closed(
    name: str | type[Factorization], rank: int | tuple[int, ...] | None, sizes: Sizes
) -> bool:
    """Whether the best factors are known from singular values, without a search."""
    network = LayerSpec(*sizes, resolve_factorization(name, rank), bias=False).network
    open_legs = (*network.expert_legs, INPUT, OUTPUT)
    terms = structures(network, open_legs, dict(network.sizes))
    found = cuts(terms[0]) if len(terms) == 1 else None
    return found is not None and found.exact
