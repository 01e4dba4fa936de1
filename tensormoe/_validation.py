"""Checks shared by the public doors; each says the rule, the value and its position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from itertools import islice
from operator import index
from typing import Any

from tensormoe.errors import SpecError, TensormoeError

__all__ = ["choice", "non_negative_int", "positive_int", "positive_ints"]

# of levels and bonds; no generator goes on for ever
_MOST = 64


def positive_int(value: Any, name: str, error: type[TensormoeError] = SpecError) -> int:
    """``value`` as an ``int`` of at least 1; booleans and floats are not integers."""
    number = _integer(value)
    if number is None or number < 1:
        raise error(f"{name} must be a positive integer; got {value!r}.")
    return number


def positive_ints(
    values: Any, name: str, unit: str, error: type[TensormoeError] = SpecError
) -> tuple[int, ...]:
    """``values`` (an integer or ordered integers) as a tuple; ``unit`` names a position."""
    ordered = not isinstance(values, str | bytes | Set | Mapping)
    try:
        listed = [*islice(values, _MOST + 1)] if ordered else [values]
    except TypeError:
        # no iterable, or an array without axes, which only looks like one
        listed = [values]
    if len(listed) > _MOST:
        raise error(f"{name} must be at most {_MOST} integers; got more. Give one size per {unit}.")
    checked = []
    for place, value in enumerate(listed):
        try:
            checked.append(positive_int(value, name, error))
        except error:
            raise error(
                f"{name} must be positive integers; got {value!r} for {unit} {place}. "
                f"Give one size per {unit}."
            ) from None
    if not checked:
        raise error(f"{name} must hold at least one positive integer; got {values!r}.")
    return tuple(checked)


def non_negative_int(value: Any, name: str, error: type[TensormoeError] = SpecError) -> int:
    """``value`` as an ``int`` of at least 0; booleans and floats are not integers."""
    number = _integer(value)
    if number is None or number < 0:
        raise error(f"{name} must be a non-negative integer; got {value!r}.")
    return number


def _integer(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None


def choice(value: Any, options: Iterable[str], name: str, error: type[TensormoeError]) -> str:
    """``value`` if it is one of ``options``."""
    listed = tuple(options)
    if not isinstance(value, str) or value not in listed:
        quoted = ", ".join(repr(option) for option in listed)
        raise error(f"{name} must be one of {quoted}; got {value!r}.")
    return value
