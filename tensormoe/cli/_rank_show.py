"""Answers of ``tensormoe rank``: as a table, as Markdown, as CSV and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensormoe._format import (
    format_bytes,
    format_count,
    format_experts,
    format_parameters,
    format_time,
)
from tensormoe.choosing import Request
from tensormoe.cli._asked import as_words
from tensormoe.cli._columns import (
    LAYER_COLUMNS,
    NOTHING,
    Column,
    csv_text,
    format_ranks,
    format_whole,
    markdown_text,
)
from tensormoe.cli._console import make_table
from tensormoe.errors import Alternative, BudgetError, SpecError
from tensormoe.selection import OBJECTIVES

if TYPE_CHECKING:
    from rich.console import Console

Values = Mapping[str, Any]

_SHOWN = {"flops": "FLOPs", "memory": "of memory", "time": ""}
_LEG_COLUMNS = (
    Column("leg", "best\nleg"),
    Column("cut_parameters", "of each\nparameters", format_parameters),
    Column("cut_communicated", "of each\nexchanged", format_bytes, "B"),
    Column("cut_time", "of each\ntime", format_time, "s"),
)
_PLAIN_COLUMNS = (
    Column("matmul_flops", "FLOPs in matrix products"),
    Column("bytes_moved", "bytes moved", unit="B"),
    Column("saved_memory", "memory kept for the backward pass", unit="B"),
)
_FRONT_COLUMNS = (
    Column("name", "layer"),
    Column("ranks", "rank", format_ranks),
    Column("expert_rank", "expert\nrank", format_whole),
    Column("expert_span", "expert\nspan", format_whole),
    Column("parameters", "parameters", format_parameters),
    Column("gate_parameters", "of them\nthe gate's", format_parameters),
)


def check_fronts(asked: Request) -> None:
    """Refuse what has no fronts.

    Raises:
        SpecError: a block or an embedding.
    """
    if asked.kind != "layer":
        raise SpecError(
            f"--front is for single layers; got it with --kind {asked.kind}. Drop one of them."
        )


def nothing_fits(asked: Request, found: Values) -> BudgetError:
    """The error of the factorization that needs the least."""
    row = min(found["rows"], key=lambda each: sum(each["smallest_budget"].values()))
    least = row["smallest_budget"]
    needed = " and ".join(f"{limit} at least {value}" for limit, value in least.items())
    limits = asked.budget.limits
    return BudgetError(
        f"no factorization fits the budget of {_budget(asked)}; {row['name']} needs {needed}. "
        "Raise the budget or use fewer experts.",
        least,
        {name: limits[name] for name in least},
        [Alternative(each["change"], each["smallest_budget"]) for each in row["alternatives"]],
    )


def show_rank(console: Console, asked: Request, found: Values, *, front: bool) -> None:
    """Show an answer."""
    from rich.text import Text

    console.print()
    console.print(Text.assemble((_title(asked), "bold"), _details(asked)))
    console.print(Text.assemble("budget ", (_budget(asked), "bold"), f", {_call(asked)}"))
    columns = _columns(asked)
    table = make_table(*(column.head for column in columns), left=2)
    best = found["best"]
    for row in found["rows"]:
        star = best is not None and row["name"] == best["name"]
        style = "bold green" if star else "" if row["feasible"] else "dim"
        table.add_row(*_cells(columns, row, star), style=style)
    table.add_section()
    if found["gate"] is not None:
        # its share of every row above
        table.add_row(*_cells(columns, {"name": "gate", **found["gate"]}), style="dim")
        table.add_section()
    for row in found["baselines"]:
        table.add_row(*_cells(columns, row), style="cyan")
    console.print()
    console.print(table)
    console.print()
    if front:
        points = make_table(*(column.head for column in _FRONT_COLUMNS), left=2)
        for point in _points(found):
            points.add_row(*(column.cell(point) for column in _FRONT_COLUMNS))
        console.print(Text("Ranks that no other beats in expert rank and span", style="bold"))
        console.print()
        console.print(points)
        console.print()
    for line in _notes(asked, found):
        console.print(line)
    console.print()


def rank_markdown(asked: Request, found: Values, *, front: bool) -> str:
    """An answer as Markdown: a heading line, a table, and a list of notes."""
    columns, best = _columns(asked), found["best"]
    gate = [] if found["gate"] is None else [{"name": "gate", **found["gate"]}]
    rows = [
        [*_cells(columns, row, best is not None and row["name"] == best["name"])]
        for row in (*found["rows"], *gate, *found["baselines"])
    ]
    heads = [column.head for column in columns]
    text = f"**{_title(asked)}**{_details(asked)}\n\n"
    text += f"Budget: {_budget(asked)}, {_call(asked)}.\n\n"
    text += markdown_text(heads, rows, left=2)
    if front:
        cells = [[column.cell(point) for column in _FRONT_COLUMNS] for point in _points(found)]
        heads = [column.head for column in _FRONT_COLUMNS]
        text += "\nRanks that no other beats in expert rank and span:\n\n"
        text += markdown_text(heads, cells, left=2)
    notes = (line.strip().replace("* ", "\\* ", 1) for line in _notes(asked, found))
    return text + "\n" + "".join(f"- {line}\n" for line in notes)


def rank_csv(found: Values, *, front: bool) -> str:
    """An answer as CSV: a row for each layer, or for each point of the fronts."""
    if front:
        return csv_text(_FRONT_COLUMNS, _points(found))
    best = None if found["best"] is None else found["best"]["name"]
    rows = [
        {
            **_flat(row),
            "of": of,
            "best": int(of == "factorization" and row["name"] == best),
            "needs": ",".join(
                f"{name}={value}" for name, value in row.get("smallest_budget", {}).items()
            ),
        }
        for of, listed in (("factorization", found["rows"]), ("compared", found["baselines"]))
        for row in listed
    ]
    if found["gate"] is not None:
        rows.append({"name": "gate", "of": "gate", "best": 0, **found["gate"]})
    columns = (
        LAYER_COLUMNS[0],
        Column("of", "what"),
        Column("best", "best"),
        *LAYER_COLUMNS[1:],
        *_PLAIN_COLUMNS,
        *_LEG_COLUMNS,
        Column("needs", "smallest budget"),
        Column("note", "note"),
    )
    return csv_text(columns, rows)


@dataclass(frozen=True)
class _Point:
    """A rank with its two figures."""

    rank: int | tuple[int, ...] | None
    expert_rank: int
    expert_span: int


def plot_fronts_of(path: Path, asked: Request, found: Values) -> None:
    """Draw the fronts, or of blocks and embeddings the ranks that were chosen."""
    from tensormoe.plotting import MUTED, figure, plot_fronts

    fronts, chosen = {}, {}
    for row in found["rows"]:
        if row["feasible"]:
            name = row["name"]
            fronts[name] = [_point(each) for each in found["fronts"].get(name, ())]
            chosen[name] = _point({**row, "rank": row["rank"]})
    with figure(path, 9.6, 5.4) as drawn:
        axes = drawn.add_subplot()
        plot_fronts(axes, fronts, chosen)
        axes.set_title(f"What a budget buys: {_title(asked)}\n", loc="left", fontsize=12.5)
        said = f"within {_budget(asked)}; large marks are the ranks chosen"
        axes.text(0.0, 1.02, said, transform=axes.transAxes, fontsize=9.5, color=MUTED)


def _point(values: Values) -> _Point:
    rank = values["rank"]
    return _Point(
        tuple(rank) if isinstance(rank, list) else rank,
        values["expert_rank"],
        values["expert_span"],
    )


def _points(found: Values) -> list[dict[str, Any]]:
    return [
        {"name": name, **point, "ranks": [point["rank"]]}
        for name, front in found["fronts"].items()
        for point in front
    ]


def _flat(row: Values) -> dict[str, Any]:
    return {**row, **{f"cut_{name}": value for name, value in row.get("cut", {}).items()}}


def _columns(asked: Request) -> tuple[Column, ...]:
    return (*LAYER_COLUMNS, *_LEG_COLUMNS) if asked.devices > 1 else LAYER_COLUMNS


def _cells(columns: Sequence[Column], row: Values, star: bool = False) -> list[str]:
    name = f"{row['name']} *" if star else row["name"]
    if not row.get("feasible", True):
        return [name, "too large", *(NOTHING for _ in columns[2:])]
    flat = _flat(row)
    cells = [name, *(column.cell(flat) for column in columns[1:])]
    return [cell.replace(" / ", " /\n") for cell in cells]


def _title(asked: Request) -> str:
    experts, rows, columns = format_experts(asked.experts), asked.in_features, asked.out_features
    if asked.is_block:
        gated = "gated blocks" if asked.kind == "gated" else "blocks of two layers"
        return f"{gated}, {experts} experts of {rows} → {asked.hidden_features} → {columns}"
    if asked.kind == "embedding":
        return f"embeddings, {experts} experts of {rows} ids → {columns}"
    return f"{experts} experts of {rows} → {columns}"


def _details(asked: Request) -> str:
    bias = "" if asked.kind == "embedding" else f", {'with' if asked.bias else 'without'} bias"
    return bias if asked.dtype == "float32" else f"{bias}, {asked.dtype}"


def _call(asked: Request) -> str:
    both = ", forward and backward" if asked.training else ""
    return f"a call being {asked.batch:,} inputs{both}"


def _amount(limit: str, value: float) -> str:
    if limit == "parameters":
        return f"{round(value):,} parameters"
    formats = {"flops": format_count, "memory": format_bytes, "time": format_time}
    return f"{formats[limit](value)} {_SHOWN[limit]}".strip()


def _amounts(limits: Mapping[str, float]) -> str:
    return " and ".join(_amount(*item) for item in limits.items())


def _budget(asked: Request) -> str:
    shown = _amounts(asked.budget.limits)
    return shown if asked.budget.gate or asked.gate is None else f"{shown}, the gate on top"


def _notes(asked: Request, found: Values) -> list[str]:
    notes = []
    best = found["best"]
    if best is None:
        notes.append("No factorization fits the budget.")
    else:
        notes.append(f"* {best['reason']}. No factorization exceeds the budget.")
        others = {
            name: best["others"][name]
            for name in OBJECTIVES
            if name != asked.objective and name in best["others"]
        }
        if others and len(asked.names) > 1:
            listed = ", ".join(
                f"--objective {name} → {row}{' too' if row == best['name'] else ''}"
                for name, row in others.items()
            )
            notes.append(f"  {listed}.")
    for row in found["rows"]:
        notes += [] if row["feasible"] else _needed(asked, row)
        notes += [f"{row['name']}: {row['note']}"] if row["note"] else []
    compared = "; ".join(
        f"{row['name']}: {row['note'] or row.get('message', '')}".removesuffix(".")
        for row in found["baselines"]
        if row["note"] or not row["feasible"]
    )
    notes += [f"{compared}."] if compared else []
    notes += [_gate(asked)] if asked.kind != "embedding" else []
    if asked.is_block:
        notes.append("Expert rank and span of a block are those of its smaller layer.")
    if asked.devices > 1:
        gate = "" if asked.is_block else ", without the gate"
        notes.append(
            f"Cut over {asked.devices} devices: one device's part, inputs and outputs whole on all "
            f"of them{gate}."
        )
    hint = " (tensormoe calibrate measures this machine)" if asked.device.name == "cpu" else ""
    name = asked.device.name
    dtype = "" if asked.dtype in name else f", {asked.dtype}"
    notes.append(f"time: predicted for {name}{dtype}{hint}.")
    return notes


def _needed(asked: Request, row: Values) -> list[str]:
    what = "with these bonds " if row["name"] in asked.bonds else ""
    needed = _amounts(row["smallest_budget"])
    lines = [f"{row['name']} is too large: {what}it needs at least {needed}."]
    for other in row["alternatives"]:
        lines.append(f"  {_amounts(other['smallest_budget'])} with {as_words(other['change'])}.")
    return lines


def _gate(asked: Request) -> str:
    if asked.gate is None:
        return "No gate is counted, but for routers of other mixtures (--gate entmax)."
    spent = "the budget covers it" if asked.budget.gate else "it comes on top of the budget"
    return (
        f"Every row above has the {asked.gate.activation} gate in it, whose own figures are in the "
        f"row gate; {spent}."
    )
