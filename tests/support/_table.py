"""Tables of what was proved: a cell is a tick where a test of just that passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"

COMMAND = "python -m tests.support"

Probe = Callable[[], None]
"""A test of one cell: raises where something is not as it should be."""


@dataclass(frozen=True)
class Missing:
    """What a backend does not have, and why, or what takes its place."""

    reason: str


@dataclass(frozen=True)
class Row:
    """What users ask about, in Markdown, with a cell for each column."""

    name: str
    cells: tuple[Probe | Missing, ...]


@dataclass(frozen=True)
class Table:
    """Rows under one heading.

    Args:
        title: the heading.
        text: what a tick means.
        corner: what the rows are.
        columns: names of the backends.
        rows: in order.
    """

    title: str
    text: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def probes(self) -> Iterator[tuple[str, Probe]]:
        """Every test by a name that says which cell it is."""
        for row in self.rows:
            for column, cell in zip(self.columns, row.cells, strict=True):
                if not isinstance(cell, Missing):
                    yield f"{self.title}: {row.name}: {column}".replace("`", ""), cell


def render(head: str, tables: Sequence[Table]) -> str:
    """The page, in which every probe is a tick."""
    reasons: dict[str, int] = {}
    parts = [head]
    for table in tables:
        parts += [f"\n## {table.title}\n\n{table.text}\n"]
        lines = [
            [table.corner, *table.columns],
            ["---", *(":---:" for _ in table.columns)],
            *([row.name, *(_cell(each, reasons) for each in row.cells)] for row in table.rows),
        ]
        parts += ["\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"]
    notes = [f"[^{number}]: {reason}\n" for reason, number in reasons.items()]
    return "\n".join([*parts, *notes])


def _cell(cell: Probe | Missing, reasons: dict[str, int]) -> str:
    if not isinstance(cell, Missing):
        return "✓"
    return f"–[^{reasons.setdefault(cell.reason, len(reasons) + 1)}]"
