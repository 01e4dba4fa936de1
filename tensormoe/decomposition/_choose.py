"""Which rank: given, the best within a budget, or the smallest within a tolerance."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

from tensormoe.errors import RankError, SpecError
from tensormoe.factorizations import Factorization, resolve_factorization
from tensormoe.planning import Budget, rank_front, select_rank

__all__ = ["Sizes", "candidates", "checked_tolerance", "smallest"]

# ranks within a budget that are tried; more lie between them
_MOST = 5
# the search for the smallest budget ends at this share of it
_STEP = 0.03

Sizes = tuple[int, int, tuple[int, ...]]


def checked_tolerance(tolerance: float) -> float:
    """``tolerance`` if it is an error that can be asked for.

    Raises:
        SpecError: not a number in (0, 1).
    """
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if not number or not isfinite(tolerance) or not 0 < tolerance < 1:
        raise SpecError(
            f"tolerance must be a relative error in (0, 1); got {tolerance!r}. Give for example "
            "0.1 for weights that are off by a tenth."
        )
    return float(tolerance)


def candidates(name: str, sizes: Sizes, budget: Budget | int, bias: bool) -> list[Factorization]:
    """Factorizations within a budget that may be the best one, a few of the front.

    Raises:
        BudgetError: nothing fits.
    """
    in_features, out_features, experts = sizes
    if name in ("hadamard", "dense"):
        select_rank(name, in_features, out_features, experts, budget=budget, bias=bias)
        return [resolve_factorization(name, None)]
    front = rank_front(name, in_features, out_features, experts, budget=budget, bias=bias)
    best = select_rank(name, in_features, out_features, experts, budget=budget, bias=bias)
    found = {each.rank: each.factorization for each in front}
    ranks = list(found)
    step = max(1, -(-len(ranks) // _MOST))
    picked = dict.fromkeys([best, *ranks[step // 2 :: step]])
    return [resolve_factorization(name, rank) for rank in picked]


def smallest(low: int, high: int, reaches: Callable[[int], bool], tolerance: float) -> int:
    """The smallest budget in [low, high] that reaches a tolerance, within a few percent.

    Raises:
        RankError: not even ``high`` does.
    """
    if not reaches(high):
        raise RankError(
            f"no rank reaches a tolerance of {tolerance} with fewer parameters than the weights "
            "themselves. Raise the tolerance, or choose another factorization."
        )
    while high - low > max(1, _STEP * high):
        middle = (low * high) ** 0.5 if low else high / 2
        place = min(max(int(middle), low + 1), high - 1)
        if reaches(place):
            high = place
        else:
            low = place
    return high
