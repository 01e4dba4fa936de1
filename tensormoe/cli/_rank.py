"""``tensormoe rank``: what a budget buys, next to the layers that it replaces."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import prod
from typing import Any

from tensormoe import LayerSpec
from tensormoe._validation import choice
from tensormoe.cli._console import (
    format_memory,
    format_short,
    format_time,
    make_console,
    make_table,
    print_json,
)
from tensormoe.cli._figures import COLUMNS, Figures, cost_dict
from tensormoe.cli._files import check_picture
from tensormoe.cli._layer_arguments import LayerArguments
from tensormoe.cli._values import parse_bonds, parse_names, parse_size
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

__all__ = ["run_rank"]

Bonds = tuple[int | str | None, ...]

_SHOWN = {"parameters": "parameters", "flops": "FLOPs", "memory": "of memory", "time": ""}


@dataclass(frozen=True)
class _Question:
    """What is asked, checked."""

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
        smallest: limits that have to be raised, and to what.
    """

    name: str
    figures: Figures | None
    front: tuple[RankChoice, ...]
    smallest: dict[str, float]

    def score(self, objective: str) -> tuple[int, int]:
        """What the best row has most of."""
        if self.figures is None:
            return 0, 0
        rank, span = self.figures.expert_rank or 0, self.figures.expert_span or 0
        scores = {"capacity": (rank * span, rank), "expert_rank": (rank, span)}
        return scores.get(objective, (span, rank))


def run_rank(arguments: argparse.Namespace) -> None:
    """Choose ranks and show them."""
    path = check_picture(arguments.plot)
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
        from tensormoe.cli._front_picture import draw_front

        fronts = {
            each.name: (each.figures, each.front) for each in answers if each.figures is not None
        }
        draw_front(path, _title(asked), f"within {_budget(asked.budget)}", fronts)
        if not arguments.json:
            make_console().print(f"drawn in {path}")
    if star is None:
        raise BudgetError(_nothing_fits(asked, answers))


def _nothing_fits(asked: _Question, answers: list[_Answer]) -> str:
    """What to raise, so that at least one factorization fits."""
    least = min(answers, key=lambda each: sum(each.smallest.values()))
    needed = " and ".join(f"{limit} at least {value}" for limit, value in least.smallest.items())
    return (
        f"no factorization fits the budget of {_budget(asked.budget)}; {least.name} needs "
        f"{needed}. Raise the budget or use fewer experts."
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
        return _Answer(name, None, (), dict(error.needed))
    spec = LayerSpec(*asked.sizes, resolve_factorization(name, rank), layer.bias)
    figures = Figures.of(
        name,
        spec.cost(layer.batch, gate=layer.gate),
        layer.device,
        rank=rank,
        expert_rank=spec.expert_rank,
        expert_span=spec.expert_span,
    )
    return _Answer(name, figures, front, {})


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
        text = f"{round(value):,}"
    elif limit == "flops":
        text = format_short(value)
    elif limit == "memory":
        text = format_memory(value)
    else:
        text = format_time(value)
    return f"{text} {_SHOWN[limit]}".strip()


def _budget(budget: Budget) -> str:
    shown = " and ".join(_amount(limit, value) for limit, value in budget.limits.items())
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
        if each.smallest:
            needed = " and ".join(_amount(*item) for item in each.smallest.items())
            what = "with these bonds " if each.name in asked.bonds else ""
            notes.append(f"{each.name} is too large: {what}it needs at least {needed}.")
    notes.append(
        f"The MLP has {asked.hidden:,} hidden features; the sparse MoE runs {asked.top_k} of its "
        "experts an input."
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
            {"factorization": each.name, "feasible": False, "smallest_budget": each.smallest}
            if each.figures is None
            else {
                "factorization": each.name,
                "feasible": True,
                **each.figures.to_dict(),
                "front": [
                    {
                        "rank": list(point.rank) if isinstance(point.rank, tuple) else point.rank,
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
