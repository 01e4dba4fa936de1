"""Predicted time from cost: for every step its bottleneck, and what starting it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tensormoe._validation import is_number
from tensormoe.errors import PlanError
from tensormoe.planning._cost import Cost, StepCost

_NEEDED = ("matmul_rate", "elementwise_rate", "bandwidth", "overhead")
# fields that came later: profiles that were measured before have none of them
_LATER = {
    *("link_bandwidth", "cache", "padding", "operation_overhead", "product_overhead"),
    *("turn_rate", "run_overhead", "call_overhead", "threads"),
}


@dataclass(frozen=True)
class Roofline:
    """A device in a few numbers (Williams et al. 2009, extended by what calls and new memory cost).

    Published profiles have the first five numbers. The others are measured, by
    ``tensormoe calibrate`` or :func:`fit_roofline`, for one library on one machine.

    Args:
        name: of the device.
        matmul_rate: FLOP/s of large matrix products.
        elementwise_rate: FLOP/s of elementwise work, most of it that of gates.
        bandwidth: bytes/s between memory and the processor.
        overhead: seconds that starting one step takes.
        fresh_bandwidth: bytes/s at which results get new memory, where the system clears it page by
            page; None where the library keeps a pool of memory, as on GPUs.
        backward_overhead: seconds that starting one step of a backward pass takes, with what
            training adds to the forward steps; None for as many.
        link_bandwidth: bytes/s that a device sends to its neighbour; None for a device alone.
        cache: bytes of a step that cost no memory traffic, as they are in the last cache.
        padding: entries by which the rows, the summed side and the columns of every product are
            longer, to first order: small products are slower per FLOP.
        operation_overhead: seconds of every further call of the library in a step: of views, and of
            the parts of gates.
        product_overhead: seconds that each of the products of one step takes to start.
        turn_rate: entries/s at which second operands of products are turned round, where they lie
            column by column.
        run_overhead: seconds for each contiguous piece of memory that elementwise work or a copy
            goes through.
        call_overhead: seconds of a call of a layer or block, whatever it computes.
        threads: number of threads that were measured; None where that is not known.

    Raises:
        PlanError: a number that cannot be.

    >>> from tensormoe import CP, LayerSpec
    >>> from tensormoe.planning import PUBLISHED_ROOFLINES
    >>> spec = LayerSpec(768, 768, experts=512, factorization=CP(rank=256))
    >>> 1e-6 < PUBLISHED_ROOFLINES["a100"].time(spec.cost(1024)) < 1e-3
    True
    """

    name: str
    matmul_rate: float
    elementwise_rate: float
    bandwidth: float
    overhead: float
    fresh_bandwidth: float | None = None
    backward_overhead: float | None = None
    link_bandwidth: float | None = None
    cache: float | None = None
    padding: tuple[float, float, float] | None = None
    operation_overhead: float | None = None
    product_overhead: float | None = None
    turn_rate: float | None = None
    run_overhead: float | None = None
    call_overhead: float | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "padding") or (value is None and field.name not in _NEEDED):
                continue
            if not is_number(value) or not 0 < value < float("inf"):
                raise PlanError(
                    f"{field.name} of a roofline must be a positive number; got {value!r}."
                )
        if self.padding is not None:
            object.__setattr__(self, "padding", _three(self.padding))

    def time(self, cost: Cost) -> float:
        """Predicted seconds.

        A call has its overhead. For every step come the slower of arithmetic and memory traffic,
        the new memory of its result, turning operands round, and the overheads of the step, of its
        operations, products and runs.
        Communication comes on top, as if nothing ran meanwhile: for every collective what a device
        sends around a ring, and an overhead per message.

        Raises:
            PlanError: devices communicate, and the speed of their link is not known.
        """
        total = cost.calls * (self.call_overhead or 0.0)
        fresh = 0.0 if self.fresh_bandwidth is None else 1 / self.fresh_bandwidth
        backward = self.backward_overhead or self.overhead
        operation, product = self.operation_overhead or 0.0, self.product_overhead or 0.0
        run = self.run_overhead or 0.0
        turn = 0.0 if self.turn_rate is None else 1 / self.turn_rate
        for step in cost.steps:
            total += max(self.arithmetic(step), self.traffic(step)) + step.bytes_written * fresh
            total += backward if step.backward else self.overhead
            total += step.operations * operation + step.products * product
            total += step.turned * turn + step.runs * run
        return total + self.communication_time(cost)

    def arithmetic(self, step: StepCost) -> float:
        """Seconds of a step's products and elementwise work."""
        padded = 0.0
        if self.padding is not None:
            padded = 2.0 * sum(
                pad * faces for pad, faces in zip(self.padding, faces_of(step), strict=True)
            )
        elementwise = step.elementwise_flops / self.elementwise_rate
        return (step.matmul_flops + padded) / self.matmul_rate + elementwise

    def traffic(self, step: StepCost) -> float:
        """Seconds of a step's reading and writing, beyond what the cache holds."""
        moved = step.bytes_read + step.bytes_written - (self.cache or 0.0)
        return max(moved, 0.0) / self.bandwidth

    def communication_time(self, cost: Cost) -> float:
        """Predicted seconds of the collectives alone.

        Raises:
            PlanError: there are some, and the speed of the link is not known.
        """
        if not cost.collectives:
            return 0.0
        if self.link_bandwidth is None:
            raise PlanError(
                "link_bandwidth of a roofline must be known for a layer that is cut over devices; "
                f"got None for {self.name}. Give it, in bytes per second."
            )
        sent = sum(each.sent for each in cost.collectives)
        messages = sum(each.hops for each in cost.collectives)
        return sent / self.link_bandwidth + messages * self.overhead

    def to_dict(self) -> dict[str, Any]:
        """The profile in plain values."""
        values = asdict(self)
        values["padding"] = None if self.padding is None else list(self.padding)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Roofline:
        """The inverse of :meth:`to_dict`.

        Raises:
            PlanError: a value is missing, unknown or not a positive number.
        """
        expected = set(cls.__dataclass_fields__)
        if not isinstance(values, Mapping) or {*values, *_LATER} != expected:
            found = sorted(values) if isinstance(values, Mapping) else values
            raise PlanError(f"a roofline must have exactly {sorted(expected)}; got {found!r}.")
        return cls(**values)


def faces_of(step: StepCost) -> tuple[float, float, float]:
    """Entries of all products of a step across their rows, their summed side and their columns."""
    rows, summed, columns = step.sides
    count = step.products
    return count * summed * columns, count * rows * columns, count * rows * summed


def _three(padding: Any) -> tuple[float, float, float]:
    listed = list(padding) if isinstance(padding, (list, tuple)) else []
    if len(listed) != 3 or not all(is_number(each) and 0 <= each < float("inf") for each in listed):
        raise PlanError(
            "padding of a roofline must be three numbers that are not negative, for rows, summed "
            f"entries and columns; got {padding!r}."
        )
    return listed[0], listed[1], listed[2]
