"""Networks and plans, as pictures and as text."""

from __future__ import annotations

from tensormoe._drawing import Drawing, network_lines
from tensormoe._spec import LayerSpec
from tensormoe._validation import instance
from tensormoe.errors import PlanError, SpecError
from tensormoe.planning import Plan


def draw_network(spec: LayerSpec) -> Drawing:
    """A picture of the network that stores 𝒲: ``spec.draw()``.

    Factors are boxes with their names and shapes, bonds edges with their sizes, and legs of three
    ends or more meet in a dot. Open legs are coloured: experts orange, input and output green. A
    bias stands below the factor whose place it takes for the constant input 1. The terms of a sum
    stand side by side.

    Args:
        spec: of the layer.

    Raises:
        SpecError: not a spec.
    """
    instance(spec, LayerSpec, "spec", "a LayerSpec", SpecError)
    return spec.draw()


def draw_plan(plan: Plan, *, itemsize: int = 4) -> Drawing:
    """A picture of a contraction in order, with sizes, memory and FLOPs: ``plan.draw()``.

    Args:
        plan: of a layer.
        itemsize: bytes per entry: 4 for float32.

    Raises:
        PlanError: not a plan, or an itemsize that is not a positive integer.
    """
    instance(plan, Plan, "plan", "a Plan", PlanError)
    return plan.draw(itemsize=itemsize)


def network_text(spec: LayerSpec) -> str:
    """A network as lines of text: a wire for every array, a rail for every leg.

    Args:
        spec: of the layer.

    Raises:
        SpecError: not a spec.

    >>> from tensormoe import CP
    >>> print(network_text(LayerSpec(8, 6, experts=4, factorization=CP(rank=3))))
                       n0   r    i    o
                       4    3    8    6
      coefficients_0 ──●
                       │
      expert_0       ──●────●
                            │
      x              ───────┼────●
                            │    │
      input          ───────●────●
                            │
      output         ───────●─────────●
                                      │
      y              ─────────────────●
    """
    instance(spec, LayerSpec, "spec", "a LayerSpec", SpecError)
    terms = network_lines(spec.network)
    texts = [["".join(part for part, _ in line).rstrip() for line in term] for term in terms]
    return "\n\n  plus\n\n".join("\n".join(lines) for lines in texts)
