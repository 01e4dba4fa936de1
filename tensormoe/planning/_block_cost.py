"""The cost of a block: two layers, one gate for both, and an activation between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensormoe._validation import flag
from tensormoe.errors import PlanError
from tensormoe.planning._collectives import block_collectives
from tensormoe.planning._cost import Cost, StepCost
from tensormoe.planning._gate_cost import GateCall
from tensormoe.planning._layer_cost import ProgramCall
from tensormoe.planning._library import DEFAULT, Library
from tensormoe.planning._plan import Plan

if TYPE_CHECKING:
    from tensormoe.gates import Gate

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
    training: bool = False,
    itemsize: int = 4,
    library: Library = DEFAULT,
) -> Cost:
    """The cost of one call of a block.

    The coefficients are live until the second layer has run, and so is the result of the first
    layer until the activation has; in training both arrays around the activation are kept.

    Args:
        first: how the first layer runs a batch.
        second: how the second one runs the same batch.
        gate: makes the coefficients of both; without one, they belong to the caller.
        gated: whether one half of the first layer's result goes through the activation, and is
            multiplied with the other half.
        drop: share of entries dropped in training, behind the activation and the second layer.
        training: forward and backward with all gradients, instead of forward alone.
        itemsize: bytes per entry: 4 for float32.
        library: how the array library runs a layer.
    """
    flag(training, "training", PlanError)
    network, batch = first.network, first.batch
    block = _Block(
        ProgramCall(first.program, batch, itemsize, library),
        ProgramCall(second.program, batch, itemsize, library),
        GateCall(gate, network.in_features, network.experts, batch, itemsize, library),
        inner=itemsize * batch * network.out_features,
        hidden=itemsize * batch * second.network.in_features,
        output=itemsize * batch * second.network.out_features,
        gated=gated,
        drop=drop > 0,
    )
    parameters = network.num_parameters + second.network.num_parameters + block.gate.parameters
    exchanged = block_collectives(
        network, second.network, batch, training=training, itemsize=itemsize
    )
    if not training:
        return Cost(parameters, block.steps(), block.peak(), collectives=exchanged, calls=1)
    steps = block.steps() + block.backward_steps()
    saved = block.saved - block.output
    return Cost(parameters, steps, block.training_peak(), saved, exchanged, calls=1)


def block_held(
    gate: Gate | None, experts: tuple[int, ...], hidden: int, batch: int, itemsize: int
) -> tuple[int, int]:
    """Bytes of a block that are live while each of its layers runs, in a forward call.

    They are the coefficients for the first layer, and for the second its input besides.
    """
    coefficients = GateCall(gate, hidden, experts, batch, itemsize).coefficients
    return coefficients, coefficients + itemsize * batch * hidden


@dataclass(frozen=True)
class _Block:
    """One call of a block.

    Args:
        first: call of the first layer.
        second: call of the second one.
        gate: call of the gate.
        inner: bytes of the first layer's result.
        hidden: bytes of the second layer's input.
        output: bytes of the second layer's result.
        gated: whether the activation's result is multiplied with the other half.
        drop: whether entries are dropped in training.
    """

    first: ProgramCall
    second: ProgramCall
    gate: GateCall
    inner: int
    hidden: int
    output: int
    gated: bool
    drop: bool

    def steps(self) -> tuple[StepCost, ...]:
        """Work of a forward call."""
        entries = self.hidden // self.first.itemsize
        work = ACTIVATION_FLOPS * entries
        between = [StepCost("activation", 0, work, self.hidden, self.hidden)]
        if self.gated:
            read = 2 * self.hidden
            between.append(StepCost("gated: multiply", 0, entries, read, self.hidden))
        return (*self.gate.steps(), *self.first.steps(), *between, *self.second.steps())

    def backward_steps(self) -> tuple[StepCost, ...]:
        """Work of a backward pass."""
        work = (ACTIVATION_FLOPS + 2 * self.gated) * (self.hidden // self.first.itemsize)
        read = self.inner + self.hidden
        middle = StepCost("activation, backward", 0, work, read, self.inner, backward=True)
        first, second = self.first.backward_steps(), self.second.backward_steps()
        return (*second, middle, *first, *self.gate.backward_steps())

    def peak(self) -> int:
        """Bytes live at the peak of a forward call."""
        first = max(self.first.peak(), self._activation)
        second = self.hidden + self.second.peak()
        return max(self.gate.peak(), self.gate.coefficients + max(first, second))

    def training_peak(self) -> int:
        """Bytes live at the peak of forward and backward."""
        return max(self.gate.peak(training=True), self._forward_peak(), self._backward_peak())

    @property
    def saved(self) -> int:
        """Bytes live between forward and backward, the result included."""
        layers = self.first.saved + self._around + self.hidden + self.second.saved
        # the dropout mask, and the result before entries were dropped
        output = self.output * (1 + self.drop + (self.drop and not self._frees))
        return self._held + layers + output

    @property
    def _frees(self) -> bool:
        return self.first.library.frees_saved

    @property
    def _held(self) -> int:
        """Bytes that the gate keeps throughout training."""
        return self.gate.coefficients + self.gate.saved

    @property
    def _activation(self) -> int:
        """Bytes around the activation; one more array while the halves are multiplied."""
        return self.inner + self.hidden * (1 + self.gated)

    @property
    def _around(self) -> int:
        """Bytes that are saved besides the second layer's input.

        They are what the derivative of the activation needs, and the dropout mask.
        """
        if self.first.library.keeps_input or self.gated:
            kept = self.inner
        else:
            kept = self.hidden if self.drop else 0
        return kept + self.hidden * (self.gated + self.drop)

    def _forward_peak(self) -> int:
        held = self._held
        saved = held + self.first.saved
        return max(
            held + self.first.peak(training=True),
            saved + self._activation + (2 * self.hidden if self.drop else 0),
            saved + self._around + self.hidden + self.second.peak(training=True),
        )

    def _backward_peak(self) -> int:
        dropped = self.output if self.drop and not self._frees else 0
        # live in the backward pass of the activation, of the first layer, and of the gate
        if self._frees:
            # each part frees the arrays that it was computed from
            gate = self._held + self.output + self.second.gradients - self.hidden
            first = gate + self.first.saved
            middle = first + self.hidden + self._around
        else:
            gate = first = self.saved + self.second.gradients
            # the derivative, or the gradients of both halves before they are joined
            middle = first + self.hidden * (1 + self.gated)
        peaks = [
            self.saved + dropped + self.second.backward_peak(),
            middle + self.inner,
            first + self.inner + self.first.backward_peak(),
        ]
        if self.gate.gate is not None:
            # gradients by coefficients are those of both layers, added
            through = self.gate.coefficients + self.gate.backward_peak()
            peaks.append(gate + self.first.gradients + through)
        return max(peaks)
