"""Parameters that are sharded over processes: PyTorch's DTensors, as ``fully_shard`` makes.

Whatever reads such a parameter as a whole is a collective call: every process makes it.
"""

from __future__ import annotations

import sys
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tensormoe._rounding import CODES
from tensormoe.checkpoint import save_checkpoint
from tensormoe.checkpoint._format import file_order
from tensormoe.errors import SpecError

if TYPE_CHECKING:
    from tensormoe_torch._parts import Boundary


def is_sharded(array: object) -> bool:
    """Whether ``array`` is a DTensor: a part here, the others in other processes."""
    # who has one has imported the module, which not every build of PyTorch has
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(array, tensors.DTensor)


def held_here(array: Tensor) -> Tensor:
    """This process's part of a tensor; the tensor itself where it is not sharded."""
    held: Any = array
    found: Tensor = held.to_local() if is_sharded(array) else array
    return found


def gathered(array: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """All entries of a tensor in this process: the tensor itself where it is not sharded.

    A gradient of what is gathered is one of the shards.

    Args:
        array: the tensor.
        shape: of the whole factor, where halves of gated units may have an axis of their own.
    """
    if not is_sharded(array):
        return array
    held: Any = array
    # offloaded shards are gathered on the mesh's device, where the processes communicate
    found: Tensor = held.to(held.device_mesh.device_type).full_tensor()
    return found if shape is None else found.reshape(shape)


class Loads(nn.Module):
    """Modules whose own parameters are loaded from whole tensors, also where they are cut."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            values = state_dict.get(f"{prefix}{name}")
            if isinstance(values, Tensor):
                state_dict[f"{prefix}{name}"] = _fitted(values, parameter)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class Copied(Loads):
    """Gates and routers, of which every device has a whole one where a layer is cut.

    Attributes:
        boundary: of that layer; None elsewhere.
    """

    boundary: Boundary | None = None

    def _whole(self, array: Tensor) -> Tensor:
        """An input or a parameter, as a plain tensor."""
        return array if self.boundary is None else self.boundary.whole(array)

    def _agreed(self, drawn: Tensor) -> Tensor:
        """A random draw, the same on every device."""
        return drawn if self.boundary is None else self.boundary.agreed(drawn)


def _fitted(values: Tensor, parameter: Tensor) -> Tensor:
    """Values that are loaded into a parameter, as a plain tensor or as a DTensor like it."""
    shape = parameter.shape
    if is_merged(values.shape, shape):
        values = values.reshape(shape)
    if not is_sharded(parameter) or is_sharded(values) or values.shape != shape:
        return values
    from torch.distributed.tensor import distribute_tensor

    held: Any = parameter
    if held.device_mesh.ndim > 1:
        return values  # PyTorch's own error: its loaders know what to do
    # every process has all values
    return distribute_tensor(
        values.to(parameter.device), held.device_mesh, held.placements, src_data_rank=None
    )


def is_merged(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether one shape is the other with two neighbouring axes merged, the first of them of 2.

    A factor that makes the halves of gated units has an axis for them where it is cut over devices.
    """
    long, short = (tuple(a), tuple(b)) if len(a) > len(b) else (tuple(b), tuple(a))
    return len(long) == len(short) + 1 and any(
        long[axis] == 2 and (*long[:axis], 2 * long[axis + 1], *long[axis + 2 :]) == short
        for axis in range(len(short))
    )


def sized(array: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """An array for comparisons of shapes: of this one where it only differs by merged axes."""
    if shape is None or not is_merged(array.shape, shape):
        return array
    return torch.empty(shape, device="meta")


def stored(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """A module's own parameters by name, to be written in place.

    Raises:
        SpecError: one that is computed from others.
    """
    # a state dict has the shards also where the whole is in the module's place, from the last call
    held = module.state_dict(keep_vars=True)
    for name in names:
        if f"{name}.{CODES}" in held:
            raise SpecError(
                f"factors must be floating-point to be changed; got codes of few bits for "
                f"{name!r}. Call dequantize() of the layer or of its experts first, and "
                "quantize(…) afterwards."
            )
        if not isinstance(held.get(name), nn.Parameter):
            raise SpecError(
                f"parameters must be stored under their own names to be changed; got a computed "
                f"{name!r}. Take its pruning, parametrization or adapter off first, or change what "
                "it is computed from."
            )
    return {name: held[name] for name in names}


@torch.no_grad()
def put(parameter: Tensor, values: Tensor) -> None:
    """Write a parameter in place, all of it; of a sharded one, what the first process has."""
    if not is_sharded(parameter):
        parameter.copy_(values)
        return
    from torch.distributed.tensor import Replicate, distribute_tensor

    held: Any = parameter
    mesh = held.device_mesh
    # replicas must stay equal, also where processes draw or compute different values
    values = values.detach().reshape(held.shape)
    whole = distribute_tensor(values, mesh, [Replicate()] * mesh.ndim)
    held.to_local().copy_(whole.redistribute(placements=held.placements).to_local())


@contextmanager
def opened(
    parameters: Sequence[Tensor], shapes: Sequence[tuple[int, ...] | None] | None = None
) -> Iterator[list[Tensor]]:
    """Parameters as whole tensors that can be edited in place.

    Those of sharded ones are written back on leaving, unless by an exception.

    Args:
        parameters: plain or sharded.
        shapes: of whole ones; their own by default.
    """
    shapes = [None] * len(parameters) if shapes is None else shapes
    whole = [gathered(*pair) for pair in zip(parameters, shapes, strict=True)]
    yield whole
    for parameter, values in zip(parameters, whole, strict=True):
        if values is not parameter:
            put(parameter, values)


def save_whole(
    path: str | PathLike[str],
    kind: str,
    config: Mapping[str, Any],
    arrays: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    bits: int | None = None,
) -> None:
    """Write a checkpoint of arrays of which some may be sharded.

    Then every process makes this call, the first of those that share the arrays writes, and all
    wait until it has. One array is gathered after the other. Where nothing is sharded, each process
    writes for itself.

    Args:
        path: the file.
        kind: class name of the block.
        config: plain values that rebuild it.
        arrays: by name.
        shapes: in the file, by name; those of the arrays by default.
        bits: 8 or 4 where factors are given as codes and scales.

    Raises:
        CheckpointError: as ``checkpoint.save_checkpoint``; in every process that made the call.
    """
    # in the order of the names, which is the same everywhere
    meshes: list[Any] = list(
        dict.fromkeys(each.device_mesh for each in arrays.values() if is_sharded(each))  # type: ignore[attr-defined]
    )
    if not meshes:
        save_checkpoint(path, kind, config, arrays, bits)
        return
    writes = not any(place for mesh in meshes for place in mesh.get_coordinate())
    whole = _Gathered(arrays, shapes)
    outcome: list[Exception | None] = [None]
    if writes:
        try:
            save_checkpoint(path, kind, config, whole, bits)
        except Exception as error:
            outcome = [error]
    # the others take part, also if the first one cannot write
    whole.finish()
    for mesh in meshes:
        for axis in range(mesh.ndim):
            # along one axis after the other, so that it comes to all
            dist.broadcast_object_list(outcome, group=mesh.get_group(axis), group_src=0)
    if outcome[0] is not None:
        raise outcome[0]


class _Gathered(Mapping[str, Tensor]):
    """Arrays by name, each gathered when it is taken, in the order of the file.

    As items they are tensors without values where they would have to be gathered.
    """

    def __init__(
        self, arrays: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None
    ) -> None:
        self._arrays = arrays
        self._shapes = shapes or {}
        self._left = [name for name in file_order(arrays) if is_sharded(arrays[name])]

    def __getitem__(self, name: str) -> Tensor:
        array = self._arrays[name]
        if not is_sharded(array):
            return array
        # other processes gather in this order
        assert self._left[0] == name
        self._left.pop(0)
        return gathered(array, self._shapes.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def items(self) -> ItemsView[str, Tensor]:
        """Names with shapes and dtypes; no values of arrays that are sharded."""
        found = {}
        for name, array in self._arrays.items():
            shape = self._shapes.get(name, tuple(array.shape))
            meta = torch.empty(shape, dtype=array.dtype, device="meta")
            found[name] = meta if is_sharded(array) else array
        return found.items()

    def finish(self) -> None:
        """Gather what nobody took, as other processes do."""
        while self._left:
            gathered(self._arrays[self._left.pop(0)])
