"""A layer in figures: what tables show and ``--json`` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensormoe._format import (
    format_bytes,
    format_count,
    format_parameters,
    format_rank,
    format_time,
    plain_rank,
)
from tensormoe.planning import Cost, Roofline

COLUMNS = (
    "layer",
    "rank",
    "parameters",
    "FLOPs",
    "memory",
    "time",
    "expert\nrank",
    "expert\nspan",
)


@dataclass(frozen=True)
class Figures:
    """One row.

    Args:
        name: of the factorization or the layer.
        rank: as ``--rank`` takes it; None where there is none.
        cost: of a forward call.
        time: predicted seconds.
        expert_rank: rank of one expert's matrix; None for layers without experts.
        expert_span: dimension of the space that the experts span.
    """

    name: str
    rank: int | tuple[int, ...] | None
    cost: Cost
    time: float
    expert_rank: int | None
    expert_span: int | None

    @classmethod
    def of(
        cls,
        name: str,
        cost: Cost,
        roofline: Roofline,
        *,
        rank: int | tuple[int, ...] | None = None,
        expert_rank: int | None = None,
        expert_span: int | None = None,
    ) -> Figures:
        """A row whose time is predicted for a device."""
        return cls(name, rank, cost, roofline.time(cost), expert_rank, expert_span)

    def cells(self) -> tuple[str, ...]:
        """One text for each of ``COLUMNS``."""
        return (
            self.name,
            format_rank(self.rank),
            format_parameters(self.cost.parameters),
            format_count(self.cost.flops),
            format_bytes(self.cost.peak_memory),
            format_time(self.time),
            "–" if self.expert_rank is None else f"{self.expert_rank:,}",
            "–" if self.expert_span is None else f"{self.expert_span:,}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values: counts, bytes and seconds."""
        return {
            "rank": plain_rank(self.rank),
            **cost_dict(self.cost),
            "time": self.time,
            "expert_rank": self.expert_rank,
            "expert_span": self.expert_span,
        }


def cost_dict(cost: Cost) -> dict[str, int]:
    """A cost in plain values."""
    return {
        "parameters": cost.parameters,
        "flops": cost.flops,
        "matmul_flops": cost.matmul_flops,
        "memory": cost.peak_memory,
        "bytes_moved": cost.bytes_read + cost.bytes_written,
    }
