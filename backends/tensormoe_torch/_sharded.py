"""Parameters that are sharded over processes: PyTorch's DTensors, as ``fully_shard`` makes.

Whatever reads such a parameter as a whole is a collective call: every process makes it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tensormoe.checkpoint import save_checkpoint
from tensormoe.errors import SpecError


def is_sharded(array: object) -> bool:
    """Whether ``array`` is a DTensor: a part here, the others in other processes."""
    # who has one has imported the module, which not every build of PyTorch has
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(array, tensors.DTensor)


def gathered(array: Tensor) -> Tensor:
    """All entries of a tensor in this process: the tensor itself where it is not sharded.

    A gradient of what is gathered is one of the shards.
    """
    if not is_sharded(array):
        return array
    held: Any = array
    # offloaded shards are gathered on the mesh's device, where the processes communicate
    found: Tensor = held.to(held.device_mesh.device_type).full_tensor()
    return found


def stored(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """A module's own parameters by name, to be written in place.

    Raises:
        SpecError: one that is computed from others.
    """
    # a state dict has the shards also where the whole is in the module's place, from the last call
    held = module.state_dict(keep_vars=True)
    for name in names:
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
    whole = distribute_tensor(values.detach(), mesh, [Replicate()] * mesh.ndim)
    held.to_local().copy_(whole.redistribute(placements=held.placements).to_local())


@contextmanager
def opened(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters as whole tensors that can be edited in place.

    Those of sharded ones are written back on leaving, unless by an exception.
    """
    whole = [gathered(parameter) for parameter in parameters]
    yield whole
    for parameter, values in zip(parameters, whole, strict=True):
        if values is not parameter:
            put(parameter, values)


def save_whole(
    path: str | PathLike[str],
    kind: str,
    config: Mapping[str, Any],
    arrays: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint of arrays of which some may be sharded.

    Then every process makes this call, the first of those that share the arrays writes, and all
    wait until it has. Where nothing is sharded, each process writes for itself.

    Raises:
        CheckpointError: as ``checkpoint.save_checkpoint``; in every process that made the call.
    """
    # in the order of the names, which is the same everywhere
    meshes: list[Any] = list(
        dict.fromkeys(each.device_mesh for each in arrays.values() if is_sharded(each))  # type: ignore[attr-defined]
    )
    if not meshes:
        save_checkpoint(path, kind, config, arrays)
        return
    writes = not any(place for mesh in meshes for place in mesh.get_coordinate())
    whole = {}
    for name, array in arrays.items():
        found = gathered(array)
        if writes:
            whole[name] = found
    outcome: list[Exception | None] = [None]
    if writes:
        try:
            save_checkpoint(path, kind, config, whole)
        except Exception as error:
            outcome = [error]
    for mesh in meshes:
        for axis in range(mesh.ndim):
            # along one axis after the other, so that it comes to all
            dist.broadcast_object_list(outcome, group=mesh.get_group(axis), group_src=0)
    if outcome[0] is not None:
        raise outcome[0]
