"""Programs on weights alone: whole tensors, single experts, any contraction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from tensormoe.factorizations import INPUT, OUTPUT, Leg, Network
from tensormoe.planning._program import Operand, Program
from tensormoe.planning._tree import Builder


@lru_cache(maxsize=256)
def weight_program(network: Network, *, single: bool, bias: bool) -> Program:
    """The program that builds weights explicitly.

    Args:
        network: of the layer.
        single: one expert, from factors whose expert modes were indexed away; else all of 𝒲.
        bias: the experts' biases (experts…, out) instead of their matrices (experts…, in, out).
    """
    experts = () if single else network.expert_legs
    dropped = {*network.expert_legs} - {*experts}
    output = (*experts, *(() if bias else (INPUT,)), OUTPUT)
    terms = [
        tuple(
            Operand(factor.name, tuple(leg for leg in factor.legs if leg not in dropped), "factor")
            for factor in (term.bias_factors if bias else term.factors)
        )
        for term in network.terms
    ]
    builder = Builder(tuple(operand for term in terms for operand in term), network.sizes)
    slots = iter(range(len(builder.operands)))
    results = []
    for operands in terms:
        legs = {leg for operand in operands for leg in operand.legs}
        # what is the same for all experts of a level is added to each of them
        kept = tuple(leg for leg in output if leg in legs)
        results.append(_contracted(builder, [next(slots) for _ in operands], kept))
    results.sort(key=lambda slot: -len(builder.legs[slot]))
    total, *others = results
    if builder.legs[total] != output:
        total = builder.add("expand", (total,), output)
    for slot in others:
        total = builder.plus(total, slot)
    return builder.finish(total)


def contraction(
    operands: tuple[Operand, ...], output: tuple[Leg, ...], sizes: Mapping[Leg, int]
) -> Program:
    """The program that contracts arrays without a batch into the legs ``output``, in that order.

    Args:
        operands: what it takes.
        output: the legs to keep.
        sizes: the size of every leg.
    """
    builder = Builder(operands, sizes)
    return builder.finish(_contracted(builder, range(len(operands)), output))


def _contracted(builder: Builder, slots: Sequence[int], output: tuple[Leg, ...]) -> int:
    """The slot of a contraction of others."""
    return builder.network(slots, output)
