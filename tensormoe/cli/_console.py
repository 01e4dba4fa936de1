"""Output for people: colour on a terminal, plain text elsewhere; and for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tensormoe._extras import require

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# wide enough for every table where there is no terminal to be as wide as
_PIPE_WIDTH = 160


def make_console(quiet: bool = False) -> Console:
    """Console for results, or for none. Colour follows the terminal, NO_COLOR and FORCE_COLOR."""
    require("the command line", ("rich",), "cli")
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    width = _PIPE_WIDTH if piped else None
    return Console(highlight=False, emoji=False, markup=False, width=width, quiet=quiet)


def make_table(*columns: str, left: int = 1) -> Table:
    """A table with thin rules; the first ``left`` columns hold words, the others numbers.

    The tables of costs fit a terminal of 80 columns; a narrower one gets a list.
    """
    from rich import box

    from tensormoe.cli._table import NarrowTable

    table = NarrowTable(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
        header_style="bold",
    )
    for index, name in enumerate(columns):
        words = index < left
        table.add_column(name, justify="left" if words else "right", no_wrap=words)
    return table


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    print(json.dumps(values, indent=2))


def print_error(message: str) -> None:
    """One line on standard error, its first word red on a terminal."""
    line = " ".join(message.split())
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    word = "\033[1;31merror:\033[0m" if colour else "error:"
    print(f"{word} {line}", file=sys.stderr)
