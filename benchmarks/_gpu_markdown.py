"""The GPU report as Markdown.

Standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from _gpu_parts import Outcome
from _gpu_records import Cells

METHOD = """\
- Every time is a median of turns, at least seven, and the calls of a row take their turns one after
  another. A turn is as many calls in succession as take 3 ms or more, 512 at most, between two CUDA
  events (PyTorch), or until the last result is there (JAX). Turns before them warm up.
- Nothing waits between the calls of a turn: a time is the device's, or Python's where Python takes
  longer. Operands that fit into the L2 cache may be there from the call before; *L2 cold* is one
  call behind a write of four times that cache.
- *forward* records nothing for gradients; *step* is forward and backward with all gradients, and
  no optimizer, but beside other layers, where it is one of training with SGD.
- *÷ products* is relative to the layer's own matrix products alone, the gate's among them, on
  operands that are there; those of a step are the products of both passes.
- *einsum* is the direct formulation: ones joined to the input, one einsum of the factors, layer
  norm and an entmax that sorts. Its outputs were compared with the layer's.
- *% of roofline* is the time that arithmetic and memory alone take, for each step the slower of the
  two, no overhead, relative to the measured time. The gate counts. Operands that are in the L2
  cache can exceed 100 %.
- float32 with TF32 off is measured against the rate of the float32 vector units; published float32
  rates of tensor cores are those of TF32, and count for the rows with TF32 on. bfloat16 has twice
  the published TF32 rate. Elementwise work has the rate of the vector units.
- *compiling* is seconds by the clock until the first call of a new function has ended, nothing in
  the compiler's caches: for PyTorch with that call, for JAX tracing, lowering and compiling alone,
  where functions inside that were traced before are not traced again.
- *einsum* cells are empty where it does not fit in memory or failed, which the end of this page
  says; *% of roofline* is empty where there is no roofline.\
"""


def report(
    title: str, facts: Mapping[str, Any], outcomes: Sequence[Outcome], seconds: float
) -> str:
    """The whole report.

    Args:
        title: its first line.
        facts: of the machine and the run, before those that parts found.
        outcomes: of all parts.
        seconds: of the whole run.
    """
    return "\n\n".join(_sections(title, facts, outcomes, seconds)) + "\n"


def _sections(
    title: str, facts: Mapping[str, Any], outcomes: Sequence[Outcome], seconds: float
) -> Iterator[str]:
    failed = list(failures(outcomes))
    left_out = list(dict.fromkeys(each for one in outcomes for each in one.found.left_out))
    yield f"# {title}"
    yield (
        f"{len(outcomes)} parts in {seconds:.0f} s; {len(failed)} failures, "
        f"{len(left_out)} things left out. Both are listed at the end."
    )
    yield "## Machine and settings"
    every = dict(facts)
    for outcome in outcomes:
        every |= outcome.found.facts
    yield _table([{"": name, "value": value} for name, value in every.items()])
    yield "## Method"
    yield METHOD
    tables: dict[str, list[Cells]] = {}
    for outcome in outcomes:
        for name, rows in outcome.found.tables.items():
            tables.setdefault(name, []).extend(rows)
    for name, rows in tables.items():
        yield f"## {name}"
        yield _table(rows)
    yield "## Parts"
    yield _table(
        [
            {"part": each.part.title, "result": each.problem or "done", "seconds": each.seconds}
            for each in outcomes
        ]
    )
    yield "## Failed"
    yield _list([f"{what}: {why}" for what, why in failed])
    yield "## Left out"
    ordered = sorted(left_out, key=lambda each: each[1])
    yield _list(
        [
            f"{why}: " + "; ".join(what for what, _ in each)
            for why, each in groupby(ordered, key=lambda each: each[1])
        ]
    )
    for outcome in outcomes:
        if outcome.problem:
            yield f"## Last lines of {outcome.part.title}"
            # four backticks: a line of the log may have three
            yield f"````text\n{outcome.last}\n````"


def failures(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, str]]:
    """Everything that failed, and parts that did not come to their end."""
    for outcome in outcomes:
        if outcome.problem:
            yield outcome.part.title, outcome.problem
        yield from outcome.found.failed


def _table(rows: Sequence[Cells]) -> str:
    if not rows:
        return "None."
    columns = list(dict.fromkeys(column for row in rows for column in row))
    right = [all(_is_number(row.get(column)) for row in rows) for column in columns]
    lines = [columns, ["---:" if each else "---" for each in right]]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_escaped(line)}" for line in lines) or "Nothing."


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _escaped(text: str) -> str:
    """Text that stays in its cell or its item."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
