"""Plans for people, as text and as Markdown, for programs, and as pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensormoe._drawing import Role, network_lines
from tensormoe._format import fill, format_bytes, format_count, format_time
from tensormoe.choosing._explore import cost_dict
from tensormoe.choosing._selected import step_list
from tensormoe.cli._columns import Column, csv_text, markdown_text
from tensormoe.cli._devices import legs_dict, legs_table
from tensormoe.cli._planned import Planned
from tensormoe.factorizations import Network
from tensormoe.planning._describe import cost_facts, dense_size, fact_lines, plan_facts, step_rows

if TYPE_CHECKING:
    from rich.console import Console

_STYLES: dict[Role, str] = {
    "data": "cyan",
    "factor": "yellow",
    "result": "bold green",
    "leg": "bold",
    "wire": "dim",
}
_STEP_COLUMNS = (
    Column("label", "step"),
    Column("count", "count"),
    Column("flops", "FLOPs", format_count),
    Column("bytes", "bytes", format_bytes, "B"),
    Column("time", "time", format_time, "s"),
)
_PLAIN_COLUMNS = (
    *_STEP_COLUMNS[:2],
    Column("matmul_flops", "FLOPs in matrix products"),
    Column("elementwise_flops", "elementwise FLOPs"),
    Column("bytes_read", "read", unit="B"),
    Column("bytes_written", "written", unit="B"),
    _STEP_COLUMNS[-1],
)


def show_plan(console: Console, planned: Planned) -> None:
    """Show every layer's network, steps and totals, and of a block the totals of all of it."""
    from rich.text import Text

    asked = planned.request
    for name in planned.plans:
        if len(planned.plans) > 1:
            console.print()
            console.rule(Text(f"the {name} layer", style="bold"), align="left")
        title, *lines = _described(planned, name, console.width)
        console.print()
        console.print(Text(title, style="bold"))
        console.print()
        _draw(console, planned.layers[name].spec.network)
        for note in fill("; ".join(_notes(planned, name)) + ".", console.width - 2, ""):
            console.print(Text(f"  {note}", style="dim"))
        console.print()
        for line in lines:
            told = Text(line)
            told.highlight_regex("[█▏▎▍▌▋▊▉]+", "cyan")
            console.print(told, soft_wrap=True)
        console.print()
    if len(planned.plans) > 1:
        console.rule(Text("the block", style="bold"), align="left")
        console.print()
        for line in _block_lines(planned, console.width):
            console.print(line, soft_wrap=True)
        console.print()
    if planned.cuts is not None:
        counted = "forward and backward" if asked.training else "forward"
        said = f"Legs to cut, {counted}, without the gate, inputs and outputs whole everywhere:"
        console.print(Text(said, style="bold"))
        console.print()
        console.print(legs_table(*planned.cuts))
        console.print()


def plan_markdown(planned: Planned) -> str:
    """Every layer's steps as a table, and its totals as a list."""
    asked, parts = planned.request, []
    for name, plan in planned.plans.items():
        cost = plan.cost(planned.gate_of(name), training=asked.training, itemsize=asked.itemsize)
        title, *_ = _described(planned, name, None)
        rows = [[column.cell(row) for column in _STEP_COLUMNS] for row in _steps(planned, cost)]
        table = markdown_text([column.head for column in _STEP_COLUMNS], rows)
        facts = plan_facts(
            plan,
            cost,
            asked.itemsize,
            planned.gate_of(name),
            asked.training,
            asked.device,
        )
        parts.append(f"**{title}**\n\n{table}\n" + _facts_list(facts))
    if len(parts) > 1:
        facts = [("block", _block_title(planned)), *_block_facts(planned)]
        parts.append(_facts_list(facts))
    return "\n".join(parts)


def plan_csv(planned: Planned) -> str:
    """The steps of all that is planned, one a line."""
    return csv_text(_PLAIN_COLUMNS, _steps(planned, planned.cost))


def plan_dict(planned: Planned) -> dict[str, Any]:
    """A plan in plain values."""
    asked, cost = planned.request, planned.cost
    values: dict[str, Any] = {
        "request": asked.to_dict(),
        "top_k": planned.top_k,
        "layers": [_layer(planned, name) for name in planned.plans],
        "steps": step_list(cost, asked.device),
        **cost_dict(cost),
        "gate_parameters": planned.gate_cost.parameters,
        "time": asked.device.time(cost),
    }
    if planned.cuts is not None:
        values |= legs_dict(*planned.cuts)
    elif asked.devices > 1:
        values |= {"devices": asked.devices, "leg": "hidden"}
    if planned.cuts is not None or asked.devices > 1:
        values |= {
            "communicated": cost.communicated,
            "collectives": [asdict(each) for each in cost.collectives],
        }
    return values


