"""Predicted time from cost: for every step its bottleneck, and an overhead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tensormoe._validation import is_number
from tensormoe.errors import PlanError
from tensormoe.planning._cost import Cost


@dataclass(frozen=True)
class Roofline:
    """A device in a few numbers (Williams et al. 2009, extended by what calls and new memory cost).

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

    Raises:
        PlanError: a number is not positive.

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

    def __post_init__(self) -> None:
        optional = ("fresh_bandwidth", "backward_overhead", "link_bandwidth")
        for key in ("matmul_rate", "elementwise_rate", "bandwidth", "overhead", *optional):
            value = getattr(self, key)
            if key in optional and value is None:
                continue
            if not is_number(value) or not 0 < value < float("inf"):
                raise PlanError(f"{key} of a roofline must be a positive number; got {value!r}.")

    def time(self, cost: Cost) -> float:
        """Predicted seconds.

        For every step, the slower of arithmetic and memory traffic, the new memory of its result,
        and the overhead. Communication comes on top, as if nothing ran meanwhile: for every
        collective what a device sends around a ring, and an overhead per message.

        Raises:
            PlanError: devices communicate, and the speed of their link is not known.
        """
        total = 0.0
        fresh = 0.0 if self.fresh_bandwidth is None else 1 / self.fresh_bandwidth
        backward = self.backward_overhead or self.overhead
        for step in cost.steps:
            arithmetic = step.matmul_flops / self.matmul_rate
            arithmetic += step.elementwise_flops / self.elementwise_rate
            memory = (step.bytes_read + step.bytes_written) / self.bandwidth
            total += max(arithmetic, memory) + step.bytes_written * fresh
            total += backward if step.backward else self.overhead
        return total + self.communication_time(cost)

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
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Roofline:
        """The inverse of :meth:`to_dict`.

        Raises:
            PlanError: a value is missing, unknown or not a positive number.
        """
        expected = set(cls.__dataclass_fields__)
        # profiles that were measured before the field was there have none
        if not isinstance(values, Mapping) or {*values, "link_bandwidth"} != expected:
            found = sorted(values) if isinstance(values, Mapping) else values
            raise PlanError(f"a roofline must have exactly {sorted(expected)}; got {found!r}.")
        return cls(**values)
