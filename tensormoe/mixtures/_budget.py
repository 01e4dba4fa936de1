"""Budgets of mixtures: what experts get of a number of parameters, and what else counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import TypeVar

from tensormoe._validation import brief
from tensormoe.errors import BudgetError, RankError
from tensormoe.factorizations import Factorization, FactorizationLike, resolve_factorization
from tensormoe.selection import Budget, select_block, select_rank

T = TypeVar("T")

Pair = tuple[FactorizationLike, FactorizationLike]


def within_budget(
    budget: Budget | int,
    pair: Pair,
    rank: int | tuple[int, ...] | None,
    sizes: tuple[int, int | None, int],
    experts: int | tuple[int, ...],
    *,
    gated: bool = False,
    bias: bool = False,
    router: int = 0,
    others: int = 0,
) -> tuple[Factorization, Factorization]:
    """Factorizations of the experts' layers with the ranks that a budget buys.

    Args:
        budget: parameters of all that is built; ``Budget(…, gate=False)`` leaves the router out.
        pair: a name or class for each layer; the last one alone for experts of one layer.
        rank: None, as the budget chooses it.
        sizes: in, hidden and out; no hidden size for experts of one layer.
        experts: N, or one size per level.
        gated: whether the first layer makes two halves.
        bias: whether experts have biases.
        router: parameters of the router.
        others: parameters of what is built besides experts and router.

    Raises:
        BudgetError: not a number of parameters, or too few; says how many are needed.
        RankError: a rank besides.

    >>> within_budget(10_000, ("cp", "cp"), None, (32, 64, 32), 8, gated=True, router=256)
    (CP(rank=38), CP(rank=32))
    """
    limit, counts_router = parameters_of(budget)
    named: list[str | type[Factorization]] = []
    for each in pair:
        if rank is not None or isinstance(each, Factorization):
            given = repr(each) if rank is None else f"rank={rank!r}"
            raise RankError(
                f"rank and budget exclude one another; got {given} and budget={budget!r}. Drop one."
            )
        named.append(each)
    besides = others + (router if counts_router else 0)
    within = Budget(parameters=max(1, limit - besides))
    rows, hidden, columns = sizes
    try:
        if hidden is not None:
            first, second = select_block(
                (named[0], named[1]),
                rows,
                hidden,
                columns,
                experts,
                budget=within,
                bias=bias,
                gate=None,
                gated=gated,
            )
            return first.factorization, second.factorization
        last = named[1]
        found = select_rank(last, rows, columns, experts, budget=within, bias=bias, gate=None)
    except BudgetError as error:
        raise _refused(error, limit, besides, router if counts_router else 0) from None
    one = resolve_factorization(last, found)
    return one, one


def shared_out(
    budget: Budget | int,
    sizes: Sequence[int],
    build: Callable[[int, int], T],
    router: int,
) -> tuple[T, ...]:
    """Groups of experts that share a budget in proportion to their sizes.

    Args:
        budget: as for :func:`within_budget`.
        sizes: parameters of each group with dense experts.
        build: a group, by its place, within a number of parameters.
        router: parameters of all routers.

    Raises:
        BudgetError: not a number of parameters, or too few; says how many are needed.
    """
    limit, counts_router = parameters_of(budget)
    besides = router if counts_router else 0
    total, groups, needed = sum(sizes), [], 0
    for place, size in enumerate(sizes):
        try:
            groups.append(build(place, max(1, (limit - besides) * size // total)))
        except BudgetError as error:
            if "parameters" not in error.needed:
                raise
            needed = max(needed, ceil(int(error.needed["parameters"]) * total / size))
    if needed:
        needed += besides
        raise BudgetError(
            f"parameters must be at least {needed} for this mixture, of which {besides} are the "
            f"router's; got {limit}. Raise the budget; or use fewer experts; or choose another "
            "factorization.",
            {"parameters": needed},
            {"parameters": limit},
        )
    return tuple(groups)


def parameters_of(budget: Budget | int) -> tuple[int, bool]:
    """A number of parameters, and whether it covers the router."""
    remedy = "Write a number, or Budget(parameters=…, gate=False) to leave the router out."
    if not isinstance(budget, Budget):
        if isinstance(budget, bool) or not hasattr(budget, "__index__"):
            raise BudgetError(
                "budget of a mixture must be a number of parameters, as it takes the place of no "
                f"one linear layer; got {brief(budget)}. {remedy}"
            )
        budget = Budget(parameters=budget)
    if not budget.counts_parameters_alone or budget.parameters is None:
        raise BudgetError(
            f"budget of a mixture must limit parameters alone; got {budget!r}. {remedy}"
        )
    return budget.parameters, budget.gate


def _refused(error: BudgetError, limit: int, besides: int, router: int) -> BudgetError:
    if not error.needed:
        return error
    needed = int(error.needed["parameters"]) + besides
    remedies = ["Raise the budget", "use fewer experts", "choose another factorization"]
    if router and needed - router <= limit:
        remedies.insert(1, "leave the router out, Budget(…, gate=False)")
    return BudgetError(
        f"parameters must be at least {needed} for this mixture, of which {besides} are not its "
        f"experts'; got {limit}. {'; or '.join(remedies)}.",
        {"parameters": needed},
        {"parameters": limit},
    )