def save_networks(planned: Planned, path: Path) -> Iterator[Path]:
    """Draw the network of every layer; of a block, each in a file of its own."""
    for name, layer in planned.layers.items():
        several = len(planned.layers) > 1
        target = path.with_name(f"{path.stem}-{name}{path.suffix}") if several else path
        layer.spec.draw().save(target)
        yield target


def _described(planned: Planned, name: str, width: int | None) -> list[str]:
    asked = planned.request
    plan, gate = planned.plans[name], planned.gate_of(name)
    text = plan.describe(
        gate,
        training=asked.training,
        itemsize=asked.itemsize,
        roofline=asked.device,
        width=width,
    )
    return text.splitlines()


def _draw(console: Console, network: Network) -> None:
    """The network as text, or where it is too wide its arrays with their legs."""
    from rich.text import Text

    drawn = network_lines(network)
    widest = max(sum(len(part) for part, _ in wires) for term in drawn for wires in term)
    if widest > console.width:
        for factor in network.factors:
            legs = " ".join(f"{leg}={network.sizes[leg]}" for leg in factor.legs)
            for line in fill(f"  {factor.name}: {legs}", console.width, "    "):
                console.print(Text(line, style=_STYLES["factor"]))
        return
    for index, term in enumerate(drawn):
        if index:
            console.print(Text("\n  plus\n", style="bold"))
        for wires in term:
            text = Text.assemble(*((part, _STYLES[role]) for part, role in wires))
            text.rstrip()
            console.print(text, no_wrap=True, overflow="ignore", crop=False)


def _notes(planned: Planned, name: str) -> list[str]:
    notes = ["every array but the factors has the batch as its first leg"]
    if planned.layers[name].spec.bias:
        notes.append("the bias takes the place of x and the factor that it meets")
    if planned.request.kind == "embedding":
        notes.append("x is one id per input")
    if planned.top_k is not None:
        notes.append(f"coefficients are {planned.top_k} values and indices per level")
    return notes


def _block_title(planned: Planned) -> str:
    asked = planned.request
    sizes = f"{asked.in_features} → {asked.hidden_features} → {asked.out_features}"
    counted = "forward and backward" if asked.training else "forward"
    gate = "without a gate" if asked.gate is None else f"{asked.gate.activation} gate included"
    part = f", on each of {asked.devices} devices" if asked.devices > 1 else ""
    return f"{sizes}, {counted}, activation and {gate}{part}"


def _block_facts(planned: Planned) -> list[tuple[str, str]]:
    """Totals of a block, and the steps that belong to neither layer."""
    asked = planned.request
    own = {
        label
        for name, plan in planned.plans.items()
        for label in step_rows(
            plan.cost(planned.gate_of(name), training=asked.training, itemsize=asked.itemsize)
        )
    }
    between = [
        (
            "between",
            f"{step['label']}: {format_count(step['flops'])} FLOPs, {format_bytes(step['bytes'])}, "
            f"{format_time(step['time'])}",
        )
        for step in _steps(planned, planned.cost)
        if step["label"] not in own
    ]
    return [*between, *cost_facts(planned.cost, asked.batch, asked.device)]


def _block_lines(planned: Planned, width: int) -> list[str]:
    title = fill(_block_title(planned), width)
    return [*title, "", *fact_lines(_block_facts(planned), width)]


def _facts_list(facts: list[tuple[str, str]]) -> str:
    return "".join(f"- {name}: {value}\n" for name, value in facts)


def _steps(planned: Planned, cost: Any) -> list[dict[str, Any]]:
    """Steps with their totals of FLOPs and bytes."""
    return [
        {
            **step,
            "flops": step["matmul_flops"] + step["elementwise_flops"],
            "bytes": step["bytes_read"] + step["bytes_written"],
        }
        for step in step_list(cost, planned.request.device)
    ]


def _layer(planned: Planned, name: str) -> dict[str, Any]:
    plan, spec = planned.plans[name], planned.layers[name].spec
    entries, flops = dense_size(plan)
    return {
        "name": name,
        "spec": spec.to_dict(),
        "shapes": {name: list(shape) for name, shape in spec.shapes.items()},
        "legs": dict(spec.network.sizes),
        "prepared": plan.prepared,
        "first_batch": plan.first_batch,
        "last_batch": plan.last_batch,
        "chunk": plan.chunk,
        "expert_rank": spec.expert_rank,
        "expert_span": spec.expert_span,
        "dense": {"parameters": entries, "flops": flops},
    }
