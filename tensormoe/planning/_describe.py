"""A plan as text and in figures: what people read, and paste into an issue."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from tensormoe._format import (
    Cell,
    align,
    fill,
    format_bytes,
    format_count,
    format_experts,
    format_time,
    stack,
)
from tensormoe._html import table_html
from tensormoe.factorizations import Network
from tensormoe.planning._cost import Collective, Cost, StepCost, batch_sizes
from tensormoe.planning._roofline import Roofline

if TYPE_CHECKING:
    from tensormoe.gates import Gate
    from tensormoe.planning._plan import Plan

_BAR = 12


def step_rows(cost: Cost) -> dict[str, Cost]:
    """The steps of a cost by label, in order; chunks of a batch repeat them."""
    found: dict[str, list[StepCost]] = {}
    for step in cost.steps:
        found.setdefault(step.label, []).append(step)
    return {label: Cost(0, tuple(steps), 0) for label, steps in found.items()}


def describe_plan(
    plan: Plan,
    cost: Cost,
    itemsize: int,
    gate: Gate | None = None,
    training: bool = False,
    roofline: Roofline | None = None,
    width: int | None = None,
) -> str:
    """Equation, steps and totals of a plan.

    Args:
        plan: of a layer.
        cost: of a call.
        itemsize: bytes per entry.
        gate: included in the cost, if any.
        training: whether the cost is that of forward and backward.
        roofline: the device that times are predicted for, if any.
        width: that lines are to fit, if any.
    """
    calls = _call_rows(cost, roofline)
    table = _table(cost, tuple(calls))
    if roofline is not None:
        total = roofline.time(cost)
        rows = [*calls.values(), *step_rows(cost).values(), *_exchange_rows(cost).values()]
        times = [roofline.time(row) for row in rows]
        cells = [[format_time(time), f"{_bar(time / total)} {time / total:4.0%}"] for time in times]
        heads = [["time", f"{'share of time':<{_BAR + 5}}"], *cells, [format_time(total), ""]]
        table = [[*line, *more] for line, more in zip(table, heads, strict=True)]
    head = [
        f"{plan.title}: {layer_sizes(plan.network.whole)}",
        *_cut(plan.network),
        f"y[b o] = {_equation(plan)}",
        plan_regime(plan),
    ]
    said = [
        *(part for line in head for part in fill(line, width)),
        "",
        *_table_lines(table, width),
        "",
        *fact_lines(plan_facts(plan, cost, itemsize, gate, training, roofline), width),
    ]
    # forward alone: what training and the gate add, they add to both
    if plan.network.cut is None and dense_size(plan)[1] < plan.cost(itemsize=itemsize).flops:
        told = "Factorized is not worth it here: the dense experts need fewer FLOPs."
        said += fill(told, width)
    return "\n".join(said)


def fact_lines(facts: Sequence[tuple[str, str]], width: int | None = None) -> list[str]:
    """Totals, one a line: names to the left, values in a column of their own."""
    indent = max(len(name) for name, _ in facts) + 2
    return [
        line
        for name, value in facts
        for line in fill(f"{name:<{indent}}{value}", width, " " * indent)
    ]


def cost_facts(cost: Cost, batch: int, roofline: Roofline) -> list[tuple[str, str]]:
    """Totals of a cost by name, whatever it is of."""
    facts = [
        ("FLOPs", _flops(cost, batch)),
        ("bytes moved", _moved(cost)),
        ("memory", f"{format_bytes(cost.peak_memory)} at the peak{_kept(cost)}"),
        ("parameters", f"{cost.parameters:,}"),
        ("time", f"{format_time(roofline.time(cost))} predicted for {roofline.name}"),
    ]
    return [*facts, ("communication", _communication(cost))] if cost.collectives else facts


def cost_html(cost: Cost) -> str:
    """The steps of a cost as a table."""
    note = f"{cost.parameters:,} parameters, {format_bytes(cost.peak_memory)} at the peak"
    return table_html("Cost", _table(cost), [note])


def layer_sizes(network: Network) -> str:
    """A layer's sizes in words."""
    bias = "with" if network.biases else "without"
    experts = format_experts(network.experts)
    return f"{experts} experts of {network.in_features} → {network.out_features}, {bias} bias"


def plan_regime(plan: Plan) -> str:
    """The batch of a plan, and for which others it is the same."""
    text = f"{plan.batch:,} inputs"
    if plan.chunk < plan.batch:
        text += f", {plan.chunk:,} at a time"
    if plan.prepared:
        return f"{text}; weight-only steps have run beforehand"
    end = "on" if plan.last_batch is None else f"to {plan.last_batch:,}"
    return f"{text}; this path is the cheapest from {plan.first_batch:,} {end}"


def dense_size(plan: Plan) -> tuple[int, int]:
    """Parameters of the dense experts, and FLOPs of a forward call through all of them."""
    network = plan.network.whole
    columns = prod(network.experts) * network.out_features
    flops = 2 * max(plan.batch, 1) * columns * network.in_features
    return columns * (network.in_features + bool(network.biases)), flops


def _cut(network: Network) -> list[str]:
    """The part of a layer that a plan is for, if it is not the whole."""
    cut = network.cut
    if cut is None:
        return []
    size, whole = network.sizes[cut.leg], network.whole.sizes[cut.leg]
    return [f"one of {cut.devices} devices, each with {size:,} of the {whole:,} of leg {cut.leg}"]


