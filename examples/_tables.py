"""Tables of the examples, as rich prints them."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["make_console", "make_table"]


def make_console() -> Console:
    """A console that is wide enough for every table where there is no terminal."""
    width = None if sys.stdout.isatty() else 160
    return Console(highlight=False, emoji=False, markup=False, width=width)


def make_table(*columns: str) -> Table:
    """A table with thin rules; the first column holds words, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=not place)
    return table
