"""The cost of a block: two layers, one gate for both, and an activation between."""

from __future__ import annotations

from tensormoe._validation import flag
from tensormoe.errors import PlanError
from tensormoe.gates import Gate
from tensormoe.planning._cost import (
    Cost,
    StepCost,
    batch_sizes,
    program_cost,
    program_peak,
    reverse_peak,
)
from tensormoe.planning._layer_cost import (
    GATE_ITEMSIZE,
    gate_backward_steps,
    gate_parameters,
    gate_peak,
    gate_steps,
    gate_vjp_peak,
)
from tensormoe.planning._lowering import volume
from tensormoe.planning._plan import Plan
from tensormoe.planning._program import Program
from tensormoe.planning._reverse import reverse

__all__ = ["block_cost", "block_held"]

ACTIVATION_FLOPS = 8
"""Elementwise operations that one entry of an activation counts as, a nominal figure between those
of relu and of gelu; its derivative counts as many. Used for predicted time only."""


def block_cost(
    first: Plan,
    second: Plan,
    gate: Gate | None = None,
    *,
    gated: bool = False,
    drop: float = 0.0,
    keeps_input: bool = True,
    frees: bool = False,
    training: bool = False,
    itemsize: int = 4,
    row_block_bytes: int | None = None,
    picks_entries: bool = True,
    copies_transposed: bool = False,
) -> Cost:
    """The cost of one call of a block.

    The coefficients are live until the second layer has run, and so is what the first layer
    returns until the activation has; in training both arrays around the activation are kept.

    Args:
        first: how the first layer runs a batch.
        second: how the second one runs the same batch.
        gate: what makes the coefficients of both; without one, they belong to the caller.
        gated: whether the activation is that of one half of what the first layer returns, times
            the other half.
        drop: share of entries dropped in training, behind the activation and the second layer.
        keeps_input: whether the derivative of the activation is made of its input, and not of its
            result, as a library may do for relu and tanh.
        frees: whether the backward pass lets go of what it does not need any more, as that of
            libraries with automatic differentiation does.
        training: forward and backward with all gradients, instead of forward alone.
        itemsize: bytes per entry: 4 for float32.
        row_block_bytes: the backend's, for the temporaries of the gate.
        picks_entries: the backend's, for the same.
        copies_transposed: whether the library copies a transposed first operand of large products.
    """
    flag(training, "training", PlanError)
    networks, batch = (first.network, second.network), first.batch
    in_features, experts = first.network.in_features, first.network.experts
    programs = first.program, second.program
    sizes = [batch_sizes(program, batch) for program in programs]
    forwards = [program_cost(*each, itemsize) for each in zip(programs, sizes, strict=True)]
    before = batch * first.network.out_features
    after = batch * second.network.in_features
    result = batch * second.network.out_features
    middle = _middle_steps(before, after, gated, itemsize)
    parameters = sum(network.num_parameters for network in networks)
    width = max(itemsize, GATE_ITEMSIZE)
    coefficients, before_second = block_held(
        gate, experts, second.network.in_features, batch, itemsize
    )
    peak_gate = 0
    gate_forward: tuple[StepCost, ...] = ()
    gate_options = (in_features, experts, batch, itemsize)
    if gate is not None:
        parameters += gate_parameters(gate, in_features, experts)
        gate_forward = gate_steps(gate, *gate_options)
        peak_gate = gate_peak(gate, *gate_options, row_block_bytes, picks_entries, training)
    steps = (*gate_forward, *forwards[0], *middle, *forwards[1])
    # one more array while a gated activation is multiplied
    between = itemsize * (before + after + (after if gated else 0))
    if not training:
        peaks = [program_peak(*each, itemsize) for each in zip(programs, sizes, strict=True)]
        most = max(coefficients + max(peaks[0], between), before_second + peaks[1])
        return Cost(parameters, steps, max(peak_gate, most))

    backs = [reverse(program) for program in programs]
    kept = [
        [slot for slot in back.saved if slot >= len(program.operands)]
        for back, program in zip(backs, programs, strict=True)
    ]
    peaks = [
        program_peak(program, each, itemsize, kept=slots)
        for program, each, slots in zip(programs, sizes, kept, strict=True)
    ]
    ways = [
        reverse_peak(back, program, each, itemsize, copies_transposed=copies_transposed)
        for back, program, each in zip(backs, programs, sizes, strict=True)
    ]
    (saved_first, way_first), (saved_second, way_second) = ways
    held = coefficients
    if gate is not None:
        # logits, and coefficients once more where the experts take them in a narrower type
        held += (width + (itemsize if itemsize < width else 0)) * batch * sum(experts)
    one, two, output = (itemsize * entries for entries in (before, after, result))
    # besides the second layer's input: what the derivative of the activation needs, and the
    # dropout mask
    around = one if keeps_input or gated else two if drop else 0
    around += (two if gated else 0) + (two if drop else 0)
    whole = held + saved_first + around + two + saved_second + output * (2 if drop else 1)
    # what was returned before entries were dropped
    whole += output if drop and not frees else 0
    first_gradients, second_gradients = (
        itemsize * sum(_entries(back.program, slot, batch) for slot in back.program.outputs)
        for back in backs
    )
    if frees:
        # each part of the backward pass frees the arrays that it was computed from
        rest = held + output + second_gradients
        stages = (rest + saved_first + around, rest + saved_first - two, rest - two)
    else:
        rest = whole + second_gradients
        # the derivative of the activation, or the gradients of both halves before they are joined
        stages = (rest + (2 * two if gated else two), rest, rest)
    moments = [
        peak_gate,
        held + peaks[0],
        held + saved_first + between + (2 * two if drop else 0),
        held + saved_first + around + two + peaks[1],
        whole + (output if drop and not frees else 0) + way_second - saved_second,
        stages[0] + one,
        stages[1] + one + way_first - saved_first,
    ]
    back_steps = [
        program_cost(back.program, batch_sizes(back.program, batch), itemsize, "backward ")
        for back in backs
    ]
    way = _middle_backward_steps(before, after, gated, itemsize)
    steps = (*steps, *back_steps[1], *way, *back_steps[0])
    if gate is not None:
        steps += gate_backward_steps(gate, *gate_options)
        through = gate_vjp_peak(gate, *gate_options, row_block_bytes)
        # gradients by coefficients are those of both layers, added
        moments.append(stages[2] + first_gradients + coefficients + through)
    return Cost(parameters, steps, max(moments), whole - output)


