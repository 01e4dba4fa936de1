"""Choice of the rank: given, the best within a budget, or the smallest within a tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

from tensormoe._spec import LayerSpec
from tensormoe._validation import is_number
from tensormoe.errors import BudgetError, RankError, SpecError
from tensormoe.factorizations import (
    Factorization,
    expert_leg,
    rank_pattern,
    resolve_factorization,
)
from tensormoe.selection import Budget, excess, rank_front, select_rank

# ranks of a front that are tried; more lie between them
_MOST = 4
# ranks that are tried besides
_GRID = 16
# the search for the smallest budget ends at this share of it
_STEP = 0.03

Sizes = tuple[int, int, tuple[int, ...]]


def checked_tolerance(tolerance: float) -> float:
    """``tolerance`` if it is an error that can be asked for.

    Raises:
        SpecError: not a number in (0, 1).
    """
    if not is_number(tolerance) or not 0 < tolerance < 1:
        raise SpecError(
            f"tolerance must be a relative error in (0, 1); got {tolerance!r}. Give for example "
            "0.1 for weights that are off by a tenth."
        )
    return float(tolerance)


def candidates(
    kind: str | type[Factorization], sizes: Sizes, budget: Budget | int, bias: bool
) -> list[Factorization]:
    """Factorizations within a budget that may be the best one, a few of the front.

    Raises:
        BudgetError: nothing fits.
    """
    in_features, out_features, experts = sizes
    # only weights are decomposed: the model already has a gate
    options: dict[str, Any] = {"budget": budget, "bias": bias, "gate": None}
    if not rank_pattern(kind, len(experts)):
        select_rank(kind, in_features, out_features, experts, **options)
        return [resolve_factorization(kind, None)]
    best = select_rank(kind, in_features, out_features, experts, **options)
    front = rank_front(kind, in_features, out_features, experts, **options)
    ranks = [each.rank for each in front]
    step = max(1, -(-len(ranks) // _MOST))
    picked = dict.fromkeys([best, *ranks[step // 2 :: step]])
    for bonds in _grid(resolve_factorization(kind, best), experts, out_features):
        try:
            rank = select_rank(kind, in_features, out_features, experts, bonds=bonds, **options)
        except BudgetError:
            continue
        picked[rank] = None
    values = (resolve_factorization(kind, rank) for rank in picked)
    return list(dict.fromkeys(_needed(value, sizes, options) for value in values))


def _needed(kind: Factorization, sizes: Sizes, options: Mapping[str, Any]) -> Factorization:
    """The same without bonds that are larger than can be needed, and the budget spent on others.

    Rank selection keeps bonds equally large, so that one can exceed the mode that it leads to.
    """
    in_features, out_features, experts = sizes
    fixed: dict[str, int] = {}
    while most := excess(LayerSpec(in_features, out_features, experts, kind, options["bias"])):
        legs = kind.bond_sizes(experts, out_features)
        fixed = {leg: legs[leg] for leg in _near(kind, experts, out_features)} | fixed | most
        bonds = tuple(fixed.get(leg, leg) for leg in legs)
        rank = select_rank(type(kind), in_features, out_features, experts, bonds=bonds, **options)
        kind = resolve_factorization(type(kind), rank)
    return kind


def _near(kind: Factorization, experts: tuple[int, ...], out_features: int) -> list[str]:
    """Bonds of expert factors."""
    modes = {expert_leg(level) for level in range(len(experts))}
    factors = [each for each in kind.factors(len(experts)) if set(each.legs) & modes]
    legs = kind.bond_sizes(experts, out_features)
    return [leg for leg in legs if any(leg in each.legs for each in factors)]


def _grid(
    kind: Factorization, experts: tuple[int, ...], out_features: int
) -> Iterator[tuple[int | str, ...]]:
    """Sizes of the bonds of expert factors, each for itself: experts and shapes are seldom even.

    The other bonds are left to the budget, and so is the last one where all are of experts, as in a
    shared basis.
    """
    legs = list(kind.bond_sizes(experts, out_features))
    near = _near(kind, experts, out_features)
    near = near[:-1] if near == legs else near
    if not near or len(legs) - len(near) > 2:
        return
    sizes = [2**power for power in range(max(experts).bit_length() + 1) if 2**power <= max(experts)]
    sizes = sizes if sizes[-1] == max(experts) else [*sizes, max(experts)]
    combinations = list(product(sizes, repeat=len(near)))
    step = max(1, len(combinations) // _GRID)
    for chosen in combinations[step // 2 :: step]:
        fixed = dict(zip(near, chosen, strict=True))
        yield tuple(fixed.get(leg, leg) for leg in legs)


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
