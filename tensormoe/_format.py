"""Numbers and tables as text: the formats of every table, report and drawing."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

Cell = str | tuple[str, str]
"""One entry of a table, or a pair: the entry before and after."""


def format_count(number: float) -> str:
    """A count in three digits with a decimal prefix.

    >>> format_count(302_383_104), format_count(96)
    ('302 M', '96')
    """
    for threshold, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= threshold:
            return f"{_three(number / threshold)} {prefix}"
    return f"{number:.3g}"


def format_bytes(size: float) -> str:
    """Bytes in three digits with a binary prefix.

    >>> format_bytes(1023 * 2**20), format_bytes(12)
    ('1023 MiB', '12 B')
    """
    for power, prefix in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{_three(size / 2**power)} {prefix}"
    return f"{size:.0f} B"


def format_time(seconds: float) -> str:
    """A duration in three digits.

    >>> format_time(0.00123), format_time(2.5e-5), format_time(75.0), format_time(9000.0)
    ('1.23 ms', '25 µs', '75 s', '2.5 h')
    """
    for threshold, unit in ((3600.0, "h"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= threshold:
            return f"{_three(seconds / threshold)} {unit}"
    return f"{_three(seconds * 1e9)} ns"


def format_share(value: float | None) -> str:
    """A ratio or a relative error in percent; as a power of ten below a twentieth of a percent.

    >>> format_share(0.1234), format_share(3.2e-7), format_share(0.0), format_share(None)
    ('12.3%', '3.2e-07', '0', '–')
    """
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:.1%}" if value >= 0.0005 or value != value else f"{value:.1e}"


def format_parameters(count: int) -> str:
    """Every digit where budgets are compared, three where layers are huge.

    >>> format_parameters(4_722_432), format_parameters(302_383_104)
    ('4,722,432', '302 M')
    """
    return f"{count:,}" if count < 10**8 else format_count(count)


def format_rank(rank: int | tuple[int, ...] | None) -> str:
    """A rank as ``tensormoe plan --rank`` takes it.

    >>> format_rank((4, 4, 97)), format_rank(None)
    ('4,4,97', '–')
    """
    if rank is None:
        return "–"
    return str(rank) if isinstance(rank, int) else ",".join(map(str, rank))


def plain_rank(rank: int | tuple[int, ...] | None) -> int | list[int] | None:
    """A rank as JSON has it.

    >>> plain_rank((4, 4, 97)), plain_rank(64)
    ([4, 4, 97], 64)
    """
    return list(rank) if isinstance(rank, tuple) else rank


def format_experts(experts: Sequence[int]) -> str:
    """The number of experts, level by level.

    >>> format_experts((16, 8))
    '16 × 8'
    """
    return " × ".join(map(str, experts))


def align(rows: Sequence[Sequence[Cell]]) -> list[str]:
    r"""Lines of a table: the first column to the left, the others to the right, arrows in line.

    >>> print(*align([["layer", "FLOPs"], ["a", ("10", "9")], ["b", ("8", "7")]]), sep="\n")
    layer    FLOPs
    a      10 →  9
    b       8 →  7
    """
    columns = []
    for index, cells in enumerate(zip(*rows, strict=True)):
        pairs = [cell for cell in cells if isinstance(cell, tuple)]
        left, right = (max((len(pair[side]) for pair in pairs), default=0) for side in (0, 1))
        texts = [
            cell if isinstance(cell, str) else f"{cell[0]:>{left}} → {cell[1]:>{right}}"
            for cell in cells
        ]
        width = max(map(len, texts))
        columns.append([f"{text:{'>' if index else '<'}{width}}" for text in texts])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def stack(heads: Sequence[str], cells: Sequence[str], width: int) -> list[str]:
    r"""One row of a table for narrow pages: its first cell, and below it every other with its head.

    Nothing is cut off: what is wider than the page is broken.

    >>> heads, cells = ["layer", "rank", "FLOPs", "time"], ["cp *", "288", "1.21 G", "12 ms"]
    >>> print(*stack(heads, cells, 30), sep="\n")
    cp *
      rank 288 · FLOPs 1.21 G
      time 12 ms
    """
    lines = _wrapped(cells[0], width)
    line = ""
    for head, cell in zip(heads[1:], cells[1:], strict=True):
        item = " ".join(f"{head} {cell}".split())
        if not cell.strip():
            continue
        if line and len(line) + 3 + len(item) <= width:
            line += f" · {item}"
            continue
        lines += _wrapped(line, width) if line else []
        line = f"  {item}"
    return lines + (_wrapped(line, width) if line else [])


def fill(text: str, width: int | None, indent: str = "  ") -> list[str]:
    """Lines of a text, broken between words where there is a width.

    >>> fill("a layer of experts", 10), fill("a layer of experts", None)
    (['a layer of', '  experts'], ['a layer of experts'])
    """
    return [text] if width is None else _wrapped(text, width, indent)


def _wrapped(text: str, width: int, indent: str = "    ") -> list[str]:
    lead = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(
        text.lstrip(),
        max(width, 16),
        initial_indent=lead,
        subsequent_indent=indent,
        break_on_hyphens=False,
    ) or [""]


def align_totals(rows: Sequence[Sequence[Cell]]) -> list[str]:
    """The same, with rules below the heads and above the last row, which holds totals."""
    first, *lines, last = align(rows)
    rule = "-" * max(map(len, (first, *lines, last)))
    return [first, rule, *lines, rule, last]


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
