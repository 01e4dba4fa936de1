"""Cutting layers, blocks and experts in place: checked first, then done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from tensormoe.errors import SpecError
from tensormoe.factorizations import INPUT, OUTPUT
from tensormoe.functional import CutAxis
from tensormoe.planning import Routing, compare_legs
from tensormoe_torch._base import Mixture
from tensormoe_torch._factors import Factors
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._mlp import MuMoEMLP
from tensormoe_torch._parts import Boundary, Part
from tensormoe_torch._rounded import RoundedFactors
from tensormoe_torch._sharded import Copied, held_here, is_sharded, stored
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.mixtures import DiverseMoE, MultiGateMoE, SoftMoE, SparseMoE
from tensormoe_torch.mixtures._base import MixtureModule
from tensormoe_torch.parallel._activations import cut_pieces

HIDDEN = "hidden"
"""The leg between the two layers of a block or of experts."""

MIXTURES = (SparseMoE, SoftMoE, DiverseMoE, MultiGateMoE)
"""Mixtures whose experts are cut."""

Do = Callable[[], None]


@dataclass(frozen=True)
class Request:
    """A request to cut layers.

    Args:
        mesh: of one dimension.
        leg: of every layer; None for the best one of each.
        output: placement of outputs; None for whole ones.
    """

    mesh: DeviceMesh
    leg: str | None
    output: Placement | None = None

    @property
    def devices(self) -> int:
        """P, the number of devices."""
        return int(self.mesh.size())


def cuts(module: nn.Module, request: Request) -> list[Do]:
    """Steps that cut all layers in a module; nothing is done yet.

    Raises:
        SpecError: a layer that cannot be cut as requested.
    """
    found = list(_cuts(module, "", request))
    check_alone(module, _layers(module))
    return found


def check_alone(module: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse layers with parameters that another module has too.

    Args:
        module: has all of them.
        layers: to be cut, by name.

    Raises:
        SpecError: a parameter in several modules.
    """
    held = Counter(
        id(each)
        for part in module.modules()
        for each in part._parameters.values()
        if each is not None
    )
    for name, layer in layers:
        if any(held[id(each)] > 1 for each in layer.parameters()):
            raise SpecError(
                f"a parameter of a layer that is cut must belong to it alone; got one of {name!r} "
                "that another module has too. Untie them first."
            )


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, each in module.named_modules():
        if isinstance(each, Factors | Copied | FactorizedExperts):
            yield name, each


def _cuts(module: nn.Module, name: str, request: Request) -> Iterator[Do]:
    if isinstance(module, MuMoEMLP):
        yield from _block(module, name, request)
    elif isinstance(module, FactorizedExperts):
        yield from _experts(module, name, request)
    elif isinstance(module, Mixture):
        yield from _layer(module, name, request)
    elif isinstance(module, MixtureModule) and not isinstance(module, MIXTURES):
        kinds = ", ".join(each.__name__ for each in MIXTURES)
        raise SpecError(
            f"mixtures that are cut over devices must be one of {kinds}; got "
            f"{named(module, name)}. Parallelize the other modules one by one."
        )
    elif isinstance(module, Copied):
        yield _whole(module, Boundary(request.mesh), name)
    else:
        for short, child in module.named_children():
            yield from _cuts(child, at(name, short), request)


def _layer(layer: Mixture, name: str, request: Request) -> Iterator[Do]:
    """A layer of its own."""
    network, leg = layer.spec.network, request.leg
    if leg is None:
        routing = Routing(indexed_input=layer.config.indexed_input)
        found = compare_legs(
            network, request.devices, routing=routing, itemsize=layer.dtype.itemsize
        )
        leg = found[0].leg
    elif leg not in network.shardable_legs:
        return
    part = Part(layer.config.shard(leg, request.devices), request.mesh, output=request.output)
    yield cut_factors(layer, part, name)
    if layer.gate is not None:
        yield _whole(layer.gate, Boundary(request.mesh), name)


def _block(block: MuMoEMLP, name: str, request: Request) -> Iterator[Do]:
    """A block, along its hidden leg."""
    if request.leg not in (None, HIDDEN):
        return
    config = block.config.shard(request.devices)
    if (
        block.act is not None
        and cut_pieces(block.act, block.hidden_features, request.devices, at(name, "act")) != 1
    ):
        raise AssertionError  # one feature of one input
    boundary = Boundary(request.mesh, request.output)
    pieces = 2 if config.gated else 1
    first = replace(config.first, gate=None)
    yield cut_factors(
        block.first, Part(first, request.mesh, pieces, inside=True), at(name, "first")
    )
    second = Part(config.second, request.mesh, inside=True)
    yield cut_factors(block.second, second, at(name, "second"))
    if block.gate is not None:
        yield _whole(block.gate, Boundary(request.mesh), name)

    def mark() -> None:
        block.boundary = boundary

    yield mark


def _experts(experts: FactorizedExperts, name: str, request: Request) -> Iterator[Do]:
    """Experts behind a router, along their hidden leg."""
    layers = layers_of(experts, name)
    down, devices, mesh = experts.down_proj, request.devices, request.mesh
    biases: dict[str, CutAxis | None] = {}
    if len(layers) == 1:
        legs = _legs_of_rows(down, request)
        if not legs:
            return
        found = {"down_proj": (legs[0], 1)}
        if legs[0] == OUTPUT:
            biases["down_proj_bias"] = CutAxis(1)
    elif request.leg not in (None, HIDDEN):
        return
    else:
        _check_hidden(down.in_features, devices)
        width = down.in_features * (2 if "gate_up_proj" in layers else 1)
        pieces = cut_pieces(experts.act_fn, width, devices, at(name, "act_fn"))
        found = dict.fromkeys(layers, (OUTPUT, pieces)) | {"down_proj": (INPUT, 1)}
        biases = {f"{role}_bias": CutAxis(1, pieces) for role in layers if role != "down_proj"}
    for role, (leg, pieces) in found.items():
        part = Part(layers[role].config.shard(leg, devices), mesh, pieces, inside=True)
        yield cut_factors(layers[role], part, at(name, f"projections.{role}"))
    held = [role for role, _ in experts.named_parameters(recurse=False)]
    check_own(experts, held, name, others=False)

    axes = {bias: biases.get(bias) for bias in held}
    yield lambda: cut_biases(experts, axes, Boundary(mesh, request.output))