def _equation(plan: Plan) -> str:
    network = plan.network
    written = {each.name: f"{each.name}[{' '.join(each.legs)}]" for each in plan.program.operands}
    data = [written[each.name] for each in plan.program.operands if each.role != "factor"]
    factors = {each.name: f"{each.name}[{' '.join(each.legs)}]" for each in network.factors}
    equation = " + ".join(
        " · ".join([*data, *(factors[each.name] for each in term.factors)])
        for term in network.terms
    )
    return f"{equation}, bias added to the input mode" if network.biases else equation


def plan_facts(
    plan: Plan,
    cost: Cost,
    itemsize: int,
    gate: Gate | None,
    training: bool,
    roofline: Roofline | None,
) -> list[tuple[str, str]]:
    """Totals by name, in the order in which they are read."""
    network, program = plan.network, plan.program
    sizes = batch_sizes(program, plan.chunk)
    largest = max((prod(sizes[leg] for leg in step.legs) for step in program.steps), default=0)
    paid = cost.parameters - network.num_parameters
    counted = "forward and backward" if training else "forward"
    entries, flops = dense_size(plan)
    facts = [
        ("counted", counted if gate is None else f"{counted}, {gate.activation} gate included"),
        (
            "FLOPs",
            _flops(cost, plan.batch),
        ),
        ("bytes moved", _moved(cost)),
        (
            "memory",
            f"{format_bytes(cost.peak_memory)} at the peak, largest intermediate "
            f"{format_bytes(itemsize * largest)}{_kept(cost) if training else ''}",
        ),
        (
            "parameters",
            f"{cost.parameters:,}"
            + (f", {paid:,} of them ({paid / cost.parameters:.0%}) the gate's" if paid else ""),
        ),
        (
            "capacity",
            f"expert rank {network.whole.expert_rank:,}, expert span {network.whole.expert_span:,}",
        ),
    ]
    if network.cut is None:
        said = (
            f"{entries:,} parameters ({_times(entries, network.num_parameters)} these), "
            f"{format_count(flops)} FLOPs ({_times(flops, plan.cost().flops)} this plan, forward "
            "without a gate)"
        )
        facts.append(("dense 𝒲", said))
    else:
        facts.append(("communication", _communication(cost)))
    if roofline is not None:
        said = f"{format_time(roofline.time(cost))} predicted for {roofline.name}"
        facts.insert(4, ("time", said))
    return facts


def _kept(cost: Cost) -> str:
    saved = cost.saved_memory
    return f", {format_bytes(saved)} kept for the backward pass" if saved else ""


def _flops(cost: Cost, batch: int) -> str:
    return (
        f"{cost.flops:,} ({format_count(cost.matmul_flops)} in matrix products; "
        f"{format_count(cost.flops / max(batch, 1))} per input)"
    )


def _communication(cost: Cost) -> str:
    count = len(cost.collectives)
    if not count:
        return "none: the result is a slice of the outputs"
    return f"{format_bytes(cost.communicated)} in {count} collective{'s' if count > 1 else ''}"


def _exchange_rows(cost: Cost) -> dict[str, Cost]:
    """The collectives of a cost by label, in order; chunks of a batch repeat them."""
    found: dict[str, list[Collective]] = {}
    for each in cost.collectives:
        found.setdefault(f"{each.kind} of {each.array}", []).append(each)
    return {label: Cost(0, (), 0, collectives=tuple(same)) for label, same in found.items()}


def _call_rows(cost: Cost, roofline: Roofline | None) -> dict[str, Cost]:
    """Cost of a call whatever it computes, by label; none where that is not known."""
    if roofline is None or roofline.call_overhead is None or not cost.calls:
        return {}
    return {"call": Cost(0, (), 0, calls=cost.calls)}


def _table(cost: Cost, calls: tuple[str, ...] = ()) -> list[list[Cell]]:
    """Heads, a line for each step, and totals; lines for the call itself before the steps."""
    rows: list[list[Cell]] = [["step", "FLOPs", "bytes"]]
    rows += [[label, "", ""] for label in calls]
    for label, row in step_rows(cost).items():
        count = len(row.steps)
        named = label if count == 1 else f"{count} × {label}"
        rows.append([named, format_count(row.flops), _moved(row)])
    for label, row in _exchange_rows(cost).items():
        count = len(row.collectives)
        named = label if count == 1 else f"{count} × {label}"
        rows.append([named, "", format_bytes(row.communicated)])
    return [*rows, ["all", format_count(cost.flops), _moved(cost)]]


def _table_lines(table: list[list[Cell]], width: int | None) -> list[str]:
    """The table; where it is too wide without its bars, and then one step below another."""
    lines = ["  " + line for line in align(table)]
    if width is None or max(map(len, lines)) <= width:
        return lines
    plain = [[str(cell).replace("share of time", "share").strip() for cell in row] for row in table]
    plain = [[cell.lstrip("█▏▎▍▌▋▊▉ ") for cell in row] for row in plain]
    lines = ["  " + line for line in align(plain)]
    if max(map(len, lines)) <= width:
        return lines
    heads, *rows = plain
    return [line for row in rows for line in stack(heads, row, width)]


def _moved(cost: Cost) -> str:
    return format_bytes(cost.bytes_read + cost.bytes_written)


def _times(dense: int, own: int) -> str:
    ratio = dense / max(own, 1)
    return f"{ratio:,.0f} ×" if ratio >= 10 else f"{ratio:.2g} ×"


def _bar(share: float) -> str:
    """A bar in eighths of a character."""
    whole, rest = divmod(round(share * _BAR * 8), 8)
    return ("█" * whole + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(_BAR)
