"""One device's part of a layer that is cut along a leg, and of what is made of such layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from tensormoe.errors import BackendError
from tensormoe.factorizations import INPUT, OUTPUT
from tensormoe.functional import CutAxis, EachExpert, LayerConfig, cut_axes, part_operands
from tensormoe.gates import OneExpert, TopK
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._collectives import agreed, joined, sliced, spread, summed

One = Tensor | TopK | OneExpert | EachExpert


class Boundary:
    """Arrays that come into what is spread over the devices of a mesh, and that leave it.

    Args:
        mesh: of one dimension.
        output: placement of outputs; None for whole ones, of DTensors as slices where they are.

    Attributes:
        apart: whether each device has a batch of its own. What all devices have is then a plain
            parameter, whose gradient is a term of data-parallel's sum.
    """

    apart = False

    def __init__(self, mesh: DeviceMesh, output: Placement | None = None) -> None:
        self.mesh = mesh
        self.output = output

    def __deepcopy__(self, memo: dict[int, Any]) -> Boundary:
        # a copy of a layer is on the same devices
        return self

    @property
    def devices(self) -> int:
        """P, the number of devices."""
        return int(self.mesh.size())

    @property
    def position(self) -> int:
        """Of this device among them."""
        return int(self.mesh.get_local_rank())

    def parameter(self, held: Tensor, axis: CutAxis | None) -> Tensor:
        """This device's array of a parameter, whose gradient is the parameter's."""
        if self.apart and axis is None and not isinstance(held, DTensor):
            return held
        if not isinstance(held, DTensor) or (
            not torch.compiler.is_compiling() and held.device_mesh != self.mesh
        ):
            raise BackendError(
                "parameters of a layer that is cut over devices must be DTensors on its mesh; got "
                f"{_placed(held)}. Under fully_shard, call the sharded module itself, or register "
                "the method with register_fsdp_forward_method."
            )
        local = held.to_local()
        if axis is None:
            return spread(local, self.mesh)
        if axis.pieces == 1:
            return local
        return local.flatten(axis.axis, axis.axis + 1)

    def whole(self, x: Tensor) -> Tensor:
        """An input on every device, as a plain tensor."""
        if isinstance(x, DTensor):
            self._check(x, "an input", (Replicate(), Shard(x.ndim - 1)))
            return x.redistribute(placements=[Replicate()]).to_local()
        return x

    def enter(self, x: Tensor, axis: int | None = None) -> Tensor:
        """A whole input for use in parts; with an axis, its slice along it."""
        if isinstance(x, DTensor):
            last = Shard(x.ndim - 1)
            self._check(x, "an input", (Replicate(),) if axis is None else (Replicate(), last))
            if not x.dtype.is_floating_point:
                return x.to_local()
            if axis is None:
                # its gradient is a term of a sum, as behind PyTorch's own parallel layers
                return x.to_local(grad_placements=[Partial()])
            return x.redistribute(placements=[last]).to_local()
        if not x.dtype.is_floating_point:
            return x
        return spread(x, self.mesh) if axis is None else sliced(x, axis, self.mesh)

    def given(self, given: One) -> One:
        """Coefficients for use in parts."""
        if isinstance(given, TopK):
            return TopK(given.indices, self.enter(given.values))
        return self.enter(given) if isinstance(given, Tensor) else given

    def leave(self, made: Tensor, like: Tensor, axis: int | None = None) -> Tensor:
        """An output from the parts' terms of a sum, or from slices along an axis.

        Args:
            made: by this device.
            like: the input; the output of a DTensor is one.
            axis: of slices.
        """
        own = Partial() if axis is None else Shard(axis % made.ndim)
        if self.output is None and not isinstance(like, DTensor):
            return summed(made, self.mesh) if axis is None else joined(made, axis, self.mesh)
        wanted = self.output
        if wanted is None:
            if axis is None:
                return DTensor.from_local(summed(made, self.mesh), self.mesh, [Replicate()])
            wanted = own
        found = DTensor.from_local(made, self.mesh, [own], run_check=False)
        return found.redistribute(placements=[wanted])

    def entered(self, x: Tensor, given: Any) -> tuple[Tensor, Any]:
        """An input and coefficients, one or a sequence of them, for use in parts."""
        levels = isinstance(given, list | tuple)
        return self.enter(x), [self.given(each) for each in given] if levels else self.given(given)

    def agreed(self, drawn: Tensor) -> Tensor:
        """The first device's random draw, on all of them."""
        return agreed(drawn, self.mesh)

    def dropout(self, x: Tensor, share: float, *, slices: bool) -> Tensor:
        """Dropout in training: of whole outputs, or of slices along their last axis.

        Processes may draw different numbers, or all the same: outputs stay whole, and entries of
        different slices are dropped independently of each other.
        """
        width = x.shape[-1]
        count = width * self.devices if slices else width
        shape = (*x.shape[:-1], count)
        kept = torch.rand(shape, device=x.device, dtype=torch.float32) >= share
        if slices:
            kept = kept.narrow(-1, self.position * width, width)
        else:
            kept = self.agreed(kept.to(torch.uint8)).bool()
        return x * kept.to(x.dtype) / (1.0 - share if share < 1.0 else 1.0)

    def _check(self, x: DTensor, name: str, wanted: Sequence[Placement]) -> None:
        if x.device_mesh != self.mesh or x.placements[0] not in wanted:
            raise BackendError(
                f"{name} of a layer that is cut over devices must be plain, or a DTensor on its "
                f"mesh, {' or '.join(map(str, wanted))}; got {_placed(x)}. Redistribute it, or "
                "parallelize the layer by MuMoEParallel(input_layouts=…)."
            )


