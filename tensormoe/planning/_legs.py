"""The legs that a layer can be cut along, by what a training step then takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tensormoe._validation import flag, instance, positive_int
from tensormoe.errors import PlanError, SpecError
from tensormoe.factorizations import Leg, Network
from tensormoe.planning._collectives import collectives
from tensormoe.planning._cost import Cost
from tensormoe.planning._draft import DENSE, Routing
from tensormoe.planning._plan import plan_layer
from tensormoe.planning._published import PUBLISHED_ROOFLINES
from tensormoe.planning._roofline import Roofline

DEVICE = PUBLISHED_ROOFLINES["h100"]
"""The device that legs are compared for where none is given."""


@dataclass(frozen=True)
class CutLayer:
    """A layer cut along one leg.

    Args:
        leg: that is cut.
        network: one device's part.
        cost: of a call on one device, with input and output whole on all of them.
        time: predicted seconds of it, communication included.
    """

    leg: Leg
    network: Network
    cost: Cost
    time: float


def compare_legs(
    network: Network,
    devices: int,
    *,
    batch: int = 4096,
    routing: Routing = DENSE,
    training: bool = True,
    itemsize: int = 4,
    roofline: Roofline = DEVICE,
) -> tuple[CutLayer, ...]:
    """The layer cut along each of its legs that divide, the fastest first.

    Args:
        network: of the whole layer.
        devices: P, the number of slices.
        batch: number of inputs.
        routing: form of the data operands.
        training: forward and backward with all gradients, instead of forward alone.
        itemsize: bytes per entry.
        roofline: the device, whose ``link_bandwidth`` is known.

    Raises:
        PlanError: an argument that cannot be, or a device whose link is not known.
        SpecError: no leg divides, or the network is a slice already.

    >>> from tensormoe import CP, LayerSpec
    >>> network = LayerSpec(768, 768, experts=512, factorization=CP(rank=256)).network
    >>> [each.leg for each in compare_legs(network, 8)][0]
    'r'
    """
    positive_int(devices, "devices", PlanError)
    flag(training, "training", PlanError)
    instance(roofline, Roofline, "roofline", "a Roofline", PlanError)
    legs = [leg for leg in network.shardable_legs if network.sizes[leg] % devices == 0]
    if not legs:
        sizes = ", ".join(f"{leg} of {network.sizes[leg]}" for leg in network.shardable_legs)
        raise SpecError(
            f"a leg must have a multiple of the {devices} devices as its size; got {sizes}. Take "
            "other sizes, or another number of devices."
        )
    found = []
    for leg in legs:
        part = network.slice(leg, devices)
        cost = plan_layer(part, batch, routing).cost(training=training, itemsize=itemsize)
        exchanged = collectives(
            part, batch, routing, training=training, itemsize=itemsize, whole=True
        )
        cost = replace(cost, collectives=exchanged)
        found.append(CutLayer(leg, part, cost, roofline.time(cost)))
    return tuple(sorted(found, key=lambda each: each.time))
