"""Checks of a class of factorizations, so that its name or the class can stand for its values."""

from __future__ import annotations

from inspect import isabstract, signature
from typing import Any

from tensormoe.errors import SpecError
from tensormoe.factorizations._base import Factorization


def sample(kind: type[Factorization]) -> Factorization:
    """A value of a class before a rank is known: one for every bond, or no rank where it has none.

    Its pattern and its ``with_rank`` are what matters, not its rank.
    """
    return kind(rank=1) if _takes_rank(kind) else kind()  # type: ignore[call-arg]


def checked_class(kind: Any, origin: str = "") -> type[Factorization]:
    """``kind`` if it is a class with a name that can be instantiated; none of its code runs.

    Args:
        kind: a class that somebody else wrote.
        origin: where it comes from, for the message.

    Raises:
        SpecError: something else, and what it lacks.
    """
    if not isinstance(kind, type) or not issubclass(kind, Factorization):
        raise SpecError(
            f"a factorization{origin} must be a subclass of tensormoe.Factorization; got {kind!r}. "
            "Derive the class from it."
        )
    shown = f"factorization {kind.__qualname__}{origin}"
    if isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise SpecError(f"{shown} must define every abstract method; got none for {missing}.")
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise SpecError(
            f"{shown} must have a name that is a Python identifier; got {name!r}. Set "
            'name: ClassVar[str] = "…" in its body.'
        )
    return kind


def check_values(kind: type[Factorization], origin: str = "") -> None:
    """Refuse a class unless values can be made of it by a rank alone.

    This runs when the class is first of use: a decorator sees it before its name is bound, and its
    methods may need that.

    Raises:
        SpecError: they cannot, or do not behave as values.
    """
    shown = f"factorization {kind.__module__}.{kind.__qualname__}{origin}"
    try:
        values = sample(kind), sample(kind)
        pattern = values[0].rank_pattern(1)
        again = values[0].with_rank((1,) * len(pattern))
        bonds, hashes = again.bonds(1), {hash(each) for each in values}
        rank = values[0].rank
    except Exception as error:  # other people's code runs here
        raise SpecError(
            f"{shown} must make values of a rank alone, rank=1 standing for one in every bond; got "
            f"{type(error).__name__}: {error}. Make it a frozen dataclass with a field rank, whose "
            "other fields have defaults, and apply the dataclass first."
        ) from error
    if bool(pattern) != _takes_rank(kind) or (rank is None) != (not pattern):
        raise SpecError(
            f"{shown} must take rank= where its rank_pattern names bonds, and have a rank of None "
            f"where there are none; got the pattern {pattern!r} and the rank {rank!r}. Make it a "
            "frozen dataclass with a field rank, and apply the dataclass first."
        )
    if values[0] != values[1] or len(hashes) != 1:
        raise SpecError(
            f"{shown} must have values that are equal and hash alike where their ranks are equal; "
            "got two that differ. Make it a frozen dataclass."
        )
    if type(again) is not kind or tuple(bonds) != (1,) * len(pattern):
        raise SpecError(
            f"{shown} must keep its class and the bonds in with_rank, one for each of {pattern!r}; "
            f"got {again!r} with bonds {bonds!r}. Return a value of the class, and apply the "
            "dataclass first."
        )


def _takes_rank(kind: type[Factorization]) -> bool:
    return "rank" in signature(kind).parameters
