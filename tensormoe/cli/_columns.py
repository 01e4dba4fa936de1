"""Columns of rows in plain values: as a table, as CSV, as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensormoe._format import (
    format_bytes,
    format_count,
    format_parameters,
    format_rank,
    format_time,
)

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """One figure of every row.

    Args:
        key: of the figure in a row.
        head: for people; may have two lines.
        show: the figure for people.
        unit: in the header of CSV, where figures are plain.
    """

    key: str
    head: str
    show: Callable[[Any], str] = str
    unit: str = ""

    def cell(self, row: Mapping[str, Any]) -> str:
        """The figure of a row for people."""
        value = row.get(self.key)
        return NOTHING if value is None else self.show(value)

    @property
    def name(self) -> str:
        """The head in one line, with the unit."""
        head = " ".join(self.head.split())
        return f"{head} [{self.unit}]" if self.unit else head


def format_ranks(ranks: Sequence[Any]) -> str:
    """Ranks of one layer or of both, as ``--rank`` takes them.

    >>> format_ranks([[4, 4, 97]]), format_ranks([681, 613]), format_ranks([None])
    ('4,4,97', '681 / 613', '–')
    """
    shown = [format_rank(tuple(each) if isinstance(each, list) else each) for each in ranks]
    return " / ".join(dict.fromkeys(shown)) or NOTHING


def format_whole(value: int) -> str:
    """A whole number.

    >>> format_whole(1024)
    '1,024'
    """
    return f"{value:,}"


LAYER_COLUMNS = (
    Column("name", "layer"),
    Column("ranks", "rank", format_ranks),
    Column("parameters", "parameters", format_parameters),
    Column("flops", "FLOPs", format_count),
    Column("memory", "memory", format_bytes, "B"),
    Column("time", "time", format_time, "s"),
    Column("expert_rank", "expert\nrank", format_whole),
    Column("expert_span", "expert\nspan", format_whole),
)
"""Figures of a layer, as :func:`tensormoe.choosing.explore` names them."""


def csv_text(columns: Sequence[Column], rows: Iterable[Mapping[str, Any]]) -> str:
    r"""Rows as CSV: a header with units, and plain numbers.

    >>> csv_text([Column("time", "time", unit="s"), Column("ranks", "rank")],
    ...          [{"time": 0.5, "ranks": [[4, 97]]}, {"ranks": None}])
    'time [s],rank\n0.5,"4,97"\n,\n'
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.name for column in columns)
    writer.writerows([_plain(row.get(column.key)) for column in columns] for row in rows)
    return text.getvalue()


def markdown_text(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    r"""Rows as a table in GitHub's Markdown.

    Args:
        heads: of the columns.
        rows: cells.
        left: how many columns hold words; the others are numbers.

    >>> print(markdown_text(["layer", "time"], [["a|b *c*", "1 s"]]), end="")
    | layer | time |
    | --- | ---: |
    | a\|b \*c\* | 1 s |
    """
    rules = ["---" if index < left else "---:" for index in range(len(heads))]
    lines = [heads, rules, *rows]
    return "".join(f"| {' | '.join(map(_escaped, line))} |\n" for line in lines)


def _plain(value: Any) -> Any:
    """A figure in CSV; ranks as ``--rank`` takes them."""
    if isinstance(value, list):
        shown = format_ranks(value)
        return "" if shown == NOTHING else shown
    return "" if value is None else value


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*")
