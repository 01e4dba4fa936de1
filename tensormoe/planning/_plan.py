"""A plan: the path chosen for a batch, lowered, with its cost and a report to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from types import NoneType
from typing import TYPE_CHECKING

from tensormoe._validation import flag, instance, non_negative_int, positive_int
from tensormoe.errors import PlanError
from tensormoe.factorizations import Network
from tensormoe.planning._collectives import collectives
from tensormoe.planning._cost import INDEX_BYTES, Cost, batch_sizes, program_cost
from tensormoe.planning._describe import describe_plan, layer_sizes, plan_regime
from tensormoe.planning._draft import DENSE, Routing
from tensormoe.planning._layer_cost import layer_cost
from tensormoe.planning._library import DEFAULT, Library
from tensormoe.planning._program import Program
from tensormoe.planning._regimes import Regimes, plan_regimes
from tensormoe.planning._roofline import Roofline

if TYPE_CHECKING:
    from tensormoe._drawing import Drawing
    from tensormoe.gates import Gate


@dataclass(frozen=True)
class Plan:
    """Program of a layer at one batch size, with its cost.

    Args:
        network: of the layer.
        title: name of the layer in reports.
        routing: form of its data operands.
        batch: number of inputs planned for.
        program: the steps; shared by all batches of the regime.
        first_batch: the smallest batch of the regime.
        last_batch: the largest, or None if it has no end.
        chunk: inputs that run at a time; smaller than ``batch`` only under a memory limit.
        prepared: whether weight-only steps have run beforehand and cost nothing.
    """

    network: Network
    title: str
    routing: Routing
    batch: int
    program: Program
    first_batch: int
    last_batch: int | None
    chunk: int
    prepared: bool = False

    def cost(
        self,
        gate: Gate | str | None = None,
        *,
        training: bool = False,
        itemsize: int = 4,
        library: Library = DEFAULT,
    ) -> Cost:
        """Cost of one call.

        Args:
            gate: included in the count if given.
            training: forward and backward with all gradients, instead of forward alone.
            itemsize: bytes per entry: 4 for float32.
            library: how the array library runs a layer.
        """
        gate = _parsed(gate)
        positive_int(itemsize, "itemsize", PlanError)
        program = self.program.split()[1] if self.prepared else self.program
        # every device has the whole gate
        whole = self.network.whole

        def of(batch: int) -> Cost:
            cost = layer_cost(
                program,
                self.network.num_parameters,
                whole.in_features,
                whole.experts,
                batch,
                gate=gate,
                training=training,
                itemsize=itemsize,
                library=library,
            )
            exchanged = collectives(
                self.network, batch, self.routing, training=training, itemsize=itemsize
            )
            return replace(cost, collectives=exchanged)

        if self.chunk >= self.batch:
            return of(self.batch)
        return _chunked(of, self.batch, self.chunk, itemsize * self.network.out_features)

    def describe(
        self,
        gate: Gate | str | None = None,
        *,
        training: bool = False,
        itemsize: int = 4,
        roofline: Roofline | None = None,
        width: int | None = None,
    ) -> str:
        """The plan as text: equation, steps, FLOPs, bytes, memory, and the dense equivalent.

        Args:
            gate: included in the count if given.
            training: forward and backward with all gradients, instead of forward alone.
            itemsize: bytes per entry: 4 for float32.
            roofline: the device that the time of every step is predicted for, if any.
            width: columns that lines are to fit; the table becomes a list where it does not.
                Lines are as long as they come without one.

        Raises:
            PlanError, GateError: an argument that cannot be.

        >>> from tensormoe import CP, LayerSpec
        >>> print(LayerSpec(6, 5, experts=4, factorization=CP(rank=3)).plan(32).describe())
        ... # doctest: +ELLIPSIS
        CP(rank=3): 4 experts of 6 → 5, with bias
        y[b o] = coefficients_0[b n0] · x[b i] · expert_0[n0 r] · input[i r] · output[o r], ...
        """
        gate = _parsed(gate)
        flag(training, "training", PlanError)
        instance(roofline, (Roofline, NoneType), "roofline", "a Roofline or None", PlanError)
        if width is not None:
            positive_int(width, "width", PlanError)
        cost = self.cost(gate, training=training, itemsize=itemsize)
        return describe_plan(self, cost, itemsize, gate, training, roofline, width)

    def draw(self, *, itemsize: int = 4) -> Drawing:
        """A picture of the contraction: its steps in order, with sizes, memory and FLOPs.

        Args:
            itemsize: bytes per entry: 4 for float32.

        Raises:
            PlanError: an itemsize that is not a positive integer.

        >>> from tensormoe import CP, LayerSpec
        >>> LayerSpec(6, 5, experts=4, factorization=CP(rank=3)).plan(32).draw()
        Drawing('CP(rank=3): 4 experts of 6 → 5, with bias', ...)
        """
        from tensormoe._drawing import draw_program

        positive_int(itemsize, "itemsize", PlanError)
        program = self.program.split()[1] if self.prepared else self.program
        sizes = batch_sizes(program, min(self.chunk, max(self.batch, 1)))
        costs = program_cost(program, sizes, itemsize)
        title = f"{self.title}: {layer_sizes(self.network)}"
        return draw_program(program, costs, sizes, itemsize, INDEX_BYTES, title, plan_regime(self))

    def _repr_html_(self) -> str:
        from tensormoe._html import text_html

        title, _, text = self.describe().partition("\n")
        return text_html(title, text, self.draw())


def _parsed(gate: Gate | str | None) -> Gate | None:
    if gate is None:
        return None
    # plans without a gate need none of the package
    from tensormoe.gates import Gate

    return Gate.parse(gate)


def _chunked(of: Callable[[int], Cost], batch: int, chunk: int, row: int) -> Cost:
    """The cost of a batch cut into chunks: results so far, one chunk at work, one final join."""
    whole, rest = divmod(batch, chunk)
    one = of(chunk)
    total = replace(one, steps=one.steps * whole, collectives=one.collectives * whole)
    if rest:
        total = total.then(replace(of(rest), parameters=0, calls=0))
    waiting = row * (batch - chunk)
    return replace(total, peak_memory=max(waiting + one.peak_memory, 2 * row * batch))


@lru_cache(maxsize=4096)
def plan_layer(
    network: Network,
    batch: int,
    routing: Routing = DENSE,
    *,
    prepared: bool = False,
    memory_limit: int | None = None,
    gate: Gate | None = None,
    itemsize: int = 4,
    library: Library = DEFAULT,
    title: str = "a network",
) -> Plan:
    """The plan of a layer for a batch; the answer is cached.

    Args:
        network: of the layer.
        batch: number of inputs; 0 is planned like 1.
        routing: form of the data operands.
        prepared: plan for weight-only steps that have run beforehand.
        memory_limit: bytes that a forward call may take beyond input and parameters; the batch
            is cut into chunks that keep to it.
        gate: counted against the limit if given.
        itemsize: bytes per entry.
        library: how the array library runs a layer.
        title: name of the layer in reports.

    Raises:
        PlanError: a batch that is no size, or a limit that not even single inputs keep to; the
            message names the smallest feasible one.
    """
    batch = non_negative_int(batch, "batch", PlanError)
    regimes: Regimes = plan_regimes(network, routing)
    index = len(regimes.starts) - 1 if prepared else regimes.index(batch)
    last = regimes.starts[index + 1] - 1 if index + 1 < len(regimes.starts) else None
    first = 1 if prepared else max(regimes.starts[index], 1)
    program = regimes.programs[index]
    plan = Plan(network, title, routing, batch, program, first, last, max(batch, 1), prepared)
    if memory_limit is None:
        return plan
    limit = positive_int(memory_limit, "memory_limit", PlanError)

    def peak(chunk: int) -> int:
        cut = replace(plan, chunk=chunk)
        return cut.cost(gate, itemsize=itemsize, library=library).peak_memory

    if peak(max(batch, 1)) <= limit:
        return plan
    least = min(peak(1), peak(max(batch, 1)))
    if peak(1) > limit:
        raise PlanError(
            f"memory_limit must be at least {least} bytes for {batch} inputs of {title}; got "
            f"{limit}. Raise the limit or call with fewer inputs."
        )
    low, high = 1, batch
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle) <= limit else (low, middle)
    return replace(plan, chunk=low)