def cut_biases(
    experts: FactorizedExperts, axes: Mapping[str, CutAxis | None], boundary: Boundary
) -> None:
    """Cut the biases of experts whose layers are cut, and tell the experts.

    Args:
        experts: whose layers are cut already.
        axes: the axis of every bias that is cut, by name; None for whole ones.
        boundary: of the experts.
    """
    for bias, axis in axes.items():
        _put(experts, bias, axis, boundary)
    experts.boundary, experts.cut_biases = boundary, axes
    experts.plan_ahead()


def layers_of(experts: FactorizedExperts, name: str) -> dict[str, MuMoE]:
    """The layers of experts by role.

    Raises:
        SpecError: something around one of them, as an adapter is.
    """
    layers: dict[str, MuMoE] = {}
    for role, layer in experts.projections.items():
        if isinstance(layer, MuMoE):
            layers[role] = layer
        else:
            raise SpecError(
                f"experts that are cut must have their own projections; got "
                f"{named(layer, at(name, f'projections.{role}'))}. Take adapters off first."
            )
    return layers


def _legs_of_rows(layer: MuMoE, request: Request) -> list[str]:
    """Legs of linear experts behind a router: of the bonds, which make no slices, or the output."""
    network = layer.spec.network
    bonds = [
        leg for leg in network.shardable_legs if leg not in (*network.expert_legs, INPUT, OUTPUT)
    ]
    if request.leg is not None:
        return [leg for leg in (*bonds, OUTPUT) if leg == request.leg]
    compared = compare_legs(network, request.devices, itemsize=layer.dtype.itemsize)
    found = [each.leg for each in compared if each.leg in bonds]
    return found or [OUTPUT]


def _check_hidden(features: int, devices: int) -> None:
    if features % devices:
        raise SpecError(
            f"hidden features must be a multiple of the {devices} devices; got {features}. Take "
            "another size, or another number of devices."
        )


def cut_factors(layer: Mixture, part: Part, name: str) -> Do:
    """Cut the factors of a layer."""
    factors = layer.factors
    if isinstance(factors, RoundedFactors):
        raise SpecError(
            f"factors must be floating-point to be cut over devices; got some of {factors.bits} "
            f"bits in {name!r}. Call dequantize() first."
        )
    if isinstance(factors, Factors):
        check_own(factors, [*layer.spec.shapes], name)
    if type(factors) is not Factors:
        raise SpecError(
            f"factors must be the layer's own to be cut; got a {type(factors).__qualname__} around "
            f"them in {name!r}. Take adapters off, and cut layers before fully_shard."
        )
    part.config.plan_ahead()

    def cut() -> None:
        for full, axis in part.axes.items():
            short = full.removeprefix("factors.")
            factors[short] = _distributed(factors[short], axis, part)
        factors.part = part

    return cut


def _whole(gate: Copied, boundary: Boundary, name: str) -> Do:
    """A gate or router that every device has."""
    names = [short for short, _ in gate.named_parameters()]
    check_own(gate, names, name)

    def replicate() -> None:
        for short in names:
            _put(gate, short, None, boundary)
        gate.boundary = boundary

    return replicate


def _put(module: nn.Module, name: str, axis: CutAxis | None, boundary: Boundary) -> None:
    module.register_parameter(name, _distributed(module._parameters[name], axis, boundary))


def check_own(module: nn.Module, names: list[str], place: str, others: bool = True) -> None:
    """Refuse parameters that are computed, sharded already, or besides a module's own."""
    held = stored(module, names)
    more = [name for name, _ in module.named_parameters() if name not in held]
    if others and more:
        raise SpecError(
            f"a layer that is cut must have its own parameters alone; got {', '.join(more)} "
            f"besides in {place!r}. Cut it before others are added."
        )
    for name, each in held.items():
        if is_sharded(each):
            raise SpecError(
                f"a layer must be whole to be cut; got {name!r} as a DTensor in {place!r}. Cut "
                "each layer once, and before fully_shard."
            )


def _distributed(held: Tensor | None, axis: CutAxis | None, boundary: Boundary) -> nn.Parameter:
    """A parameter on all devices, or its slices; values are those of the first process."""
    assert held is not None
    values = held.detach()
    placement: Placement = Replicate()
    if axis is not None:
        place = axis.axis
        if axis.pieces > 1:
            # halves on an axis of their own: a slice of each is then a slice of the whole
            shape = values.shape
            values = values.reshape(
                *shape[:place], axis.pieces, shape[place] // axis.pieces, *shape[place + 1 :]
            )
            place += 1
        placement = Shard(place)
    made: Tensor = distribute_tensor(values, boundary.mesh, [placement])
    if axis is None and boundary.apart:
        made = held_here(made)
    return nn.Parameter(made, requires_grad=held.requires_grad)


def at(name: str, short: str) -> str:
    """Path of what is in a module."""
    return f"{name}.{short}" if name else short


def named(module: nn.Module, name: str) -> str:
    return f"{type(module).__name__} at {name!r}" if name else type(module).__name__