class Part(Boundary):
    """One device's part of a layer that is cut along one leg.

    Args:
        config: of the part, as ``LayerConfig.shard`` makes it.
        mesh: of one dimension.
        pieces: 2 where the outputs are the halves of gated units, which are cut each.
        inside: whether inputs and outputs stay parts, as hidden features do.
        output: as of a :class:`Boundary`.
    """

    def __init__(
        self,
        config: LayerConfig,
        mesh: DeviceMesh,
        pieces: int = 1,
        inside: bool = False,
        output: Placement | None = None,
    ) -> None:
        super().__init__(mesh, output)
        self.config = config
        self.pieces = pieces
        self.inside = inside
        # no compiler has to follow what is computed once
        network = config.spec.network
        for each in (network, network.whole):
            _ = each.expert_legs, each.all_factors, each.sizes
        _ = self.axes

    def called(self, config: LayerConfig, given: object) -> LayerConfig:
        """The configuration that fits coefficients of a call: the whole layer's.

        Args:
            config: of the whole layer.
            given: the coefficients.
        """
        return config

    @property
    def leg(self) -> str:
        """That is cut."""
        cut = self.config.spec.network.cut
        assert cut is not None
        return cut.leg

    @cached_property
    def axes(self) -> Mapping[str, CutAxis | None]:
        """Axis of every factor that is cut, by canonical name."""
        return {
            name: each and CutAxis(each.axis, self.pieces)
            for name, each in cut_axes(self.config).items()
            if name.startswith("factors.")
        }

    @property
    def in_features(self) -> int:
        """Size of the inputs that the layer is called with."""
        spec = self.config.spec
        return (spec if self.inside else spec.network.whole).in_features

    def arrays(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This device's arrays of the factors."""
        return {name: self.parameter(held[name], axis) for name, axis in self.axes.items()}

    def operands(
        self, held: Mapping[str, Tensor], x: Tensor, given: Sequence[One]
    ) -> tuple[dict[str, Tensor], Tensor, list[Any]]:
        """Operands with which the part runs as a layer: merged rows, and their coefficients.

        Args:
            held: the factors by canonical name.
            x: (..., in), or ids (...); a device's slice where :attr:`inside`.
            given: coefficients (..., N_e) per level.
        """
        network, arrays = self.config.spec.network, self.arrays(held)
        if not self.inside:
            cuts_input = self.leg == INPUT and not self.config.indexed_input
            x = self.enter(x, -1 if cuts_input else None)
            given = [
                self._level(each, leg == self.leg)
                for each, leg in zip(given, network.expert_legs, strict=True)
            ]
        lead = x.shape if self.config.indexed_input else x.shape[:-1]
        rows = x.reshape(prod(lead), *x.shape[len(lead) :])
        merged = [_merged(each, prod(lead)) for each in given]
        return part_operands(self.config, arrays, rows, merged, self.position, BACKEND)

    def _level(self, given: One, cut: bool) -> One:
        """Coefficients of one level, which may be the one that is cut."""
        if cut and isinstance(given, Tensor):
            return self.enter(given, -1)
        return self.given(given)

    def each_operands(
        self, held: Mapping[str, Tensor], x: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The same for rows (experts…, rows, in) of every expert."""
        arrays, levels = self.arrays(held), self.config.spec.network.expert_legs
        if self.leg in levels:
            # rows that all experts share are whole
            return arrays, self.enter(x, levels.index(self.leg) if x.ndim > 2 else None)
        if not self.inside:
            x = self.enter(x, -1 if self.leg == INPUT else None)
        arrays, x, _ = part_operands(self.config, arrays, x, [], self.position, BACKEND)
        return arrays, x

    def result(self, made: Tensor, like: Tensor, each: bool = False) -> Tensor:
        """The layer's output of what the part made.

        Args:
            made: (..., out).
            like: the input.
            each: whether it is (experts…, rows, out), of every expert.
        """
        if self.inside:
            return made
        levels = self.config.spec.network.expert_legs
        if each and self.leg in levels:
            return self.leave(made, like, levels.index(self.leg))
        return self.leave(made, like, -1 if self.leg == OUTPUT else None)


def _merged(given: One, count: int) -> Any:
    if isinstance(given, OneExpert):
        return OneExpert(given.indices.reshape(count), given.counts)
    if isinstance(given, TopK):
        k = given.values.shape[-1]
        return TopK(given.indices.reshape(count, k), given.values.reshape(count, k))
    assert isinstance(given, Tensor)
    return given.reshape(count, given.shape[-1])


def _placed(array: Tensor) -> str:
    if not isinstance(array, DTensor):
        return "a plain tensor"
    return f"{', '.join(map(str, array.placements))} on {array.device_mesh}"
