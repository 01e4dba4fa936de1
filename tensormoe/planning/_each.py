"""Programs that run every expert: on rows of its own, as many for each, or on the same rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from tensormoe.factorizations import BATCH, INPUT, OUTPUT, Leg, Network, expert_leg
from tensormoe.planning._program import Operand, Program
from tensormoe.planning._regimes import Regimes
from tensormoe.planning._tree import Builder

# rows per expert that a program is sought for; between them the cheapest path hardly changes
_ROWS = (1, 16, 256, 4096)


@lru_cache(maxsize=256)
def each_regimes(network: Network, *, same_rows: bool = False) -> Regimes:
    """The programs from ``x`` (experts…, rows, in) to (experts…, rows, out), by rows per expert.

    The batch of these programs is the rows of one expert. Dense experts are one batched product.

    Args:
        network: of the layer.
        same_rows: whether ``x`` is (rows, in), which every expert runs: what does not depend on
            the expert is computed once.
    """
    lead = () if same_rows else network.expert_legs
    return _regimes(lambda rows: _program(network, rows, lead, network.expert_legs))


@lru_cache(maxsize=256)
def level_regimes(network: Network, level: int) -> Regimes:
    """The programs from ``x`` (rows, in) to the outputs (N_e, rows, out) of a level's experts.

    An expert's output is mixed by the coefficients of the other levels, operands of the program.

    Args:
        network: of the layer.
        level: whose experts are kept apart.
    """
    return _regimes(lambda rows: _program(network, rows, (), (expert_leg(level),)))


def _regimes(program: Callable[[int], Program]) -> Regimes:
    starts, programs = [0], [program(_ROWS[0])]
    for rows in _ROWS[1:]:
        made = program(rows)
        if made != programs[-1]:
            starts.append(rows)
            programs.append(made)
    return Regimes(tuple(starts), tuple(programs))


def _program(network: Network, rows: int, lead: tuple[Leg, ...], apart: tuple[Leg, ...]) -> Program:
    """The program for one number of rows.

    Args:
        network: of the layer.
        rows: of one expert.
        lead: expert legs of the input.
        apart: expert legs of the output; other levels are mixed by coefficients.
    """
    mixed = [level for level, leg in enumerate(network.expert_legs) if leg not in apart]
    operands = [Operand("x", (*lead, BATCH, INPUT), "data")]
    operands += [
        Operand(f"coefficients_{level}", (BATCH, expert_leg(level)), "data") for level in mixed
    ]
    data = [*range(1, len(operands))]
    operands += [Operand(each.name, each.legs, "factor") for each in network.all_factors]
    slots = {operand.name: slot for slot, operand in enumerate(operands)}
    builder = Builder(tuple(operands), {**network.sizes, BATCH: rows})
    output = (*apart, BATCH, OUTPUT)
    results = []
    for term in network.terms:
        results.append(_kept(builder, [0, *data, *(slots[f.name] for f in term.factors)], output))
        if term.bias is not None:
            # one row per expert, and so next to nothing beside the others
            of_bias = [*data, *(slots[factor.name] for factor in term.bias_factors)]
            results.append(_kept(builder, of_bias, output))
    # what is the same for all experts is added to each of them
    total = max(results, key=lambda slot: len(builder.legs[slot]))
    results.remove(total)
    if builder.legs[total] != output:
        total = builder.add("expand", (total,), output)
    for slot in results:
        total = builder.plus(total, slot)
    return builder.finish(total)


def _kept(builder: Builder, slots: list[int], output: tuple[Leg, ...]) -> int:
    """Slots contracted into those of some legs that they have."""
    found = {leg for slot in slots for leg in builder.legs[slot]}
    return builder.network(slots, tuple(leg for leg in output if leg in found))
