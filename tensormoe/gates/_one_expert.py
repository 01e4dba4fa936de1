"""Coefficients of rows that belong to one expert each."""

from __future__ import annotations

from dataclasses import dataclass

from tensormoe.backend import Array


@dataclass(frozen=True, eq=False)
class OneExpert:
    """One expert per row, with coefficient 1, for one level: rows that a router has sent.

    Attributes:
        indices: (...) the number of each row's expert.
        counts: (N,) how many rows each expert has, where rows are sorted by expert: a layer then
            may run each expert once, on all of its rows. None where they are in any order. With
            one more entry (N + 1,), as many rows at the end are of no expert: they cost little
            and give anything finite, as their weights must be zero.
    """

    indices: Array
    counts: Array | None = None
