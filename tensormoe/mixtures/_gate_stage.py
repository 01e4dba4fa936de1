"""Stage of a multi-gate mixture: experts that all run, and gates that each mix some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from tensormoe._config import LayerConfig
from tensormoe._mixture import OwnArray
from tensormoe.backend import Array, Backend
from tensormoe.errors import GateError
from tensormoe.functional import EachExpert
from tensormoe.functional._dtypes import cast, widened
from tensormoe.gates import Gate
from tensormoe.mixtures._cost import every_cost, product_steps
from tensormoe.mixtures._experts import ExpertsConfig
from tensormoe.mixtures._parts import Parts, layers_of, run_all
from tensormoe.planning import Cost, Library, StepCost
from tensormoe.planning._gate_cost import GATE_ITEMSIZE, activation_flops
from tensormoe.routing import Ranges, TaskRoutes, weigh_tasks

Inputs = Array | tuple[Array, ...]
"""Input (rows, features) of all gates, or one for each."""

# of one coefficient, backward
_BACKWARD_FLOPS = 12


@dataclass(frozen=True)
class GateStage:
    """Experts that all run, and gates that mix them.

    Args:
        experts: the experts.
        reads: the experts that each gate reads.
        features: size of a gate's input.
        gate: from logits to coefficients, the same for all.
        apart: whether each gate has an input of its own, and so does each expert; otherwise there
            is one input for all.

    Raises:
        GateError: a gate that needs arrays or random numbers besides, or more experts per task than
            it reads.
    """

    experts: ExpertsConfig
    reads: tuple[Ranges, ...]
    features: int
    gate: Gate
    apart: bool = False
    # a number, as compilers don't follow how it is counted
    num_experts: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_experts", self.experts.num_experts)
        gate, least = self.gate, min(self.widths)
        if gate.normalization == "batch" or gate.noise or gate.balance:
            raise GateError(
                "gate of a multi-gate mixture must have neither batch norm nor noise nor balance; "
                f"got {gate!r}. Use normalization='layer' or None, and a loss on the record for "
                "balance."
            )
        if gate.k is not None and gate.k > least:
            raise GateError(
                f"k must be at most the {least} experts that a gate reads; got {gate.k}. Lower it."
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of experts that each gate reads."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.reads)

    @property
    def layers(self) -> Mapping[str, LayerConfig]:
        """The layers of the experts by name."""
        return layers_of("experts", self.experts)

    @property
    def own(self) -> dict[str, OwnArray]:
        """The projections of all gates side by side, and their biases."""
        total, span = sum(self.widths), 1.0 / sqrt(self.features)
        # as of any other gate, and a gate that keeps k experts has to tell them apart
        first = OwnArray((self.features, total), "uniform" if self.gate.k else "zeros", span)
        if not self.gate.bias:
            return {"router.projection": first}
        start: Any = "zeros" if self.gate.sums_to_one else "uniform"
        return {"router.projection": first, "router.bias": OwnArray((total,), start, span)}

    @property
    def num_parameters(self) -> int:
        """Trainable entries of experts and gates."""
        rows = self.features + self.gate.bias
        return self.experts.num_parameters + rows * sum(self.widths)

    def route(self, arrays: Mapping[str, Array], inputs: Inputs, backend: Backend) -> TaskRoutes:
        """The coefficients of every gate.

        Args:
            arrays: the stage's own arrays.
            inputs: of the gates.
            backend: the adapter of the arrays' library.
        """
        projection = widened(arrays["router.projection"], backend)
        if isinstance(inputs, tuple):
            parts, start = [], 0
            for rows, width in zip(inputs, self.widths, strict=True):
                some = projection[:, start : start + width]
                parts.append(backend.matmul(widened(rows, backend), some))
                start += width
            logits = backend.namespace.concat(parts, axis=1)
        else:
            logits = backend.matmul(widened(inputs, backend), projection)
        if self.gate.bias:
            logits = logits + widened(arrays["router.bias"], backend)
        return weigh_tasks(self.gate, logits, self.reads, self.num_experts, backend=backend)

    def outputs(self, parts: Parts, x: Array) -> Array:
        """Outputs (N, rows, out) of all experts, of (rows, in) or (N, rows, in)."""
        return run_all(self.experts, parts, "experts", x, EachExpert())

    def cost(self, rows: int, *, itemsize: int, library: Library, training: bool) -> Cost:
        """The cost of gates, experts and their sums.

        Args:
            rows: number of tokens.
            itemsize: bytes per entry.
            library: how the array library runs a layer.
            training: forward and backward with all gradients, instead of forward alone.
        """
        wide, gates, experts = max(itemsize, GATE_ITEMSIZE), len(self.reads), self.experts
        steps: list[StepCost] = []
        for width in self.widths if self.apart else (sum(self.widths),):
            sizes = {"t": rows, "i": self.features, "j": width}
            steps += product_steps("logits", ("ti", "ij"), "tj", sizes, wide, training)
        entries = rows * sum(self.widths)
        work = sum(rows * width * activation_flops(self.gate, width) for width in self.widths)
        steps.append(StepCost("gates", 0, work, wide * entries, wide * entries))
        if training:
            size = wide * entries
            back = _BACKWARD_FLOPS * entries
            steps.append(StepCost("backward gates", 0, back, 3 * size, size, backward=True))
        # logits and coefficients, with a place for each expert
        weights = 2 * wide * rows * gates * self.num_experts
        # inputs of experts that have their own
        inputs = itemsize * rows * self.num_experts * experts.in_features if self.apart else 0
        made = every_cost(
            experts,
            rows,
            same_rows=not self.apart,
            held=weights + inputs,
            itemsize=itemsize,
            library=library,
            training=training,
        )
        sizes = {"t": rows, "m": gates, "n": experts.num_experts, "o": experts.out_features}
        mixed = product_steps("mix", ("tmn", "tno"), "tmo", sizes, itemsize, training)
        results = itemsize * rows * experts.out_features
        peak = made.saved_memory + results * (2 * experts.num_experts + gates)
        return Cost(
            self.num_parameters,
            (*steps, *made.steps, *mixed),
            max(made.peak_memory, peak),
            made.saved_memory + results * experts.num_experts if training else 0,
        )


def mix_tasks(outputs: Array, routes: TaskRoutes, backend: Backend) -> Array:
    """Mixtures (rows, tasks, out) of the outputs (N, rows, out) of all experts."""
    by_row = backend.contiguous(backend.permute(outputs, (1, 0, 2)))
    return backend.matmul(cast(routes.coefficients, by_row.dtype, backend), by_row)
