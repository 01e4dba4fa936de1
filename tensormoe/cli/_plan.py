"""``tensormoe plan``: how a layer runs and what that costs."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

from tensormoe import LayerSpec
from tensormoe._drawing import Role, network_lines
from tensormoe._files import check_picture
from tensormoe.choosing._words import parse_bytes, parse_rank
from tensormoe.cli._console import make_console, print_json
from tensormoe.cli._devices import cut_layers, legs_dict, legs_table, with_link
from tensormoe.cli._figures import cost_dict
from tensormoe.cli._layer_arguments import LayerArguments
from tensormoe.errors import PlanError, RankError
from tensormoe.factorizations import rank_pattern, resolve_factorization
from tensormoe.planning import Cost, CutLayer, Plan, Routing, plan_layer
from tensormoe.planning._describe import dense_size, step_rows
from tensormoe.selection import select_rank

_ITEMSIZE = 4

_Cuts = tuple[tuple[CutLayer, ...], CutLayer]

_STYLES: dict[Role, str] = {
    "data": "cyan",
    "factor": "yellow",
    "result": "bold green",
    "leg": "bold",
    "wire": "dim",
}


def run_plan(arguments: argparse.Namespace) -> None:
    """Plan a layer and show it."""
    path = None if arguments.plot is None else check_picture(arguments.plot, "--plot")
    given = LayerArguments.parse(arguments, "entmax" if arguments.top_k is None else "none")
    given = replace(given, device=with_link(given.device, arguments))
    spec = _spec(arguments, given)
    cuts = cut_layers(arguments, spec, given)
    limit = parse_bytes(arguments.memory_limit, "--memory-limit")
    if limit is not None and arguments.training:
        raise PlanError(
            "--memory-limit is for forward calls, since gradients need the whole batch; got it "
            "with --training. Drop one, or plan a smaller --batch."
        )
    plan = plan_layer(
        spec.network if cuts is None else cuts[1].network,
        given.batch,
        Routing(given.top_k),
        prepared=arguments.prepared,
        memory_limit=limit,
        gate=given.gate,
        itemsize=_ITEMSIZE,
        title=repr(spec.factorization),
    )
    if arguments.json:
        print_json(_as_dict(spec, plan, given, arguments, cuts))
    else:
        _show(spec, plan, given, arguments, cuts)
    if path is not None:
        spec.draw().save(path)
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


def _show(
    spec: LayerSpec,
    plan: Plan,
    given: LayerArguments,
    arguments: argparse.Namespace,
    cuts: _Cuts | None,
) -> None:
    console = make_console()
    from rich.text import Text

    title, *lines = plan.describe(
        given.gate, training=arguments.training, itemsize=_ITEMSIZE, roofline=given.device
    ).splitlines()
    console.print()
    console.print(Text(title, style="bold"))
    console.print()
    for index, term in enumerate(network_lines(spec.network)):
        if index:
            console.print(Text("\n  plus\n", style="bold"))
        for wires in term:
            text = Text.assemble(*((part, _STYLES[role]) for part, role in wires))
            text.rstrip()
            console.print(text, no_wrap=True, overflow="ignore", crop=False)
    notes = ["every array but the factors has the batch as its first leg"]
    if spec.bias:
        notes.append("the bias takes the place of x and the factor that it meets")
    if given.top_k is not None:
        notes.append(f"coefficients are {given.top_k} values and indices per level")
    console.print(Text("  " + "; ".join(notes) + ".", style="dim"))
    console.print()
    for line in lines:
        told = Text(line)
        told.highlight_regex("[█▏▎▍▌▋▊▉]+", "cyan")
        console.print(told, soft_wrap=True)
    console.print()
    if cuts is not None:
        counted = "forward and backward" if arguments.training else "forward"
        said = f"Legs to cut, {counted}, without the gate, inputs and outputs whole everywhere:"
        console.print(Text(said, style="bold"))
        console.print()
        console.print(legs_table(*cuts))
        console.print()


def _as_dict(
    spec: LayerSpec,
    plan: Plan,
    given: LayerArguments,
    arguments: argparse.Namespace,
    cuts: _Cuts | None,
) -> dict[str, Any]:
    entries, flops = dense_size(plan)
    cost = plan.cost(given.gate, training=arguments.training, itemsize=_ITEMSIZE)
    steps = [
        {
            "label": label,
            "count": len(row.steps),
            "matmul_flops": row.matmul_flops,
            "elementwise_flops": row.elementwise_flops,
            "bytes_read": row.bytes_read,
            "bytes_written": row.bytes_written,
            "time": given.device.time(row),
        }
        for label, row in step_rows(cost).items()
    ]
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
        "steps": steps,
        **cost_dict(cost),
        "gate_parameters": given.gate_cost.parameters,
        "saved_memory": cost.saved_memory,
        "time": given.device.time(cost),
        "expert_rank": spec.expert_rank,
        "expert_span": spec.expert_span,
        "dense": {"parameters": entries, "flops": flops},
        **({} if cuts is None else _exchanged(cost, cuts)),
    }


def _exchanged(cost: Cost, cuts: _Cuts) -> dict[str, Any]:
    return {
        **legs_dict(*cuts),
        "communicated": cost.communicated,
        "collectives": [asdict(each) for each in cost.collectives],
    }
