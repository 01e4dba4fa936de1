"""The cost of a gate: projections, activations, and the memory that they take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log2
from typing import TYPE_CHECKING

from tensormoe.factorizations import BATCH, INPUT, Leg, expert_leg
from tensormoe.planning._cost import Cost, StepCost, contraction_cost
from tensormoe.planning._library import DEFAULT, Library

if TYPE_CHECKING:
    from tensormoe.gates import Gate

__all__ = ["GATE_ITEMSIZE", "GateCall", "activation_flops", "gate_cost", "gate_parameters"]

GATE_ITEMSIZE = 4
"""Logits and coefficients are float32 at least."""


# calls of an array library in an activation with its normalization, and in its backward pass
_OPERATIONS = {"entmax": 60, "softmax": 34, "top_k": 40, "relu_top_k": 20}
_BACKWARD = 40
# times that an activation and its backward pass go along each row
_PASSES = {"entmax": 32, "softmax": 12, "top_k": 16, "relu_top_k": 8}
_BACKWARD_PASSES = 16


def gate_parameters(gate: Gate, in_features: int, experts: tuple[int, ...]) -> int:
    """Entries of a gate's projections: in·ΣN_e, and ΣN_e more with a bias."""
    return (in_features + gate.bias) * sum(experts)


def gate_cost(
    gate: Gate | None,
    in_features: int,
    experts: tuple[int, ...],
    batch: int,
    itemsize: int = 4,
    *,
    training: bool = False,
) -> Cost:
    """The cost of a gate alone, forward, or forward and backward; nothing for None.

    >>> from tensormoe import Gate
    >>> gate_cost(Gate(), 768, (16, 32), batch=64).parameters == 768 * (16 + 32)
    True
    """
    call = GateCall(gate, in_features, experts, batch, itemsize)
    steps = call.steps() + (call.backward_steps() if training else ())
    return Cost(call.parameters, steps, call.peak(training=training))


def activation_flops(gate: Gate, experts: int) -> int:
    """Elementwise operations for one coefficient.

    A nominal count: layer norm 6, batch norm 2; exponential and division 4; a Newton step of
    entmax 5, with as many steps as a root search over N experts typically takes (1 + ½ log₂ N);
    top-k one comparison for every halving of N; relu_top_k only these and two more. Used for
    predicted time only.
    """
    norm = {"layer": 6, "batch": 2}.get(gate.normalization or "", 0)
    newton = 5 * (2 + round(log2(experts) / 2)) + 4
    halvings = round(log2(experts))
    named = {"softmax": 4, "top_k": 4 + halvings, "relu_top_k": 2 + halvings}
    active = named.get(gate.activation, newton)
    return norm + active


def activation_operations(gate: Gate, experts: int, rows: int) -> int:
    """Calls of an array library in one activation, by as nominal a count as that of FLOPs.

    The closed form of the usual gate for a single row goes through some of its logits in Python.
    """
    if rows == 1 and gate.normalization == "layer" and gate.effective_alpha == 1.5:
        return 28 + experts // 10
    return _OPERATIONS.get(gate.activation, _OPERATIONS["entmax"])


