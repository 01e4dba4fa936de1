"""The factorization that is recommended, with the reason in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tensormoe.choosing._rows import Row
from tensormoe.factorizations import Dense

_ENOUGH = 0.5
"""Share of the highest expert rank below which no row is recommended for its capacity.

The product of two figures is as high where one of them has collapsed: a factorization whose span
grows with every level of experts would win with experts of a rank that is of no use.
"""


@dataclass(frozen=True)
class Best:
    """A recommendation.

    Args:
        name: of the factorization.
        reason: why, with the figures.
        others: the factorization that each objective recommends; of a budget that is not of
            parameters alone, or where others were not asked for, only that of the objective.
    """

    name: str
    reason: str
    others: dict[str, str]


def best(rows: Mapping[str, Sequence[Row]], objective: str) -> Best | None:
    """The row that an objective recommends; None where nothing fits the budget.

    Args:
        rows: of every factorization, by the objective that their ranks were chosen by.
        objective: one of them.
    """
    fitting = {name: [row for row in found if row.error is None] for name, found in rows.items()}
    if not fitting[objective]:
        return None
    chosen = {name: _highest(found, name) for name, found in fitting.items() if found}
    row = chosen[objective]
    names = {name: each.name for name, each in chosen.items()}
    return Best(row.name, _reason(row, fitting[objective], objective), names)


def _reason(row: Row, rows: Sequence[Row], objective: str) -> str:
    rank, span = _figures(row)
    limit = max(_figures(each)[0] for each in _differing(rows))
    reasons = {
        "capacity": f"the highest expert rank × expert span, {rank:,} × {span:,}, of the layers "
        f"with at least half of the highest expert rank ({limit:,})",
        "expert_rank": f"the highest expert rank, {rank:,}, so that single experts are as rich as "
        "the budget allows",
        "expert_span": f"the highest expert span, {span:,}, so that experts differ as much as the "
        "budget allows",
    }
    alike = [each.name for each in rows if _figures(each) == (rank, span) and each is not row]
    if not alike:
        return reasons[objective]
    cheapest = (
        "experts in full, which no factorization restricts, fit the budget"
        if row.name == Dense.name
        else "it takes the least time"
    )
    return f"{reasons[objective]}; of those alike ({', '.join(alike)}), {cheapest}"


def _figures(row: Row) -> tuple[int, int]:
    return row.expert_rank or 0, row.expert_span or 0


def _differing(rows: Sequence[Row]) -> Sequence[Row]:
    """Rows whose experts are no multiples of one another, where there are any."""
    return [row for row in rows if _figures(row)[1] > 1] or rows


def _highest(rows: Sequence[Row], objective: str) -> Row:
    if objective == "expert_rank":
        return max(rows, key=lambda row: (*_figures(row), *_cheap(row)))
    if objective == "expert_span":
        return max(rows, key=lambda row: (*_figures(row)[::-1], *_cheap(row)))
    rows = _differing(rows)
    least = _ENOUGH * max(_figures(row)[0] for row in rows)
    kept = [row for row in rows if _figures(row)[0] >= least]
    return max(
        kept,
        key=lambda row: (_figures(row)[0] * _figures(row)[1], _figures(row)[0], *_cheap(row)),
    )


def _cheap(row: Row) -> tuple[bool, float]:
    """Of rows with the same figures, experts in full win, and then what takes the least time."""
    return row.name == Dense.name, -(row.time or 0.0)
