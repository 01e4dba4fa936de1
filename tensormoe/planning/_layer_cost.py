"""The cost of a layer with its gate: forward, and forward with backward."""

from __future__ import annotations

from dataclasses import replace
from math import log2

from tensormoe._validation import flag
from tensormoe.errors import PlanError
from tensormoe.factorizations import BATCH, INPUT, OUTPUT, expert_leg
from tensormoe.gates import Gate, activation_workspace
from tensormoe.gates._rows import block_rows
from tensormoe.planning._cost import (
    INDEX_BYTES,
    Cost,
    StepCost,
    batch_sizes,
    contraction_cost,
    program_cost,
    program_peak,
    reverse_peak,
)
from tensormoe.planning._library import DEFAULT, Library
from tensormoe.planning._program import Program
from tensormoe.planning._reverse import reverse

__all__ = ["GATE_ITEMSIZE", "gate_cost", "gate_parameters", "gate_steps", "layer_cost"]

GATE_ITEMSIZE = 4
"""Logits and coefficients are float32 at least."""


def gate_parameters(gate: Gate, in_features: int, experts: tuple[int, ...]) -> int:
    """Entries of a gate's projections: in·ΣN_e, and ΣN_e more with a bias."""
    return (in_features + gate.bias) * sum(experts)


def gate_cost(
    gate: Gate | None, in_features: int, experts: tuple[int, ...], batch: int, itemsize: int = 4
) -> Cost:
    """The cost of a gate alone, in a forward call; nothing for None.

    >>> gate_cost(Gate(), 768, (16, 32), batch=64).parameters == 768 * (16 + 32)
    True
    """
    nothing = Program((), (), (), ())
    return layer_cost(nothing, 0, in_features, experts, batch, gate=gate, itemsize=itemsize)


def activation_flops(gate: Gate, experts: int) -> int:
    """Elementwise operations for one coefficient.

    A nominal count: layer norm 6, batch norm 2; exponential and division 4; a Newton step of
    entmax 5, with as many steps as a root search over N experts typically takes (1 + ½ log₂ N);
    top-k one comparison for every halving of N. Used for predicted time only.
    """
    norm = {"layer": 6, "batch": 2}.get(gate.normalization or "", 0)
    newton = 5 * (2 + round(log2(experts) / 2)) + 4
    active = {"softmax": 4, "top_k": 4 + round(log2(experts))}.get(gate.activation, newton)
    return norm + active


def gate_steps(
    gate: Gate, in_features: int, experts: tuple[int, ...], batch: int, itemsize: int
) -> tuple[StepCost, ...]:
    """The work of a gate: one projection and one activation a level."""
    width = max(itemsize, GATE_ITEMSIZE)
    steps = []
    for level, count in enumerate(experts):
        leg = expert_leg(level)
        sizes = {BATCH: batch, INPUT: in_features, leg: count}
        label = f"gate {level}: linear ({BATCH} {INPUT}) × ({INPUT} {leg}) → ({BATCH} {leg})"
        legs = ((BATCH, INPUT), (INPUT, leg))
        steps.append(contraction_cost(label, legs, (BATCH, leg), sizes, itemsize))
        entries = batch * count
        if gate.bias:
            steps.append(
                StepCost(f"gate {level}: bias", 0, entries, width * entries, width * entries)
            )
        work = entries * activation_flops(gate, count)
        name = f"gate {level}: {gate.activation}"
        steps.append(StepCost(name, 0, work, width * entries, width * entries))
    return tuple(steps)


def gate_backward_steps(
    gate: Gate, in_features: int, experts: tuple[int, ...], batch: int, itemsize: int
) -> tuple[StepCost, ...]:
    """The work of a gate's way back: gradients of logits, projection and input a level."""
    width = max(itemsize, GATE_ITEMSIZE)
    steps = []
    for level, count in enumerate(experts):
        leg = expert_leg(level)
        sizes = {BATCH: batch, INPUT: in_features, leg: count}
        entries = batch * count
        rows, columns, table = (BATCH, INPUT), (BATCH, leg), (INPUT, leg)
        name = f"gate {level}: {gate.activation}, backward"
        steps.append(StepCost(name, 0, 12 * entries, 3 * width * entries, width * entries))
        for inputs, output in (((rows, columns), table), ((columns, table), rows)):
            label = f"gate {level}: linear, backward → ({' '.join(output)})"
            steps.append(contraction_cost(label, inputs, output, sizes, itemsize))
        entries = batch * in_features
        label = f"gate {level}: add to the input's gradient"
        steps.append(StepCost(label, 0, entries, 2 * itemsize * entries, itemsize * entries))
    return tuple(replace(step, backward=True) for step in steps)


