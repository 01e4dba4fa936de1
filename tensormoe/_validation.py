"""Checks shared by the public doors; each says the rule, the value and its position."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from operator import index
from typing import Any

from tensormoe.errors import SpecError, TensormoeError

# of levels and bonds; an endless generator is cut off
_MOST = 64
# what array libraries index with
_LARGEST = 2**63 - 1


def positive_int(value: Any, name: str, error: type[TensormoeError] = SpecError) -> int:
    """``value`` as an ``int`` of at least 1; booleans and floats are not integers."""
    number = _integer(value)
    if number is None or number < 1:
        raise error(f"{name} must be a positive integer; got {brief(value)}.")
    if number > _LARGEST:
        raise error(f"{name} must be below 2**63; got {brief(value)}.")
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
        number = _integer(value)
        if number is None or not 1 <= number <= _LARGEST:
            rule = "below 2**63" if number is not None and number > 0 else "positive integers"
            raise error(
                f"{name} must be {rule}; got {brief(value)} for {unit} {place}. "
                f"Give one size per {unit}."
            )
        checked.append(number)
    if not checked:
        raise error(f"{name} must hold at least one positive integer; got {brief(values)}.")
    return tuple(checked)


def non_negative_int(value: Any, name: str, error: type[TensormoeError] = SpecError) -> int:
    """``value`` as an ``int`` of at least 0; booleans and floats are not integers."""
    number = _integer(value)
    if number is None or number < 0:
        raise error(f"{name} must be a non-negative integer; got {brief(value)}.")
    return number


def _integer(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None


def is_number(value: object) -> bool:
    """Whether a value is one of Python's real numbers; a boolean is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def choice(value: Any, options: Iterable[str], name: str, error: type[TensormoeError]) -> str:
    """``value`` if it is one of ``options``."""
    listed = tuple(options)
    if not isinstance(value, str) or value not in listed:
        quoted = ", ".join(repr(option) for option in listed)
        raise error(f"{name} must be one of {quoted}; got {brief(value)}.")
    return value


def flag(value: Any, name: str, error: type[TensormoeError] = SpecError) -> bool:
    """``value`` if it is True or False: an array in its place has no truth."""
    if not isinstance(value, bool):
        raise error(f"{name} must be True or False; got {brief(value)}.")
    return value


def instance(
    value: Any, kinds: type | tuple[type, ...], name: str, what: str, error: type[TensormoeError]
) -> None:
    """Refuse what is not of one of the classes, which ``what`` describes."""
    if not isinstance(value, kinds):
        raise error(f"{name} must be {what}; got {brief(value)}, a {type(value).__qualname__}.")


def brief(value: Any) -> str:
    """``repr`` of a value that may be huge or nested without end."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 80
    try:
        return shortener.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return f"an {type(value).__name__} too long to print"
