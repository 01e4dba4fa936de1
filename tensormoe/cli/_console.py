"""Output for people: colour on a terminal, plain text elsewhere; and for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tensormoe.cli._extras import require

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["format_rank", "format_time", "make_console", "make_table", "print_error", "print_json"]

# wide enough for every table where there is no terminal to be as wide as
_PIPE_WIDTH = 160


def make_console(quiet: bool = False) -> Console:
    """Where results go, if anywhere. Colour follows the terminal, NO_COLOR and FORCE_COLOR."""
    require("rich", "cli", "the command line")
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    width = _PIPE_WIDTH if piped else None
    return Console(highlight=False, emoji=False, markup=False, width=width, quiet=quiet)


def make_table(*columns: str, left: int = 1) -> Table:
    """A table with thin rules; the first ``left`` columns hold words, the others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="bold")
    for place, name in enumerate(columns):
        words = place < left
        table.add_column(name, justify="left" if words else "right", no_wrap=words)
    return table


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    print(json.dumps(values, indent=2, ensure_ascii=False))


def print_error(message: str) -> None:
    """One line on standard error, its first word red on a terminal."""
    line = " ".join(message.split())
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    word = "\033[1;31merror:\033[0m" if colour else "error:"
    print(f"{word} {line}", file=sys.stderr)


def format_time(seconds: float) -> str:
    """A duration with three digits.

    >>> format_time(0.00123), format_time(2.5e-5), format_time(75.0)
    ('1.23 ms', '25 µs', '75 s')
    """
    for threshold, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= threshold:
            return f"{seconds / threshold:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def format_rank(rank: int | tuple[int, ...] | None) -> str:
    """A rank as ``--rank`` takes it.

    >>> format_rank((4, 4, 97)), format_rank(None)
    ('4,4,97', '–')
    """
    if rank is None:
        return "–"
    return str(rank) if isinstance(rank, int) else ",".join(map(str, rank))
