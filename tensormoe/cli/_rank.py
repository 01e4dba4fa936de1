"""``tensormoe rank``: what a budget buys, next to the layers that it replaces."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tensormoe import LayerSpec
from tensormoe._files import check_picture
from tensormoe._format import format_bytes, format_count, format_time, plain_rank
from tensormoe._validation import choice
from tensormoe.choosing._words import parse_bonds, parse_names, parse_size
from tensormoe.cli._console import make_console, make_table, print_json
from tensormoe.cli._figures import COLUMNS, Figures, cost_dict
from tensormoe.cli._layer_arguments import LayerArguments
from tensormoe.errors import BudgetError, SpecError
from tensormoe.factorizations import Dense, resolve_factorization
from tensormoe.selection import (
    OBJECTIVES,
    Budget,
    RankChoice,
    linear_cost,
    mlp_cost,
    rank_front,
    select_rank,
    sparse_moe_cost,
)

Bonds = tuple[int | str | None, ...]

_SHOWN = {"flops": "FLOPs", "memory": "of memory", "time": ""}


@dataclass(frozen=True)
class _Question:
    """Arguments, checked."""

    layer: LayerArguments
    names: tuple[str, ...]
    bonds: dict[str, Bonds]
    budget: Budget
    objective: str
    hidden: int
    top_k: int

    @property
    def sizes(self) -> tuple[int, int, tuple[int, ...]]:
        return self.layer.in_features, self.layer.out_features, self.layer.experts


@dataclass(frozen=True)
class _Answer:
    """A factorization: its row with its front, or the smallest budget that it fits.

    Args:
        name: of the factorization.
        figures: None where the budget is impossible.
        front: ranks that no other beats in expert rank and expert span.
        error: why nothing fits, if nothing does.
    """

    name: str
    figures: Figures | None
    front: tuple[RankChoice, ...]
    error: BudgetError | None = None

    def score(self, objective: str) -> tuple[int, int]:
        """Figure that the best row maximizes."""
        if self.figures is None:
            return 0, 0
        rank, span = self.figures.expert_rank or 0, self.figures.expert_span or 0
        scores = {"capacity": (rank * span, rank), "expert_rank": (rank, span)}
        return scores.get(objective, (span, rank))


def run_rank(arguments: argparse.Namespace) -> None:
    """Choose ranks and show them."""
    path = None if arguments.plot is None else check_picture(arguments.plot, "--plot")
    asked = _question(arguments)
    answers = [_answer(asked, name) for name in asked.names]
    baselines = _baselines(asked)
    best = max(answers, key=lambda each: each.score(asked.objective))
    star = best.name if best.figures is not None else None
    if arguments.json:
        print_json(_as_dict(asked, answers, baselines, star))
    else:
        _show(asked, answers, baselines, star)
    if path is not None:
        _plot(path, asked, answers)
        if not arguments.json:
            make_console().print(f"drawn in {path}")
    if star is None:
        raise _nothing_fits(asked, answers)


def _nothing_fits(asked: _Question, answers: list[_Answer]) -> BudgetError:
    """The error of the factorization that needs the least."""
    errors = {each.name: each.error for each in answers if each.error is not None}
    name, error = min(errors.items(), key=lambda item: sum(item[1].needed.values()))
    needed = " and ".join(f"{limit} at least {value}" for limit, value in error.needed.items())
    return BudgetError(
        f"no factorization fits the budget of {_budget(asked.budget)}; {name} needs {needed}. "
        "Raise the budget or use fewer experts.",
        error.needed,
        error.given,
        error.alternatives,
    )


def _question(arguments: argparse.Namespace) -> _Question:
    layer = LayerArguments.parse(arguments)
    names = parse_names(arguments.factorization)
    hidden = 4 * layer.in_features
    if arguments.hidden is not None:
        hidden = parse_size(arguments.hidden, "--hidden")
    budget = layer.budget(arguments.budget, hidden)
    objective = choice(arguments.objective, OBJECTIVES, "--objective", SpecError)
    # a sparse mixture has no more experts to pick than there are
    top_k = min(layer.top_k or 2, prod(layer.experts))
    bonds = parse_bonds(arguments.bonds, names)
    return _Question(layer, names, bonds, budget, objective, hidden, top_k)


def _answer(asked: _Question, name: str) -> _Answer:
    layer, bonds = asked.layer, asked.bonds.get(name)
    common: dict[str, Any] = {
        "budget": asked.budget,
        "bias": layer.bias,
        "bonds": bonds,
        "gate": layer.gate,
    }
    try:
        rank = select_rank(name, *asked.sizes, objective=asked.objective, **common)
        front = rank_front(name, *asked.sizes, **common)
    except BudgetError as error:
        if not error.needed:
            raise
        return _Answer(name, None, (), error)
    spec = LayerSpec(*asked.sizes, resolve_factorization(name, rank), layer.bias)
    figures = Figures.of(
        name,
        spec.cost(layer.batch, gate=layer.gate),
        layer.device,
        rank=rank,
        expert_rank=spec.expert_rank,
        expert_span=spec.expert_span,
    )
    return _Answer(name, figures, front)


def _baselines(asked: _Question) -> list[Figures]:
    layer = asked.layer
    rows, columns, experts = asked.sizes
    batch, bias, device = layer.batch, layer.bias, layer.device
    dense = LayerSpec(*asked.sizes, Dense(), bias)
    full: dict[str, Any] = {"expert_rank": dense.expert_rank, "expert_span": dense.expert_span}
    return [
        Figures.of(
            "linear",
            linear_cost(rows, columns, batch, bias=bias),
            device,
            expert_rank=dense.expert_rank,
            expert_span=1,
        ),
        Figures.of(
            "MLP",
            mlp_cost(rows, asked.hidden, columns, batch, bias=bias),
            device,
        ),
        Figures.of("dense MoE", dense.cost(batch, gate=layer.gate), device, **full),
        Figures.of(
            "sparse MoE",
            sparse_moe_cost(rows, columns, experts, asked.top_k, batch, bias=bias),
            device,
            **full,
        ),
    ]


def _title(asked: _Question) -> str:
    layer = asked.layer
    return f"{layer.num_experts} experts of {layer.in_features} → {layer.out_features}"


def _amount(limit: str, value: float) -> str:
    if limit == "parameters":
        return f"{round(value):,} parameters"
    formats = {"flops": format_count, "memory": format_bytes, "time": format_time}
    return f"{formats[limit](value)} {_SHOWN[limit]}".strip()


def _amounts(limits: Mapping[str, float]) -> str:
    return " and ".join(_amount(*item) for item in limits.items())


def _budget(budget: Budget) -> str:
    shown = _amounts(budget.limits)
    return shown if budget.gate else f"{shown}, the gate on top"


def _show(
    asked: _Question, answers: list[_Answer], baselines: list[Figures], best: str | None
) -> None:
    console = make_console()
    from rich.text import Text

    layer = asked.layer
    bias = "with" if layer.bias else "without"
    console.print()
    console.print(Text.assemble((_title(asked), "bold"), f", {bias} bias"))
    console.print(
        Text.assemble(
            "budget ", (_budget(asked.budget), "bold"), f", a call being {layer.batch:,} inputs"
        )
    )
    table = make_table(*COLUMNS, left=2)
    for each in answers:
        if each.figures is None:
            table.add_row(each.name, "too large", *("–" for _ in COLUMNS[2:]), style="dim")
            continue
        name, *cells = each.figures.cells()
        star = each.name == best
        table.add_row(f"{name} *" if star else name, *cells, style="bold green" if star else "")
    table.add_section()
    if layer.gate is not None:
        # its share of every row above
        gate = Figures.of("gate", layer.gate_cost, layer.device)
        table.add_row(*gate.cells(), style="dim")
        table.add_section()
    for row in baselines:
        table.add_row(*row.cells(), style="cyan")
    console.print()
    console.print(table)
    console.print()
    for line in _notes(asked, answers, best):
        console.print(line)
    console.print()


def _word(name: str, value: Any) -> str:
    """A changed argument as this command takes it."""
    return "x".join(map(str, value)) if name == "experts" else "--gate-on-top"


def _plot(path: Path, asked: _Question, answers: list[_Answer]) -> None:
    from tensormoe.plotting import MUTED, figure, plot_fronts

    fronts = {each.name: each.front for each in answers if each.figures is not None}
    chosen = {
        each.name: point
        for each in answers
        for point in each.front
        if each.figures is not None and point.rank == each.figures.rank
    }
    with figure(path, 8.0, 5.4) as drawn:
        axes = drawn.add_subplot()
        plot_fronts(axes, fronts, chosen)
        axes.set_title(f"What a budget buys: {_title(asked)}\n", loc="left", fontsize=12.5)
        said = f"within {_budget(asked.budget)}; large marks are the ranks chosen"
        axes.text(0.0, 1.02, said, transform=axes.transAxes, fontsize=9.5, color=MUTED)


def _notes(asked: _Question, answers: list[_Answer], best: str | None) -> list[str]:
    layer, notes = asked.layer, []
    if best is not None:
        aims = {
            "capacity": "expert rank × expert span",
            "expert_rank": "expert rank",
            "expert_span": "expert span",
        }
        notes.append(f"* the highest {aims[asked.objective]}. No factorization exceeds the budget.")
    else:
        notes.append("No factorization fits the budget.")
    for each in answers:
        if each.error is not None:
            what = "with these bonds " if each.name in asked.bonds else ""
            needed = _amounts(each.error.needed)
            notes.append(f"{each.name} is too large: {what}it needs at least {needed}.")
            for other in each.error.alternatives:
                change = " ".join(_word(*item) for item in other.change.items())
                notes.append(f"  {_amounts(other.needed)} with {change}.")
    notes.append(
        f"The MLP has {asked.hidden:,} hidden features; the sparse MoE runs {asked.top_k} of its "
        "experts per input."
    )
    if layer.gate is None:
        notes.append("No gate is counted, but for the router of the sparse MoE (--gate entmax).")
    else:
        spent = "the budget covers it" if asked.budget.gate else "it comes on top of the budget"
        notes.append(
            f"Every row above has the {layer.gate.activation} gate in it, whose own figures are in "
            f"the row gate; {spent}."
        )
    hint = " (tensormoe calibrate measures this machine)" if layer.device.name == "cpu" else ""
    notes.append(f"time: predicted for {layer.device.name}, float32{hint}.")
    return notes


def _as_dict(
    asked: _Question, answers: list[_Answer], baselines: list[Figures], best: str | None
) -> dict[str, Any]:
    layer = asked.layer
    return {
        "command": "rank",
        **layer.to_dict(),
        "budget": dict(asked.budget.limits),
        "objective": asked.objective,
        "hidden": asked.hidden,
        "top_k": asked.top_k,
        "best": best,
        "gate_cost": None if layer.gate is None else cost_dict(layer.gate_cost),
        "factorizations": [
            {
                "factorization": each.name,
                "feasible": False,
                "smallest_budget": dict(each.error.needed),
                "alternatives": [
                    {**other.change, "smallest_budget": dict(other.needed)}
                    for other in each.error.alternatives
                ],
            }
            if each.error is not None
            else {
                "factorization": each.name,
                "feasible": True,
                **(each.figures.to_dict() if each.figures is not None else {}),
                "front": [
                    {
                        "rank": plain_rank(point.rank),
                        "expert_rank": point.expert_rank,
                        "expert_span": point.expert_span,
                        "parameters": point.parameters,
                        "gate_parameters": point.gate_parameters,
                    }
                    for point in each.front
                ],
            }
            for each in answers
        ],
        "baselines": [{"layer": row.name, **row.to_dict()} for row in baselines],
    }
