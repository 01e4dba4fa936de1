"""Minimum cuts: the smallest sets of legs that separate a network in two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import Any, TypeVar

T = TypeVar("T")

Structure = tuple[tuple[str, ...], ...]
"""The legs of every factor."""

_CUT = 2


def cut_sizes(
    structure: Structure,
    rows: frozenset[str],
    columns: frozenset[str],
    sizes: Mapping[str, T],
    one: T,
    keep: Callable[[Iterable[T]], tuple[T, ...]],
) -> tuple[T, ...]:
    """The products of leg sizes that separate open legs from others, as far as they are kept.

    Every factor is on one of two sides; a leg is on the side of all its factors, or is cut.
    Variables are eliminated one at a time, those with the fewest neighbors first, so that the time
    grows with the number of legs for trees, rings and stars, where cuts are too many to list.

    Args:
        structure: the legs of every factor.
        rows: open legs on one side.
        columns: open legs on the other. Open legs in neither set are held at one index.
        sizes: the size of every leg; anything that can be multiplied.
        one: the size of the empty product.
        keep: the part of some products that the smallest can come from, whatever they are all
            multiplied with.
    """
    held = {leg for legs in structure for leg in legs if leg[0] in "ion"} - rows - columns
    domain: dict[str, tuple[int, ...]] = {}
    tables: list[_Table[T]] = []
    for leg in sorted({leg for legs in structure for leg in legs} - held):
        domain[leg] = (0, 1, _CUT)
        allowed = (0, _CUT) if leg in rows else (1, _CUT) if leg in columns else (0, 1, _CUT)
        tables.append(((leg,), {(s,): (sizes[leg] if s == _CUT else one,) for s in allowed}))
    for number, legs in enumerate(structure):
        factor = f"factor {number}"
        domain[factor] = (0, 1)
        for leg in sorted({*legs}.intersection(domain)):
            fits = [(side, s) for side in (0, 1) for s in (side, _CUT)]
            tables.append(((factor, leg), dict.fromkeys(fits, (one,))))
    while domain:
        neighbors: dict[str, set[str]] = {name: set() for name in domain}
        for names, _ in tables:
            for name in names:
                neighbors[name].update(names)
        name = min(domain, key=lambda each: len(neighbors[each]))
        touched = [table for table in tables if name in table[0]]
        tables = [table for table in tables if name not in table[0]]
        tables.append(_eliminated(name, touched, domain, one, keep))
        del domain[name]
    return keep(_products([table[()] for _, table in tables], one, keep))


_Table = tuple[tuple[str, ...], dict[tuple[int, ...], tuple[T, ...]]]


def _eliminated(
    name: str,
    tables: list[_Table[T]],
    domain: Mapping[str, tuple[int, ...]],
    one: T,
    keep: Callable[[Iterable[T]], tuple[T, ...]],
) -> _Table[T]:
    """The smallest products of ``tables`` over one variable, as a table over the others."""
    scope = tuple(sorted({each for names, _ in tables for each in names} - {name}))
    found: dict[tuple[int, ...], tuple[T, ...]] = {}
    for values in product(*(domain[each] for each in scope)):
        known = dict(zip(scope, values, strict=True))
        reached: list[T] = []
        for value in domain[name]:
            known[name] = value
            entries = [table.get(tuple(known[each] for each in names)) for names, table in tables]
            if all(entry is not None for entry in entries):
                reached += _products([entry for entry in entries if entry], one, keep)
        if reached:
            found[values] = keep(reached)
    return scope, found


def _products(
    groups: list[tuple[T, ...]], one: T, keep: Callable[[Iterable[T]], tuple[T, ...]]
) -> tuple[T, ...]:
    """All products of one member of every group, as far as they are kept."""
    total: tuple[Any, ...] = (one,)
    for group in groups:
        if group != (one,):
            total = keep(left * right for left in total for right in group)
    return total
