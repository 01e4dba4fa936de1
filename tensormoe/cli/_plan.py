"""``tensormoe plan``: how a layer runs and what that costs."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from tensormoe import LayerSpec
from tensormoe.cli._console import (
    format_memory,
    format_short,
    format_time,
    make_console,
    make_table,
    print_json,
)
from tensormoe.cli._figures import cost_dict
from tensormoe.cli._files import check_picture
from tensormoe.cli._layer_arguments import LayerArguments
from tensormoe.cli._network_text import Role, draw_network, terms_of
from tensormoe.cli._values import parse_bytes, parse_rank
from tensormoe.errors import PlanError, RankError
from tensormoe.factorizations import rank_pattern, resolve_factorization
from tensormoe.planning import Cost, Plan, Routing, plan_layer
from tensormoe.selection import select_rank

__all__ = ["run_plan"]

_ITEMSIZE = 4
_BAR = 12

_STYLES: dict[Role, str] = {
    "data": "cyan",
    "factor": "yellow",
    "result": "bold green",
    "leg": "bold",
    "wire": "dim",
}


def run_plan(arguments: argparse.Namespace) -> None:
    """Plan a layer and show it."""
    path = check_picture(arguments.plot)
    given = LayerArguments.parse(arguments, "entmax" if arguments.top_k is None else "none")
    spec = _spec(arguments, given)
    limit = parse_bytes(arguments.memory_limit, "--memory-limit")
    if limit is not None and arguments.training:
        raise PlanError(
            "--memory-limit is for forward calls, since gradients need the whole batch; got it "
            "with --training. Drop one, or plan a smaller --batch."
        )
    plan = plan_layer(
        spec.network,
        given.batch,
        Routing(given.top_k),
        prepared=arguments.prepared,
        memory_limit=limit,
        gate=given.gate,
        itemsize=_ITEMSIZE,
        title=repr(spec.factorization),
    )
    cost = plan.cost(given.gate, training=arguments.training, itemsize=_ITEMSIZE)
    rows = _rows(cost, given)
    if arguments.json:
        print_json(_as_dict(spec, plan, cost, rows, given, arguments))
    else:
        _show(spec, plan, cost, rows, given, arguments)
    if path is not None:
        from tensormoe.cli._network_picture import draw_network_picture

        draw_network_picture(
            path, repr(spec.factorization), _sizes(spec), terms_of(spec), spec.network.sizes
        )
        if not arguments.json:
            make_console().print(f"drawn in {path}")


def _spec(arguments: argparse.Namespace, given: LayerArguments) -> LayerSpec:
    name = arguments.factorization.replace("-", "_")
    rank = parse_rank(arguments.rank)
    if rank is not None and arguments.budget is not None:
        raise RankError(
            f"--rank and --budget exclude one another; got {arguments.rank!r} and "
            f"{arguments.budget!r}. Drop one."
        )
    sizes = (given.in_features, given.out_features, given.experts)
    free = not rank_pattern(name, len(given.experts))
    if arguments.budget is not None or (rank is None and not free):
        budget = given.budget(arguments.budget, 4 * given.in_features)
        rank = select_rank(name, *sizes, budget=budget, bias=given.bias, gate=given.gate)
    return LayerSpec(*sizes, resolve_factorization(name, rank), given.bias)


@dataclass
class _Row:
    """A step, and all its repetitions where a memory limit cuts the batch into chunks."""

    label: str
    count: int = 0
    matmul_flops: int = 0
    elementwise_flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    time: float = 0.0


def _rows(cost: Cost, given: LayerArguments) -> list[_Row]:
    rows: dict[str, _Row] = {}
    for step in cost.steps:
        row = rows.setdefault(step.label, _Row(step.label))
        row.count += 1
        row.matmul_flops += step.matmul_flops
        row.elementwise_flops += step.elementwise_flops
        row.bytes_read += step.bytes_read
        row.bytes_written += step.bytes_written
        row.time += given.device.time(Cost(0, (step,), 0))
    return list(rows.values())


def _sizes(spec: LayerSpec) -> str:
    experts = " × ".join(map(str, spec.experts))
    bias = "with" if spec.bias else "without"
    return f"{experts} experts of {spec.in_features} → {spec.out_features}, {bias} bias"


def _equation(spec: LayerSpec) -> str:
    data = [f"coefficients_{k}[b {leg}]" for k, leg in enumerate(spec.network.expert_legs)]
    terms = [
        [*data, "x[b i]", *(f"{each.name}[{' '.join(each.legs)}]" for each in term.factors)]
        for term in spec.network.terms
    ]
    return "y[b o] = " + " + ".join(" · ".join(term) for term in terms)


def _regime(plan: Plan) -> str:
    inputs = f"{plan.batch:,} inputs"
    if plan.chunk < plan.batch:
        inputs += f", {plan.chunk:,} at a time"
    if plan.prepared:
        return f"{inputs}; weight-only steps have run beforehand"
    end = "on" if plan.last_batch is None else f"to {plan.last_batch:,}"
    return f"{inputs}; this path is the cheapest from {plan.first_batch:,} {end}"


def _dense(spec: LayerSpec, batch: int) -> tuple[int, int]:
    """Parameters and FLOPs of 𝒲 itself."""
    entries = spec.num_experts * (spec.in_features + spec.bias) * spec.out_features
    return entries, 2 * batch * spec.num_experts * spec.in_features * spec.out_features


def _show(
    spec: LayerSpec,
    plan: Plan,
    cost: Cost,
    rows: list[_Row],
    given: LayerArguments,
    arguments: argparse.Namespace,
) -> None:
    console = make_console()
    from rich.table import Table
    from rich.text import Text

    total = sum(row.time for row in rows)
    console.print()
    console.print(Text.assemble((repr(spec.factorization), "bold"), f"  {_sizes(spec)}"))
    console.print(Text(_equation(spec), style="dim"), soft_wrap=False)
    console.print()
    for place, arrays in enumerate(terms_of(spec)):
        if place:
            console.print(Text("\n  plus\n", style="bold"))
        for line in draw_network(arrays, spec.network.sizes):
            text = Text.assemble(*((part, _STYLES[role]) for part, role in line))
            text.rstrip()
            console.print(text, no_wrap=True, overflow="ignore", crop=False)
    notes = ["every array but the factors has the batch as its first leg"]
    if spec.bias:
        notes.append("the bias takes the place of x and the factor that it meets")
    if given.top_k is not None:
        notes.append(f"coefficients are {given.top_k} values and indices a level")
    console.print(Text("  " + "; ".join(notes) + ".", style="dim"))
    console.print()
    console.print(Text(_regime(plan), style="bold"))
    table = make_table("step", "FLOPs", "bytes", "time", "share of time")
    table.columns[0].no_wrap = False
    table.columns[-1].justify = "left"
    for row in rows:
        share = row.time / total
        table.add_row(
            row.label if row.count == 1 else f"{row.count} × {row.label}",
            format_short(row.matmul_flops + row.elementwise_flops),
            format_memory(row.bytes_read + row.bytes_written),
            format_time(row.time),
            Text.assemble((_bar(share), "cyan"), f" {share:.0%}"),
        )
    table.add_section()
    moved = format_memory(cost.bytes_read + cost.bytes_written)
    table.add_row("all", format_short(cost.flops), moved, format_time(total), "", style="bold")
    console.print()
    console.print(table)
    console.print()
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(spec, plan, cost, given, arguments):
        facts.add_row(Text(name, style="bold"), value)
    console.print(facts)
    _, dense_flops = _dense(spec, max(plan.batch, 1))
    if dense_flops < plan.cost(itemsize=_ITEMSIZE).flops and not arguments.training:
        console.print()
        console.print(
            "Factorized is not worth it here: the dense experts need fewer FLOPs.", style="yellow"
        )
    console.print()


def _bar(share: float) -> str:
    """A bar in eighths of a character."""
    eighths = round(share * _BAR * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(_BAR)


def _facts(
    spec: LayerSpec, plan: Plan, cost: Cost, given: LayerArguments, arguments: argparse.Namespace
) -> list[tuple[str, str]]:
    sizes = {**plan.program.sizes, "b": plan.chunk}
    largest = max((prod(sizes[leg] for leg in step.legs) for step in plan.program.steps), default=0)
    entries, flops = _dense(spec, max(plan.batch, 1))
    kept = f", {format_memory(cost.saved_memory)} kept for the way back"
    gate = "" if given.gate is None else f", {given.gate.activation} gate included"
    return [
        ("counted", ("forward and backward" if arguments.training else "forward") + gate),
        (
            "FLOPs",
            f"{cost.flops:,} ({format_short(cost.matmul_flops)} in matrix products; "
            f"{format_short(cost.flops / max(plan.batch, 1))} an input)",
        ),
        (
            "memory",
            f"{format_memory(cost.peak_memory)} at the peak, largest intermediate "
            f"{format_memory(_ITEMSIZE * largest)}{kept if arguments.training else ''}",
        ),
        ("time", f"{format_time(given.device.time(cost))} predicted for {given.device.name}"),
        ("parameters", f"{cost.parameters:,}{_share(cost, given)}"),
        ("capacity", f"expert rank {spec.expert_rank:,}, expert span {spec.expert_span:,}"),
        ("dense 𝒲", f"{entries:,} parameters, {format_short(flops)} FLOPs forward"),
    ]


def _share(cost: Cost, given: LayerArguments) -> str:
    paid = given.gate_cost.parameters
    return f", {paid:,} of them ({paid / cost.parameters:.0%}) the gate's" if paid else ""


def _as_dict(
    spec: LayerSpec,
    plan: Plan,
    cost: Cost,
    rows: list[_Row],
    given: LayerArguments,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    entries, flops = _dense(spec, max(plan.batch, 1))
    return {
        "command": "plan",
        **given.to_dict(),
        "spec": spec.to_dict(),
        "training": arguments.training,
        "top_k": given.top_k,
        "prepared": plan.prepared,
        "first_batch": plan.first_batch,
        "last_batch": plan.last_batch,
        "chunk": plan.chunk,
        "shapes": {name: list(shape) for name, shape in spec.shapes.items()},
        "legs": dict(spec.network.sizes),
        "steps": [asdict(row) for row in rows],
        **cost_dict(cost),
        "gate_parameters": given.gate_cost.parameters,
        "saved_memory": cost.saved_memory,
        "time": given.device.time(cost),
        "expert_rank": spec.expert_rank,
        "expert_span": spec.expert_span,
        "dense": {"parameters": entries, "flops": flops},
    }
