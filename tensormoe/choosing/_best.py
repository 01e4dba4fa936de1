"""The factorization that is recommended, with the reason in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensormoe.choosing._rows import Row

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
        others: the factorization that each objective recommends.
    """

    name: str
    reason: str
    others: dict[str, str]


def best(rows: Sequence[Row], objective: str) -> Best | None:
    """The row that an objective recommends; None where nothing fits the budget."""
    fitting = [row for row in rows if row.error is None]
    if not fitting:
        return None
    chosen = {name: _highest(fitting, name) for name in ("capacity", "expert_rank", "expert_span")}
    row = chosen[objective]
    rank, span = _figures(row)
    limit = max(_figures(each)[0] for each in fitting)
    reasons = {
        "capacity": f"the highest expert rank × expert span, {rank:,} × {span:,}, of the layers "
        f"with at least half of the highest expert rank ({limit:,})",
        "expert_rank": f"the highest expert rank, {rank:,}, so that single experts are as rich as "
        "the budget allows",
        "expert_span": f"the highest expert span, {span:,}, so that experts differ as much as the "
        "budget allows",
    }
    names = {name: each.name for name, each in chosen.items()}
    return Best(row.name, reasons[objective], names)


def _figures(row: Row) -> tuple[int, int]:
    return row.expert_rank or 0, row.expert_span or 0


def _highest(rows: Sequence[Row], objective: str) -> Row:
    if objective == "expert_rank":
        return max(rows, key=_figures)
    if objective == "expert_span":
        return max(rows, key=lambda row: _figures(row)[::-1])
    least = _ENOUGH * max(_figures(row)[0] for row in rows)
    kept = [row for row in rows if _figures(row)[0] >= least]
    return max(kept, key=lambda row: (_figures(row)[0] * _figures(row)[1], _figures(row)[0]))
