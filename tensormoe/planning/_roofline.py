"""Predicted time from cost: for every step its bottleneck, and an overhead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from tensormoe._validation import choice, is_number
from tensormoe.errors import PlanError, SpecError
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


def _published(
    name: str, matmul: float, elementwise: float, bandwidth: float, link: float
) -> Roofline:
    # starting a kernel takes a few microseconds on every current GPU
    return Roofline(
        name, matmul * 1e12, elementwise * 1e12, bandwidth * 1e9, 5e-6, link_bandwidth=link * 1e9
    )


PUBLISHED_ROOFLINES: Mapping[str, Roofline] = MappingProxyType(
    {
        # peak dense TFLOP/s of matrix units in TF32 (float32 in and out), of float32 vector
        # units, and bandwidths of memory and of the link in one direction in GB/s, from the makers'
        # data sheets; T4 and the workstation cards without TF32 figures use float32 throughout.
        # Links are NVLink, and PCIe 3 and 4 of 16 lanes for T4 and L4
        "t4": _published("t4", 8.1, 8.1, 320, 16),
        "v100": _published("v100", 15.7, 15.7, 900, 150),
        "a100": _published("a100", 156.0, 19.5, 2039, 300),
        "l4": _published("l4", 60.0, 30.3, 300, 32),
        "h100": _published("h100", 494.0, 67.0, 3350, 450),
        "h200": _published("h200", 494.0, 67.0, 4800, 450),
        # one current server core pair: what a laptop or a CI machine has; ten-gigabit Ethernet
        "cpu": Roofline("cpu", 1.5e11, 1.5e10, 5e10, 5e-6, 3e9, 1e-5, 1.25e9),
    }
)
"""Peaks that makers publish, by device; ``cpu`` is a rough two-core machine. Measure your own with
``tensormoe calibrate``."""


def published_roofline(name: str, dtype: str = "float32") -> Roofline:
    """A published profile by name.

    Raises:
        SpecError: an unknown name.
    """
    del dtype
    return PUBLISHED_ROOFLINES[choice(name, PUBLISHED_ROOFLINES, "device", SpecError)]
