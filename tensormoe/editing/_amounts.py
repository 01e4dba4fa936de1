"""Amounts and factors by experts, as edits of coefficients and of routes take them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, isfinite
from operator import index as as_index
from typing import Any

from tensormoe._validation import brief, is_number
from tensormoe.errors import ShapeError, SpecError


def check_amounts(
    additions: Mapping[int, float], experts: int, *, infinite: bool = False
) -> list[float]:
    """Amounts of all experts, zero for those that are not named.

    Args:
        additions: an amount by the expert's index.
        experts: N.
        infinite: whether ``-inf`` is an amount, of all experts but one at most.

    Raises:
        TypeError: not a mapping.
        ShapeError: an index out of range, or no expert that is left.
        SpecError: an amount that cannot be.
    """
    amounts = [0.0] * experts
    for place, amount in _by_place(additions, "additions", experts):
        if not is_number(amount) or not (isfinite(amount) or (infinite and amount == -inf)):
            rule = "a finite number, or -inf" if infinite else "a finite number"
            raise SpecError(f"an amount must be {rule}; got {amount!r} for expert {place}.")
        amounts[place] += float(amount)
    if all(each == -inf for each in amounts):
        raise ShapeError(
            f"at least one of the {experts} experts must be left; got -inf for all of them. Leave "
            "one out."
        )
    return amounts


def check_factors(factors: Mapping[int, float], experts: int) -> dict[int, float]:
    """A factor for each expert that is named.

    Raises:
        TypeError: not a mapping.
        ShapeError: an index out of range.
        SpecError: a factor that is not a finite number.
    """
    found: dict[int, float] = {}
    for place, factor in _by_place(factors, "factors", experts):
        if not is_number(factor) or not isfinite(factor):
            raise SpecError(f"a factor must be a finite number; got {factor!r} for expert {place}.")
        found[place] = found.get(place, 1.0) * float(factor)
    return found


def check_numbers(indices: int | Iterable[int], experts: int) -> list[int]:
    """Experts by number, each once.

    Raises:
        TypeError: not a number, and not several.
        ShapeError: an index out of range.
    """
    single = _place(indices) is not None
    if not single and not isinstance(indices, Iterable):
        raise TypeError(f"indices must be experts' numbers, or one; got {brief(indices)}.")
    given: Iterable[Any] = [indices] if single else indices  # type: ignore[assignment]
    return list(dict.fromkeys(_checked(each, experts) for each in given))


def _by_place(given: Mapping[int, float], name: str, experts: int) -> list[tuple[int, Any]]:
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{name} must map experts' indices to numbers; got {type(given).__qualname__}."
        )
    return [(_checked(index, experts), value) for index, value in given.items()]


def _checked(index: object, experts: int) -> int:
    place = _place(index)
    if place is None or not 0 <= place < experts:
        raise ShapeError(f"expert index must lie in [0, {experts}); got {brief(index)}.")
    return place


def _place(index: object) -> int | None:
    try:
        return None if isinstance(index, bool) else as_index(index)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        return None