def block_held(
    gate: Gate | None, experts: tuple[int, ...], hidden: int, batch: int, itemsize: int
) -> tuple[int, int]:
    """Bytes of a block that are live all the while each of its layers runs, in a forward call.

    They are the coefficients for the first layer, and for the second its input besides.
    """
    width = max(itemsize, GATE_ITEMSIZE)
    coefficients = 0 if gate is None else width * batch * sum(experts)
    return coefficients, coefficients + itemsize * batch * hidden


def _entries(program: Program, slot: int, batch: int) -> int:
    return volume(program.legs[slot], program.sizes, batch)


def _middle_steps(before: int, after: int, gated: bool, itemsize: int) -> tuple[StepCost, ...]:
    """The work between the layers."""
    read, written = itemsize * after, itemsize * after
    act = StepCost("activation", 0, ACTIVATION_FLOPS * after, read, written)
    if not gated:
        return (act,)
    return act, StepCost("gated: multiply", 0, after, 2 * read, written)


def _middle_backward_steps(
    before: int, after: int, gated: bool, itemsize: int
) -> tuple[StepCost, ...]:
    work = ACTIVATION_FLOPS * after + (2 * after if gated else 0)
    read = itemsize * (before + after)
    return (StepCost("activation, backward", 0, work, read, itemsize * before, backward=True),)
