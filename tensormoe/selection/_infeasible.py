"""The error for an infeasible budget: the smallest feasible one, and remedies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isqrt, prod

from tensormoe._format import format_experts
from tensormoe.errors import Alternative, BudgetError
from tensormoe.gates import Gate
from tensormoe.planning._cost import Cost
from tensormoe.selection._budget import Budget
from tensormoe.selection._family import Family
from tensormoe.selection._spending import spending_of_layer

# levels that a remedy has at most, and numbers that are tried as divisors
_MOST_LEVELS, _MOST_TRIED = 3, 10_000


def infeasible(
    family: Family, budget: Budget, gate: Gate | None, indexed_input: bool = False
) -> BudgetError:
    """The error for a layer that exceeds a budget at every rank.

    Args:
        family: the layers, of which the one with bonds of 1 is the smallest.
        budget: upper limits.
        gate: what counts against them, if anything.
        indexed_input: whether inputs are integer ids.
    """

    def smallest(layers: Family, counted: Gate | None) -> Cost:
        return spending_of_layer(budget, counted, indexed_input).of(layers.spec((1, 1)))

    given = family.sizes
    return refusal(
        f"{family.name}, {format_experts(given.experts)} experts of {given.in_features} → "
        f"{given.out_features}",
        budget,
        smallest(family, gate),
        smallest(family, None) if gate is not None else None,
        levels_of(given.experts) if family.by_pattern else (),
        lambda experts: smallest(family.with_experts(experts), gate),
    )


def refusal(
    what: str,
    budget: Budget,
    least: Cost,
    without_gate: Cost | None,
    levels: Iterable[tuple[int, ...]],
    split: Callable[[tuple[int, ...]], Cost],
) -> BudgetError:
    """The error for something that does not fit, with whatever remedies there are.

    Args:
        what: does not fit.
        budget: upper limits.
        least: the cost of the smallest.
        without_gate: the same without its gate, if there is one.
        levels: as many experts in more levels.
        split: the cost of the smallest with experts in other levels.
    """
    limits, needed = budget.limits, budget.exceeded(least)
    remedies = ["Raise the budget"]
    alternatives = []
    found = _best_split(budget, needed, levels, split)
    if found is not None:
        experts, taken = found
        alternatives.append(Alternative({"experts": experts}, dict(taken)))
        # several levels are never one, and one stands for itself
        remedies.append(
            f"split the experts into levels, experts={experts} instead of {prod(experts)} takes "
            f"{' and '.join(_amount(*each) for each in taken.items())}"
        )
    if without_gate is not None and budget.allows(without_gate):
        remedies.append("leave the gate out, Budget(…, gate=False)")
        spent = budget.spent(without_gate)
        taken = {name: spent[name] for name in needed}
        alternatives.append(Alternative({"gate": False}, taken))
    if len(remedies) == 1:
        remedies.append("use fewer experts")
        remedies.append("choose another factorization")
    rules = " and ".join(f"{name} must be at least {value}" for name, value in needed.items())
    gate = "" if without_gate is None else " with a gate"
    return BudgetError(
        f"{rules} for {what}{gate}; got {', '.join(str(limits[name]) for name in needed)}. "
        f"{'; or '.join(remedies)}.",
        needed,
        {name: limits[name] for name in needed},
        alternatives,
    )


def _best_split(
    budget: Budget,
    needed: Mapping[str, float],
    levels: Iterable[tuple[int, ...]],
    split: Callable[[tuple[int, ...]], Cost],
) -> tuple[tuple[int, ...], Mapping[str, float]] | None:
    """The fewest levels that fit, or else those that need the least, if that is less at all."""
    found, least = None, needed
    for experts in levels:
        cost = split(experts)
        taken = {name: value for name, value in budget.spent(cost).items() if name in needed}
        if all(taken[name] < least[name] for name in needed):
            found, least = (experts, taken), taken
        if budget.allows(cost):
            break
    return found


def levels_of(experts: Sequence[int]) -> Iterable[tuple[int, ...]]:
    """As many experts in more levels, of sizes as equal as possible.

    >>> list(levels_of((512,)))
    [(16, 32), (8, 8, 8)]
    >>> list(levels_of((13,)))
    []
    """
    for count in range(len(experts) + 1, _MOST_LEVELS + 1):
        sizes = _split(prod(experts), count)
        if sizes[0] == 1:
            return
        yield sizes


def _split(number: int, count: int) -> tuple[int, ...]:
    """Factors of a number, as many as ``count``, in ascending order and as equal as possible."""
    if count == 1:
        return (number,)
    root = isqrt(number) if count == 2 else int(number ** (1 / count) + 1e-9)
    least = max(1, root - _MOST_TRIED)
    first = next((each for each in range(root, least, -1) if number % each == 0), 1)
    return tuple(sorted((first, *_split(number // first, count - 1))))


def _amount(name: str, value: float) -> str:
    return str(value) if name == "parameters" else f"{value} of {name}"
