"""A table that becomes a list where the terminal is too narrow for it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from tensormoe._format import stack
from tensormoe.cli._columns import NOTHING

_ANY_WIDTH = 10_000


class NarrowTable(Table):
    """A table of which nothing is cut off: rows below one another where they do not fit."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Text that the console shows."""
        wide = options.update(width=_ANY_WIDTH)
        padding = self.padding
        try:
            # columns closer together before they are given up
            for self.padding in (padding, (0, 0, 0, 0)):
                if Measurement.get(console, wide, self).maximum <= options.max_width:
                    yield from super().__rich_console__(console, options)
                    return
        finally:
            self.padding = padding
        if self.title:
            yield Text(str(self.title), style="bold")
        yield from self._stacked(options.max_width)

    def _stacked(self, width: int) -> Iterator[Text]:
        heads = [_plain(column.header) for column in self.columns]
        columns = [[*map(_figure, _cells(column))] for column in self.columns]
        for row, cells in zip(self.rows, zip(*columns, strict=True), strict=True):
            lines = stack(heads, cells, width)
            yield Text("\n".join(lines), style=row.style or "")
            if row.end_section:
                yield Text("─" * min(width, 20), style="dim")


def _cells(column: Column) -> Iterator[object]:
    yield from column.cells


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def _figure(cell: object) -> str:
    """A cell of a list, which leaves out what there is not."""
    text = _plain(cell)
    return "" if text == NOTHING else text