@dataclass(frozen=True)
class GateCall:
    """One call of a gate, whose work and memory are counted level by level.

    Args:
        gate: the gate; without one nothing is counted, as the coefficients are the caller's.
        in_features: size of its input.
        experts: one size per level.
        batch: number of inputs.
        itemsize: bytes per entry of input and projections.
        library: how the array library runs it.
    """

    gate: Gate | None
    in_features: int
    experts: tuple[int, ...]
    batch: int
    itemsize: int
    library: Library = DEFAULT

    @property
    def parameters(self) -> int:
        """Stored entries."""
        gate = self.gate
        return 0 if gate is None else gate_parameters(gate, self.in_features, self.experts)

    @property
    def coefficients(self) -> int:
        """Bytes of the coefficients of all levels."""
        return 0 if self.gate is None else self._width * self.batch * sum(self.experts)

    @property
    def saved(self) -> int:
        """Bytes that training keeps beside the coefficients."""
        # logits, and coefficients once more where the experts take them in a narrower type
        cast = self.itemsize if self._narrow else 0
        return self.coefficients // self._width * (self._width + cast)

    def steps(self) -> tuple[StepCost, ...]:
        """Work of a forward call: one projection and one activation per level."""
        steps = []
        for level, count, gate, sizes in self._levels():
            leg = expert_leg(level)
            label = f"gate {level}: linear ({BATCH} {INPUT}) × ({INPUT} {leg}) → ({BATCH} {leg})"
            legs = ((BATCH, INPUT), (INPUT, leg))
            steps.append(contraction_cost(label, legs, (BATCH, leg), sizes, self.itemsize))
            entries = self.batch * count
            size = self._width * entries
            if gate.bias:
                steps.append(StepCost(f"gate {level}: bias", 0, entries, size, size))
            work = entries * activation_flops(gate, count)
            calls = activation_operations(gate, count, self.batch)
            name = f"gate {level}: {gate.activation}"
            passes = self.batch * _PASSES.get(gate.activation, _PASSES["entmax"])
            made = StepCost(name, 0, work, size, size, operations=calls, runs=passes)
            steps.append(made)
        return tuple(steps)

    def backward_steps(self) -> tuple[StepCost, ...]:
        """Work of the backward pass: gradients of logits, projection and input per level."""
        steps = []
        for level, count, gate, sizes in self._levels():
            leg = expert_leg(level)
            entries, size = self.batch * count, self._width * self.batch * count
            rows, columns, table = (BATCH, INPUT), (BATCH, leg), (INPUT, leg)
            name = f"gate {level}: {gate.activation}, backward"
            work = 12 * entries
            passes = self.batch * _BACKWARD_PASSES
            made = StepCost(name, 0, work, 3 * size, size, operations=_BACKWARD, runs=passes)
            steps.append(made)
            for inputs, output in (((rows, columns), table), ((columns, table), rows)):
                label = f"gate {level}: linear, backward → ({' '.join(output)})"
                made = contraction_cost(label, inputs, output, sizes, self.itemsize)
                # the input's gradient meets the projection turned round
                several = output == rows and self.batch > 1
                turned = self.in_features * count if several else 0
                steps.append(replace(made, turned=turned))
            entries = self.batch * self.in_features
            size = self.itemsize * entries
            label = f"gate {level}: add to the input's gradient"
            steps.append(StepCost(label, 0, entries, 2 * size, size))
        return tuple(replace(step, backward=True) for step in steps)

    def peak(self, training: bool = False) -> int:
        """Bytes live at the peak of a forward call."""
        peak, done = 0, self._widened(self.batch * self.in_features)
        for _, count, gate, _ in self._levels():
            logits = self._width * self.batch * count
            work = self._workspace(gate, count)
            peak = max(peak, done + logits + work + self._widened(self.in_features * count))
            # training keeps the logits for the backward pass
            done += logits * (2 if training else 1)
        return peak

    def backward_peak(self) -> int:
        """Bytes live at the peak of a backward pass, beyond what is saved for it."""
        rows = self._width * self.batch * self.in_features
        peak, done = 0, self._widened(self.batch * self.in_features)
        for level, count, gate, _ in self._levels():
            work = self._workspace(gate, count, backward=True)
            table = self.in_features * count
            # before and after the projection's gradient is made
            before = work + self._widened(self.batch * count)
            behind = self._width * self.batch * count + rows
            behind += self.itemsize * table + 2 * self._widened(table)
            peak = max(peak, done + rows * (level > 0) + max(before, behind))
            done += self.itemsize * (table + gate.bias * count)
        return peak

    def _workspace(self, gate: Gate, count: int, *, backward: bool = False) -> int:
        """Bytes of the temporaries of one level's activation."""
        # plans without a gate need none of the package
        from tensormoe.gates import workspace

        rows = self.library.row_block_bytes
        return workspace(gate, self.batch, count, self._width, rows, backward=backward)

    @property
    def _width(self) -> int:
        return max(self.itemsize, GATE_ITEMSIZE)

    @property
    def _narrow(self) -> bool:
        return self.itemsize < GATE_ITEMSIZE

    def _widened(self, entries: int) -> int:
        """Bytes of a copy in float32, where a layer is narrower."""
        return self._width * entries if self._narrow else 0

    def _levels(self) -> Iterator[tuple[int, int, Gate, dict[Leg, int]]]:
        """Number, experts, gate and leg sizes of every level."""
        if self.gate is not None:
            for level, count in enumerate(self.experts):
                sizes = {BATCH: self.batch, INPUT: self.in_features, expert_leg(level): count}
                yield level, count, self.gate, sizes
