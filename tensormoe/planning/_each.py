"""Programs that run every expert: on rows of its own, as many for each, or on the same rows."""

from __future__ import annotations

from functools import lru_cache

from tensormoe.factorizations import BATCH, INPUT, OUTPUT, Network
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
    starts, programs = [0], [_program(network, _ROWS[0], same_rows)]
    for rows in _ROWS[1:]:
        program = _program(network, rows, same_rows)
        if program != programs[-1]:
            starts.append(rows)
            programs.append(program)
    return Regimes(tuple(starts), tuple(programs))


def _program(network: Network, rows: int, same_rows: bool) -> Program:
    experts = network.expert_legs
    lead = (BATCH, INPUT) if same_rows else (*experts, BATCH, INPUT)
    operands = [Operand("x", lead, "data")]
    operands += [Operand(each.name, each.legs, "factor") for each in network.all_factors]
    slots = {operand.name: slot for slot, operand in enumerate(operands)}
    builder = Builder(tuple(operands), {**network.sizes, BATCH: rows})
    output = (*experts, BATCH, OUTPUT)
    total: int | None = None
    for term in network.terms:
        made = builder.network([0, *(slots[each.name] for each in term.factors)], output)
        total = made if total is None else builder.plus(total, made)
        if term.bias is not None:
            # one row per expert, and so next to nothing beside the others
            legs = {leg for each in term.bias_factors for leg in each.legs}
            kept = tuple(leg for leg in output if leg in legs)
            total = builder.plus(
                total, builder.network([slots[each.name] for each in term.bias_factors], kept)
            )
    assert total is not None
    return builder.finish(total)
