"""The cost of a program: counted from its steps, never measured.

Conventions, tested against independent counters:

- a multiply-add is 2 FLOPs; work of matrix products is kept apart from elementwise work, because
  counters such as ``torch.utils.flop_counter`` see the first only;
- a gather, a scatter's zeros, an identity matrix, a view and a copy are 0 FLOPs; every step reads
  its operands once and writes its result once;
- memory is that of live arrays beyond the layer's input and parameters: results, intermediates,
  coefficients, and in training what is saved for the backward pass and the gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Literal

from tensormoe.factorizations import BATCH, Leg
from tensormoe.planning._access import product_sizes, runs
from tensormoe.planning._copied import copied
from tensormoe.planning._library import DEFAULT, Library
from tensormoe.planning._program import ELEMENTWISE, PRODUCTS, Program, Role, Step

INDEX_BYTES = 8
"""Size of an index: 64-bit integers, as NumPy, PyTorch and CuPy make them."""

_IN_RUNS = ELEMENTWISE | {"permute"}


@dataclass(frozen=True, slots=True)
class StepCost:
    """The work of one step.

    Args:
        label: name of the step, for tables.
        matmul_flops: of matrix products, 2 per multiply-add.
        elementwise_flops: of everything else.
        bytes_read: operands.
        bytes_written: results.
        backward: whether it is of the backward pass, where starting a step takes longer.
        operations: calls of the array library beside the one that does the work: views, and the
            parts of gates and activations, a nominal count.
        products: number of matrix products, which share the FLOPs.
        sides: rows, summed entries and columns of each product.
        turned: entries of second operands that lie column by column, and meet several rows.
        runs: contiguous pieces of memory that elementwise work and copies go through one by one.
    """

    label: str
    matmul_flops: int = 0
    elementwise_flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    backward: bool = False
    operations: int = 0
    products: int = 0
    sides: tuple[float, float, float] = (0, 0, 0)
    turned: int = 0
    runs: int = 0


Kind = Literal["all-reduce", "all-gather"]
ALL_REDUCE: Kind = "all-reduce"
ALL_GATHER: Kind = "all-gather"


@dataclass(frozen=True, slots=True)
class Collective:
    """One exchange between the devices of a cut.

    Args:
        kind: ``"all-reduce"``, or ``"all-gather"`` where slices are joined.
        array: name of what is exchanged: ``"y"``, or a gradient, ``"d x"``.
        bytes: of the whole array, on every device.
        devices: P.
        backward: whether it is of the backward pass.
    """

    kind: Kind
    array: str
    bytes: int
    devices: int
    backward: bool = False

    @property
    def sent(self) -> float:
        """Bytes that every device sends, by the ring algorithms: 2 (P - 1)/P times the array.

        An all-gather sends half of that.
        """
        share = (self.devices - 1) / self.devices
        return self.bytes * share * (2 if self.kind == ALL_REDUCE else 1)

    @property
    def hops(self) -> int:
        """Messages that follow one another."""
        return (self.devices - 1) * (2 if self.kind == ALL_REDUCE else 1)


@dataclass(frozen=True)
class Cost:
    """The cost of a layer, or of a part of it, for one batch.

    Args:
        parameters: stored entries.
        steps: the work, step by step.
        peak_memory: bytes live at the peak, beyond input and parameters.
        saved_memory: bytes of them kept from forward to backward; 0 for inference.
        collectives: what the devices exchange, of a layer that is cut over several; the figures
            above are those of one device.
        calls: of layers and blocks.
    """

    parameters: int
    steps: tuple[StepCost, ...] = field(repr=False)
    peak_memory: int
    saved_memory: int = 0
    collectives: tuple[Collective, ...] = ()
    calls: int = 0

    @cached_property
    def matmul_flops(self) -> int:
        """FLOPs of matrix products."""
        return sum(step.matmul_flops for step in self.steps)

    @cached_property
    def elementwise_flops(self) -> int:
        """FLOPs of elementwise work."""
        return sum(step.elementwise_flops for step in self.steps)

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return self.matmul_flops + self.elementwise_flops

    @cached_property
    def bytes_read(self) -> int:
        """Bytes that steps read."""
        return sum(step.bytes_read for step in self.steps)

    @cached_property
    def bytes_written(self) -> int:
        """Bytes that steps write."""
        return sum(step.bytes_written for step in self.steps)

    @property
    def communicated(self) -> int:
        """Bytes of the arrays that the devices exchange."""
        return sum(each.bytes for each in self.collectives)

    def _repr_html_(self) -> str:
        from tensormoe.planning._describe import cost_html

        return cost_html(self)

    def then(self, other: Cost) -> Cost:
        """This work followed by ``other``: work adds up, the larger peak stays."""
        return replace(
            self,
            parameters=self.parameters + other.parameters,
            steps=self.steps + other.steps,
            peak_memory=max(self.peak_memory, other.peak_memory),
            saved_memory=self.saved_memory + other.saved_memory,
            collectives=self.collectives + other.collectives,
            calls=self.calls + other.calls,
        )


def contraction_cost(
    label: str,
    inputs: Sequence[Sequence[Leg]],
    output: Sequence[Leg],
    sizes: Mapping[Leg, int],
    itemsize: int,
) -> StepCost:
    """The cost of one matrix product by its legs.

    A leg of one operand alone that the result lacks is selected by the data rather than summed
    (the expert mode of a grouped product), and does not multiply the work.
    """
    touched = set(output).union(*(set(legs) for legs in inputs))
    for leg in set(touched).difference(output):
        if sum(leg in legs for legs in inputs) == 1:
            touched.discard(leg)
    left, right = (touched.intersection(legs) for legs in inputs)
    kept = touched.intersection(output)
    shared, rows, columns = left & right & kept, left - right, right - left
    return StepCost(
        label,
        matmul_flops=2 * prod(sizes[leg] for leg in touched),
        bytes_read=itemsize * sum(prod(sizes[leg] for leg in legs) for legs in inputs),
        bytes_written=itemsize * prod(sizes[leg] for leg in output),
        products=prod(sizes[leg] for leg in shared),
        sides=(
            prod(sizes[leg] for leg in rows),
            prod(sizes[leg] for leg in (left & right) - kept),
            prod(sizes[leg] for leg in columns),
        ),
    )


def program_cost(
    program: Program, sizes: Mapping[Leg, int], itemsize: int = 4, prefix: str = ""
) -> tuple[StepCost, ...]:
    """The cost of every step of a program.

    Args:
        program: the program that runs.
        sizes: the size of every leg, the batch included; may be another layer's of like structure.
        itemsize: bytes per entry.
        prefix: put before every label of a backward pass.
    """
    steps = [_step_cost(program, step, sizes, itemsize, prefix) for step in program.steps]
    return tuple(replace(step, backward=True) for step in steps) if prefix else tuple(steps)


def _step_cost(
    program: Program, step: Step, sizes: Mapping[Leg, int], itemsize: int, prefix: str
) -> StepCost:
    label = f"{prefix}{step.kind} {step}"
    count = len(program.operands)
    roles: list[Role] = [
        program.operands[slot].role if slot < count else "data" for slot in step.inputs
    ]
    if step.kind in PRODUCTS:
        made = contraction_cost(label, step.input_legs, step.legs, sizes, itemsize)
        # as the library sees them: legs may be merged into a side, or left to a loop
        products, sides, turned = product_sizes(step, sizes)
        views = _views(step)
        return replace(made, operations=views, products=products, sides=sides, turned=turned)
    if step.kind in ("grouped", "outer"):
        return _grouped_cost(label, step, sizes, itemsize)
    volumes = [prod(sizes[leg] for leg in legs) for legs in step.input_legs]
    written = prod(sizes[leg] for leg in step.legs)
    if step.kind == "gather":
        # only the rows that are picked are touched
        volumes[0] = written
    elif step.kind == "eye":
        volumes[0] = 0
    read = sum(
        volume * (INDEX_BYTES if role == "indices" else itemsize)
        for volume, role in zip(volumes, roles, strict=True)
    )
    work = {"reduce": volumes[0], "scatter": volumes[0]}.get(step.kind, 0)
    work = written if step.kind in ELEMENTWISE else work
    pieces = runs(step, sizes) if step.kind in _IN_RUNS else 0
    views = _views(step)
    return StepCost(label, 0, work, read, itemsize * written, operations=views, runs=pieces)


def _views(step: Step) -> int:
    """Reshapes and permutations around the operation of a step."""
    named = [each for view in step.views for each in (view.shape, view.axes)]
    return sum(each is not None for each in (*named, step.shape))


def _grouped_cost(label: str, step: Step, sizes: Mapping[Leg, int], itemsize: int) -> StepCost:
    """The cost of products grouped by expert: each row meets one of the matrices."""
    first, second = (prod(sizes[leg] for leg in legs) for legs in step.input_legs[:2])
    written, (expert,) = prod(sizes[leg] for leg in step.legs), step.input_legs[2]
    if step.kind == "outer":
        work = second * (first // sizes[BATCH] if sizes[BATCH] else 0)
    else:
        matrix = second // sizes[expert]
        work = sizes[BATCH] * matrix
        # experts without rows are not read
        second = matrix * min(sizes[expert], sizes[BATCH])
    read = itemsize * (first + second) + INDEX_BYTES * sizes[expert]
    products = min(sizes[expert], sizes[BATCH])
    return StepCost(label, 2 * work, 0, read, itemsize * written, products=products)


def program_peak(
    program: Program,
    sizes: Mapping[Leg, int],
    itemsize: int = 4,
    *,
    owned: Iterable[int] = (),
    kept: Collection[int] = (),
    library: Library = DEFAULT,
) -> int:
    """Bytes live at the peak of a program.

    Args:
        program: the program that runs.
        sizes: the size of every leg, the batch included.
        itemsize: bytes per entry.
        owned: operands that count as live until their last use; the others belong to the caller.
        kept: slots that stay live to the end, for a reverse program.
        library: what it copies for products.
    """
    moments = live_memory(program, sizes, itemsize, owned=owned, kept=kept)
    # the first moment is before the first step
    for index, step in enumerate(program.steps, 1):
        moments[index] += itemsize * copied(step, sizes, library)
    return max(moments)


def live_memory(
    program: Program,
    sizes: Mapping[Leg, int],
    itemsize: int = 4,
    *,
    owned: Iterable[int] = (),
    kept: Collection[int] = (),
) -> list[int]:
    """Bytes live before the first step of a program, and while each of its steps runs.

    Args:
        program: the program that runs.
        sizes: the size of every leg, the batch included; polynomials give polynomials.
        itemsize: bytes per entry.
        owned: operands that count as live until their last use; the others belong to the caller.
        kept: slots that stay live to the end, for a reverse program.
    """
    legs = program.legs
    live = {slot: itemsize * prod(sizes[leg] for leg in legs[slot]) for slot in owned}
    now = sum(live.values())
    moments = [now]
    for step in program.steps:
        if step.in_place and step.inputs[0] not in kept:
            live[step.output] = live.pop(step.inputs[0])
        elif step.kind != "expand":
            live[step.output] = itemsize * prod(sizes[leg] for leg in step.legs)
            now = now + live[step.output]
        moments.append(now)
        for slot in step.free:
            if slot not in kept:
                now = now - live.pop(slot, 0)
    return moments


def batch_sizes(program: Program, batch: int) -> dict[Leg, int]:
    """The sizes of a program's legs for a batch."""
    return {**program.sizes, BATCH: batch}
