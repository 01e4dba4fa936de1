"""Reports that people paste into an issue."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from tensormoe.planning._cost import Cost, batch_sizes

if TYPE_CHECKING:
    from tensormoe.planning._plan import Plan

__all__ = ["describe_plan", "format_bytes", "format_count"]


def format_count(number: float) -> str:
    """A count with a decimal prefix.

    >>> format_count(590592), format_count(96)
    ('590.6 k', '96')
    """
    for threshold, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= threshold:
            return f"{number / threshold:.4g} {prefix}"
    return f"{number:.4g}"


def format_bytes(number: float) -> str:
    """Bytes with a binary prefix.

    >>> format_bytes(3 * 2**20), format_bytes(12)
    ('3 MiB', '12 B')
    """
    for threshold, prefix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= threshold:
            return f"{number / threshold:.4g} {prefix}"
    return f"{number:.4g} B"


def describe_plan(plan: Plan, cost: Cost, itemsize: int) -> str:
    """Equation, steps and totals of a plan."""
    network, program = plan.network, plan.program
    bias = bool(network.biases)
    written = {each.name: f"{each.name}[{' '.join(each.legs)}]" for each in program.operands}
    data = [written[each.name] for each in program.operands if each.role != "factor"]
    equation = " + ".join(
        " · ".join([*data, *(written[each.name] for each in term.factors)])
        for term in network.terms
    )
    if bias:
        equation += ", bias added to the input mode"
    experts = " × ".join(map(str, network.experts))
    lines = [
        f"{plan.title}: {experts} experts of {network.in_features} → "
        f"{network.out_features}, {'with' if bias else 'no'} bias",
        f"y[b o] = {equation}",
        _regime(plan),
        "",
    ]
    width = max(len(step.label) for step in cost.steps)
    lines.append(f"  {'step':<{width}}  {'FLOPs':>9}  {'bytes':>9}")
    for step in cost.steps[:40]:
        work = format_count(step.matmul_flops + step.elementwise_flops)
        moved = format_bytes(step.bytes_read + step.bytes_written)
        lines.append(f"  {step.label:<{width}}  {work:>9}  {moved:>9}")
    if len(cost.steps) > 40:
        lines.append(f"  … and {len(cost.steps) - 40} more")
    sizes = batch_sizes(program, plan.chunk)
    largest = max(
        (itemsize * prod(sizes[leg] for leg in step.legs) for step in program.steps), default=0
    )
    matrix = network.in_features * network.out_features
    count = prod(network.experts)
    dense = count * (matrix + bias * network.out_features)
    inputs = max(plan.batch, 1)
    dense_flops = 2 * inputs * count * matrix
    lines += [
        "",
        f"FLOPs           {format_count(cost.flops)}  ({format_count(cost.matmul_flops)} in matrix "
        f"products; {format_count(cost.flops / inputs)} an input)",
        f"bytes moved     {format_bytes(cost.bytes_read + cost.bytes_written)}",
        f"memory          {format_bytes(cost.peak_memory)} at the peak, largest intermediate "
        f"{format_bytes(largest)}",
        f"parameters      {format_count(cost.parameters)}",
        f"capacity        expert rank {network.expert_rank}, expert span {network.expert_span}",
        f"dense 𝒲         {format_count(dense)} parameters, {format_count(dense_flops)} FLOPs "
        f"({dense_flops / max(cost.flops, 1):.3g} × this plan)",
    ]
    if dense_flops < cost.flops:
        lines.append("Factorized is not worth it here: the dense experts need fewer FLOPs.")
    return "\n".join(lines)


def _regime(plan: Plan) -> str:
    end = f"to {plan.last_batch}" if plan.last_batch is not None else "on"
    text = f"batch {plan.batch}; this path is the cheapest from {plan.first_batch} {end}"
    if plan.prepared:
        text = f"batch {plan.batch}; weight-only steps prepared beforehand"
    if plan.chunk < plan.batch:
        text += f"; in chunks of {plan.chunk}"
    return text