def layer_cost(
    program: Program,
    parameters: int,
    in_features: int,
    experts: tuple[int, ...],
    batch: int,
    *,
    gate: Gate | None = None,
    training: bool = False,
    itemsize: int = 4,
    library: Library = DEFAULT,
) -> Cost:
    """The cost of one call of a layer.

    Args:
        program: of the layer's contraction.
        parameters: of the layer without its gate.
        in_features: size of the gate's input.
        experts: one size a level.
        batch: number of inputs.
        gate: counted along if given; without one, coefficients belong to the caller.
        training: forward and backward with all gradients, instead of forward alone.
        itemsize: bytes an entry.
        library: how the array library runs a layer.
    """
    flag(training, "training", PlanError)
    sizes = batch_sizes(program, batch)
    steps = program_cost(program, sizes, itemsize)
    width = max(itemsize, GATE_ITEMSIZE)
    owned = [
        slot
        for slot, operand in enumerate(program.operands)
        if gate is not None and operand.name.startswith(("coefficients_", "indices_"))
    ]
    routing = sum(
        batch * (sizes[leg]) * (INDEX_BYTES if operand.role == "indices" else width)
        for operand in (program.operands[slot] for slot in owned)
        for leg in operand.legs[1:]
    )
    peak_gate = 0
    if gate is not None:
        parameters += gate_parameters(gate, in_features, experts)
        steps = gate_steps(gate, in_features, experts, batch, itemsize) + steps
        peak_gate = gate_peak(gate, in_features, experts, batch, itemsize, library, training)
    if not training:
        peak = program_peak(program, sizes, itemsize, owned=owned)
        return Cost(parameters, steps, max(peak_gate, peak))
    back = reverse(program)
    back_sizes = batch_sizes(back.program, batch)
    steps += program_cost(back.program, back_sizes, itemsize, "backward ")
    kept = [slot for slot in back.saved if slot >= len(program.operands)]
    forward = program_peak(program, sizes, itemsize, kept=kept)
    saved, backward = reverse_peak(back, program, sizes, itemsize, library)
    result = itemsize * batch * sizes[OUTPUT]
    held, after = routing, 0
    if gate is not None:
        steps += gate_backward_steps(gate, in_features, experts, batch, itemsize)
        # logits, and coefficients once more where the experts take them in a narrower type
        held += (width + (itemsize if itemsize < width else 0)) * batch * sum(experts)
        # the way back through the gate, while the program's gradients are all there
        gradients = sum(
            itemsize * _volume(back.program, slot, back_sizes) for slot in back.program.outputs
        )
        after = (0 if library.frees_saved else saved) + gradients
        after += gate_vjp_peak(gate, in_features, experts, batch, itemsize, library)
    peak = max(peak_gate, held + forward, held + result + max(backward, after))
    return Cost(parameters, steps, peak, saved + held)


def _volume(program: Program, slot: int, sizes: dict[str, int]) -> int:
    volume = 1
    for leg in program.legs[slot]:
        volume *= sizes[leg]
    return volume


def gate_peak(
    gate: Gate,
    in_features: int,
    experts: tuple[int, ...],
    batch: int,
    itemsize: int,
    library: Library,
    training: bool,
) -> int:
    """Bytes live at the worst moment while coefficients are made, level by level."""
    width = max(itemsize, GATE_ITEMSIZE)
    # input and projection of a narrower layer are widened
    extra = width * (itemsize < width)
    peak, done = 0, extra * batch * in_features
    for count in experts:
        logits = width * batch * count
        workspace = activation_workspace(
            gate, batch, count, width, library.row_block_bytes, library.picks_entries
        )
        peak = max(peak, done + logits + workspace + extra * in_features * count)
        done += width * batch * count
        # training keeps the logits for the way back
        done += logits if training else 0
    return peak


def gate_vjp_peak(
    gate: Gate,
    in_features: int,
    experts: tuple[int, ...],
    batch: int,
    itemsize: int,
    library: Library,
) -> int:
    """Bytes live at the worst moment of the way back through the gate, level by level."""
    width = max(itemsize, GATE_ITEMSIZE)
    extra = width * (itemsize < width)
    rows = width * batch * in_features
    peak, done = 0, extra * batch * in_features
    for level, count in enumerate(experts):
        inner = width * batch * count
        workspace = _activation_vjp_workspace(gate, batch, count, width, library.row_block_bytes)
        # before and after the projection's gradient is made
        before = workspace + extra * batch * count
        table = (itemsize + 2 * extra) * in_features * count
        peak = max(peak, done + rows * (level > 0) + max(before, inner + table + rows))
        done += itemsize * (in_features + gate.bias) * count
    return peak


def _activation_vjp_workspace(
    gate: Gate, batch: int, count: int, width: int, row_block_bytes: int | None
) -> int:
    """Bytes that the way back through one level's activation holds, its result included."""
    block = block_rows(batch, count, width, row_block_bytes)
    few = gate.normalization == "layer" and gate.effective_alpha in (1.0, 1.5)
    arrays, flags, whole = (2, 0, 0) if few else _VJP_ARRAYS[gate.normalization or ""]
    # the result of several blocks is joined in an array of its own
    whole += block < batch
    return (arrays * width + flags) * block * count + whole * width * batch * count


# normalization -> block-sized arrays and booleans, and whole arrays, that its way back holds
_VJP_ARRAYS = {"layer": (5, 0, 0), "batch": (5, 1, 1), "": (3, 1, 0)}
