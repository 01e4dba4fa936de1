"""The cost of a layer with its gate: forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from tensormoe._validation import flag
from tensormoe.errors import PlanError
from tensormoe.factorizations import Leg
from tensormoe.planning._cost import (
    INDEX_BYTES,
    Cost,
    StepCost,
    batch_sizes,
    program_cost,
    program_peak,
)
from tensormoe.planning._gate_cost import GATE_ITEMSIZE, GateCall
from tensormoe.planning._library import DEFAULT, Library
from tensormoe.planning._program import Program
from tensormoe.planning._reverse import Reverse, reverse

if TYPE_CHECKING:
    from tensormoe.gates import Gate


@dataclass(frozen=True)
class ProgramCall:
    """One call of a program, and of its reverse program.

    Args:
        program: what runs.
        batch: number of inputs.
        itemsize: bytes per entry.
        library: how the array library runs it.
    """

    program: Program
    batch: int
    itemsize: int
    library: Library = DEFAULT

    @cached_property
    def sizes(self) -> dict[Leg, int]:
        """The size of every leg."""
        return batch_sizes(self.program, self.batch)

    @cached_property
    def reverse(self) -> Reverse:
        """The program of the gradients."""
        return reverse(self.program)

    @property
    def result(self) -> int:
        """Bytes of the results."""
        return sum(self._bytes(self.program, slot) for slot in self.program.outputs)

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        back = self.reverse.program
        return sum(self._bytes(back, slot) for slot in back.outputs)

    @property
    def saved(self) -> int:
        """Bytes of intermediates that are saved for the backward pass."""
        return sum(self._bytes(self.program, slot) for slot in self._kept)

    def steps(self) -> tuple[StepCost, ...]:
        """Work of a forward call."""
        return program_cost(self.program, self.sizes, self.itemsize)

    def backward_steps(self) -> tuple[StepCost, ...]:
        """Work of a backward pass."""
        back = self.reverse.program
        return program_cost(back, batch_sizes(back, self.batch), self.itemsize, "backward ")

    def peak(self, owned: Collection[int] = (), *, training: bool = False) -> int:
        """Bytes live at the peak of a forward call, operands left out unless ``owned``."""
        kept = self._kept if training else ()
        return program_peak(
            self.program, self.sizes, self.itemsize, owned=owned, kept=kept, library=self.library
        )

    def backward_peak(self) -> int:
        """Bytes live at the peak of a backward pass, beyond what is saved for it."""
        back = self.reverse.program
        return program_peak(back, self.sizes, self.itemsize, library=self.library)

    @property
    def _kept(self) -> tuple[int, ...]:
        # the caller holds the operands
        return tuple(each for each in self.reverse.saved if each >= len(self.program.operands))

    def _bytes(self, program: Program, slot: int) -> int:
        return self.itemsize * prod(self.sizes[leg] for leg in program.legs[slot])


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
        experts: one size per level.
        batch: number of inputs.
        gate: included in the count if given; without one, coefficients belong to the caller.
        training: forward and backward with all gradients, instead of forward alone.
        itemsize: bytes per entry.
        library: how the array library runs a layer.
    """
    flag(training, "training", PlanError)
    made = GateCall(gate, in_features, experts, batch, itemsize, library)
    call = ProgramCall(program, batch, itemsize, library)
    parameters += made.parameters
    steps = made.steps() + call.steps()
    routing = {
        slot: prod(call.sizes[leg] for leg in operand.legs)
        * (INDEX_BYTES if operand.role == "indices" else max(itemsize, GATE_ITEMSIZE))
        for slot, operand in enumerate(program.operands)
        if gate is not None and operand.name.startswith(("coefficients_", "indices_"))
    }
    if not training:
        if library.holds_coefficients:
            mixing = sum(routing.values()) + call.peak()
        else:
            mixing = call.peak(tuple(routing))
        return Cost(parameters, steps, max(made.peak(), mixing), calls=1)
    held = sum(routing.values()) + made.saved
    # the backward pass through the gate, while the program's gradients are all live
    after = (0 if library.frees_saved else call.saved) + call.gradients + made.backward_peak()
    backward = call.result + max(call.saved + call.backward_peak(), after if gate else 0)
    peak = max(made.peak(training=True), held + max(call.peak(training=True), backward))
    steps += call.backward_steps() + made.backward_steps()
    return Cost(parameters, steps, peak, call.saved + held, calls=1)
