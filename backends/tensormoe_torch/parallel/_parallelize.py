"""All layers of a module cut over the devices of a mesh."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tensormoe.errors import SpecError
from tensormoe_torch._base import Mixture
from tensormoe_torch._mlp import MuMoEMLP
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.parallel._cut import HIDDEN, Request, cuts

M = TypeVar("M", bound=nn.Module)


def parallelize(module: M, mesh: DeviceMesh, leg: str | None = None) -> M:
    """Cut all layers of the library in a module over the devices of a mesh, in place.

    Each layer is cut along one leg of its network (``layer.spec.network.shardable_legs``): factors
    that have the leg become slices, and each device runs the same layer with a smaller leg. Layers
    of their own (:class:`MuMoE`, :class:`MuMoEEmbedding`) are cut along the leg that
    :func:`tensormoe.planning.compare_legs` predicts to be the fastest. Blocks (:class:`MuMoEMLP`)
    and the experts of mixtures and compressed models are cut along their hidden features, and sum
    over the devices once per call.

    Parameters become DTensors on the mesh: ``Shard`` where a factor has the leg, ``Replicate``
    elsewhere and for gates and routers. Their values are those of the first process. In the first
    layer of gated units, a factor of the outputs gets an axis of 2 for the halves, of which each
    device has a slice. Inputs and outputs stay plain tensors, the same on all devices; a DTensor
    comes out where a DTensor goes in. ``config``, ``repr``, ``plan`` and ``cost`` are those of the
    whole layer, and ``save`` writes the whole layer's file; one device's share is
    ``layer.config.shard(leg, devices)``.

    Every process of the mesh makes this call, on equal modules, before ``fully_shard``. Layers that
    have no such leg stay as they are; if it is none of them, nothing is changed.

    Args:
        module: a layer, or any module with layers inside.
        mesh: of one dimension, as ``mesh["tensor"]`` is of a larger one.
        leg: ``"r"``, ``"i"``, ``"o"``, ``"n0"``, …, for layers of their own that have it;
            ``"hidden"`` for blocks and experts; None for all, along the best leg of each.

    Returns:
        The module.

    Raises:
        SpecError: no layer with the leg, one that the devices do not divide, a layer that is cut or
            sharded already, has parameters that are computed or another module's too, or whose
            activation mixes hidden features; a mixture of another kind; or a mesh of more than one
            dimension.
        TypeError: not a module or not a mesh.

    >>> import torch
    >>> from tensormoe_torch import MuMoE
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> mesh = init_device_mesh("cpu", (8,))  # doctest: +SKIP
    >>> layer = parallelize(MuMoE(64, 64, experts=32, rank=16), mesh, "r")  # doctest: +SKIP
    >>> layer(torch.ones(5, 64)).shape  # doctest: +SKIP
    torch.Size([5, 64])
    """
    return run(module, Request(checked_mesh(mesh), leg))


def run(module: M, request: Request) -> M:
    """Cut all layers of a module as requested, or none of them.

    Raises:
        SpecError, TypeError: as :func:`parallelize`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {type(module).__qualname__}.")
    found = cuts(module, request)
    if not found:
        what = "a layer of the library" if request.leg is None else f"a leg {request.leg!r}"
        raise SpecError(
            f"module must have {what} to be cut; got a {type(module).__qualname__} with "
            f"{_legs(module)}. Name another leg or none, or another module."
        )
    for each in found:
        each()
    return module


def _legs(module: nn.Module) -> str:
    layers = [each for each in module.modules() if isinstance(each, Mixture)]
    found = dict.fromkeys(leg for each in layers for leg in each.spec.network.shardable_legs)
    if any(isinstance(each, MuMoEMLP | FactorizedExperts) for each in module.modules()):
        found[HIDDEN] = None
    return f"legs {', '.join(map(repr, found))}" if found else "none"


def checked_mesh(mesh: object) -> DeviceMesh:
    """A mesh of one dimension that this process is part of.

    Raises:
        SpecError, TypeError: it is not.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh must be a DeviceMesh, as init_device_mesh makes; got {type(mesh).__qualname__}."
        )
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        which = f"mesh[{names[-1]!r}]" if names else "init_device_mesh(…, mesh_dim_names=…)"
        raise SpecError(
            f"mesh must have one dimension; got {mesh.ndim}, {tuple(mesh.shape)}. Take one of "
            f"them, as {which}; fully_shard takes the others."
        )
    if mesh.get_coordinate() is None:
        raise SpecError(
            f"mesh must have this process; got {mesh} in process {dist.get_rank()}. Call "
            "parallelize in the processes of the mesh alone."
        )
    return mesh
