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

__all__ = [
    "format_memory",
    "format_rank",
    "format_short",
    "format_time",
    "make_console",
    "make_table",
    "print_error",
    "print_json",
]

# wide enough for every table where there is no terminal to be as wide as
_PIPE_WIDTH = 160


def make_console(quiet: bool = False) -> Console:
    """Where results go, if anywhere. Colour follows the terminal, NO_COLOR and FORCE_COLOR."""
    require("the command line", ("rich",), "cli")
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    width = _PIPE_WIDTH if piped else None
    return Console(highlight=False, emoji=False, markup=False, width=width, quiet=quiet)


def make_table(*columns: str, left: int = 1) -> Table:
    """A table with thin rules; the first ``left`` columns hold words, the others numbers.

    The tables of costs fit a terminal of 80 columns.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
        header_style="bold",
    )
    for place, name in enumerate(columns):
        words = place < left
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


def format_short(number: float) -> str:
    """A count in three digits with a decimal prefix.

    >>> format_short(302_383_104), format_short(96)
    ('302 M', '96')
    """
    for threshold, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= threshold:
            return f"{_three(number / threshold)} {prefix}"
    return f"{number:.3g}"


def format_memory(size: float) -> str:
    """Bytes in three digits with a binary prefix.

    >>> format_memory(1023 * 2**20), format_memory(12)
    ('1023 MiB', '12 B')
    """
    for power, prefix in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{_three(size / 2**power)} {prefix}"
    return f"{size:.0f} B"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


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
