"""Communication of a layer that is cut along one leg over several devices.

The rule is one for every network. Forward, the result of a device's part is a slice for the output
leg, and for all other legs a term of a sum: one all-reduce. Backward, the gradient by an array that
has the leg is a slice, and that by one without it is a term of a sum: one all-reduce each. Arrays
with the leg come and go as slices; what it takes to have them whole is counted where asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from tensormoe.factorizations import INPUT, OUTPUT, Leg, Network
from tensormoe.planning._cost import ALL_GATHER, ALL_REDUCE, Collective
from tensormoe.planning._draft import DENSE, Routing
from tensormoe.planning._gate_cost import GATE_ITEMSIZE


def collectives(
    network: Network,
    batch: int,
    routing: Routing = DENSE,
    *,
    training: bool = False,
    itemsize: int = 4,
    whole: bool = False,
) -> tuple[Collective, ...]:
    """The communication of one call of a layer; none where its network is not a slice.

    Args:
        network: of the layer, as one device has it.
        batch: number of inputs.
        routing: form of the data operands.
        training: forward and backward with all gradients, instead of forward alone.
        itemsize: bytes per entry.
        whole: whether input, coefficients and output are whole on every device also where they have
            the leg.
    """
    cut = network.cut
    if cut is None or cut.devices == 1:
        return ()
    found = []
    for each in _exchanged(network.whole, batch, routing):
        if each.backward and not training:
            continue
        if cut.leg not in each.legs:
            kind = ALL_REDUCE
        elif whole and not each.stored:
            kind = ALL_GATHER
        else:
            continue
        width = max(itemsize, GATE_ITEMSIZE) if each.wide else itemsize
        size = width * each.entries
        found.append(Collective(kind, each.name, size, cut.devices, each.backward))
    return tuple(found)


def block_collectives(
    first: Network, second: Network, batch: int, *, training: bool = False, itemsize: int = 4
) -> tuple[Collective, ...]:
    """The communication of one call of a block whose layers are cut.

    Where the hidden leg is cut, hidden features stay on their device. The gradients by the
    coefficients of both layers are added before they are summed over the devices.

    Args:
        first: network of the first layer; cut along its output, for the hidden leg.
        second: network of the second one; cut along its input.
        batch: number of inputs.
        training: forward and backward with all gradients, instead of forward alone.
        itemsize: bytes per entry.
    """
    found: dict[str, Collective] = {}
    inner = {"first": "y", "second": "d x"}
    for part, network in (("second", second), ("first", first)):
        for each in collectives(network, batch, training=training, itemsize=itemsize):
            name = each.array
            if name == inner[part]:
                name = "d hidden" if each.backward else "hidden"
            elif name.removeprefix("d ") in network.shapes:
                name = f"d {part}.{name.removeprefix('d ')}"
            found[name] = replace(each, array=name)
    return tuple(sorted(found.values(), key=lambda each: each.backward))


@dataclass(frozen=True)
class _Array:
    """An array that the devices' parts make: the result, or a gradient.

    Args:
        name: in reports.
        entries: of all slices.
        legs: it is a slice where the cut leg is one of them, and a term of a sum otherwise.
        stored: whether it is the gradient by a factor, which stays where the factor is.
        wide: whether it is float32 at least, as coefficients are.
        backward: whether it is a gradient.
    """

    name: str
    entries: int
    legs: tuple[Leg, ...]
    stored: bool = False
    wide: bool = False
    backward: bool = True


def _exchanged(network: Network, batch: int, routing: Routing) -> Iterator[_Array]:
    yield _Array("y", batch * network.out_features, (OUTPUT,), backward=False)
    if not routing.indexed_input:
        yield _Array("d x", batch * network.in_features, (INPUT,))
    for level, leg in enumerate(network.expert_legs):
        count = network.sizes[leg] if routing.top_k is None else routing.top_k
        # indices are those of all experts, on every device
        legs = (leg,) if routing.top_k is None else ()
        yield _Array(f"d coefficients_{level}", batch * count, legs, wide=True)
    for factor in network.all_factors:
        entries = prod(network.shape(factor))
        yield _Array(f"d {factor.name}", entries, factor.legs, stored=True)
