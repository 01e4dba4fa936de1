"""Experts spread over devices, each with tokens of its own: expert parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tensormoe.errors import SpecError
from tensormoe.functional import CutAxis
from tensormoe_torch._exchange import Exchange, ExpertPart
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.mixtures import SparseMoE
from tensormoe_torch.mixtures._base import MixtureModule
from tensormoe_torch.parallel._cut import (
    Do,
    at,
    check_alone,
    check_own,
    cut_biases,
    cut_factors,
    layers_of,
    named,
)
from tensormoe_torch.parallel._parallelize import checked_mesh

M = TypeVar("M", bound=nn.Module)


def parallelize_experts(module: M, mesh: DeviceMesh) -> M:
    """Spread the experts of all sparse mixtures in a module over the devices of a mesh, in place.

    Each of P devices has N / P experts of every :class:`SparseMoE` and of the experts of compressed
    models, and each process has tokens of its own, as in data-parallel training. A call sends every
    chosen row to the device that has its expert, runs it there, and sends the output back: an
    all-to-all of counts, one of rows and one of outputs, whatever the factorization and however
    uneven the load (GShard, Lepikhin et al. 2020, arXiv 2006.16668). No token is dropped.

    Factors and biases that have the experts' leg become DTensors, ``Shard`` along it. Their
    gradients are complete: of the sum of all processes' losses. Everything else stays a plain
    parameter on every device, routers, shared experts and factors without that leg, such as CP's
    input and output factors; their gradients are this process's terms of the same sum, for
    data-parallel training to add up as those of any other parameter.

    Every process of the mesh makes this call, on equal modules, before ``fully_shard``; then each
    call of the module, with an empty batch where it has no tokens, and each backward pass.
    ``config`` and ``repr`` are those of the whole mixture, and ``save`` writes the whole file.

    Args:
        module: a :class:`SparseMoE`, or any module with some inside, or a compressed model.
        mesh: of one dimension, that of the processes with batches of their own.

    Returns:
        The module.

    Raises:
        SpecError: no such experts, a number of them that the devices do not divide, a router with a
            capacity, experts that are cut or sharded already, have parameters that are computed or
            another module's too, or adapters; a mixture of another kind; or a mesh of more than one
            dimension.
        TypeError: not a module or not a mesh.

    >>> import torch
    >>> from tensormoe_torch import SparseMoE
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> mesh = init_device_mesh("cpu", (8,))  # doctest: +SKIP
    >>> layer = SparseMoE(64, 128, experts=32, top_k=2)
    >>> layer = parallelize_experts(layer, mesh)  # doctest: +SKIP
    >>> layer(torch.ones(5, 64)).shape  # doctest: +SKIP
    torch.Size([5, 64])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {type(module).__qualname__}.")
    checked = checked_mesh(mesh)
    found = list(_found(module, ""))
    if not found:
        raise SpecError(
            "module must have a SparseMoE or the experts of a compressed model; got a "
            f"{type(module).__name__} without. parallelize(module, mesh) cuts other layers."
        )
    todo = [each for name, experts in found for each in _spread(experts, name, checked)]
    check_alone(
        module,
        [
            (at(name, short), part)
            for name, experts in found
            for short, part in experts.named_modules()
        ],
    )
    for each in todo:
        each()
    return module


def _found(module: nn.Module, name: str) -> Iterator[tuple[str, FactorizedExperts]]:
    """Experts that are to be spread, by name."""
    if isinstance(module, FactorizedExperts):
        yield name, module
    elif isinstance(module, SparseMoE):
        capacity = module.config.router.capacity
        if capacity is not None:
            raise SpecError(
                "a router must have no capacity where experts are spread over devices, since a "
                f"process would count its own tokens alone; got {capacity} in "
                f"{named(module, name)}. Build it with Router(capacity=None)."
            )
        yield at(name, "experts"), module.experts
    elif isinstance(module, MixtureModule):
        raise SpecError(
            "mixtures whose experts are spread over devices must be a SparseMoE; got "
            f"{named(module, name)}. Spread the other modules one by one."
        )
    else:
        for short, child in module.named_children():
            yield from _found(child, at(name, short))


def _spread(experts: FactorizedExperts, name: str, mesh: DeviceMesh) -> Iterator[Do]:
    """Steps that spread experts; nothing is done yet."""
    layers, devices = layers_of(experts, name), mesh.size()
    count = experts.down_proj.spec.num_experts
    if count % devices:
        raise SpecError(
            f"experts must be a multiple of the {devices} devices; got {count} in "
            f"{named(experts, name)}. Take another number of experts or of devices."
        )
    for role, layer in layers.items():
        (leg,) = layer.spec.network.expert_legs
        part = ExpertPart(layer.config.shard(leg, devices), mesh)
        yield cut_factors(layer, part, at(name, f"projections.{role}"))
    held = [short for short, _ in experts.named_parameters(recurse=False)]
    check_own(experts, held, name, others=False)
    yield lambda: cut_biases(experts, dict.fromkeys(held, CutAxis(0)), Exchange(mesh))
