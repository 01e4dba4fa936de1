"""Layers cut over the processes of a test, beside whole ones: outputs, gradients, what is sent."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tensormoe_torch.parallel import parallelize, parallelize_experts
from tests.torch._helpers import randomize

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@cache
def mesh() -> DeviceMesh:
    """All processes, in a line."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))


def pair(module: Any, leg: str | None = None) -> tuple[Any, Any]:
    """A module, and an equal one that is cut."""
    return module, parallelize(copy.deepcopy(module), mesh(), leg)


def spread_pair(module: Any) -> tuple[Any, Any]:
    """A module, and an equal one whose experts are spread."""
    return module, parallelize_experts(copy.deepcopy(module), mesh())


def scaled(module: nn.Module) -> Any:
    """Random parameters, small ones where there are many of them."""
    randomize(module)
    with torch.no_grad():
        for each in module.parameters():
            each.mul_(each.shape[-1] ** -0.5)
    return module


def whole(array: Any, like: Tensor | None = None) -> Tensor:
    """All entries, in the shape of another tensor."""
    found: Tensor = array.full_tensor() if isinstance(array, DTensor) else array
    return found if like is None else found.reshape(like.shape)


def assert_near(found: Any, wanted: Tensor, name: str = "", tolerance: float | None = None) -> None:
    """Equal up to rounding, relative to the largest entry."""
    found = whole(found, wanted)
    limit = TOLERANCE[wanted.dtype] if tolerance is None else tolerance
    scale = wanted.abs().max().item() if wanted.numel() else 1.0
    error = (found - wanted).abs().max().item() if wanted.numel() else 0.0
    assert error <= limit * max(scale, 1e-30), f"{name}: {error} of {scale}"


def gradients(module: nn.Module, inputs: Mapping[str, Tensor], output: Tensor) -> dict[str, Any]:
    """Gradients of a loss whose derivatives differ everywhere, by inputs and parameters."""
    sources = {name: each for name, each in inputs.items() if each.requires_grad}
    sources |= {name: each for name, each in module.named_parameters() if each.requires_grad}
    weights = torch.arange(1.0, output.numel() + 1).reshape(output.shape).to(output.dtype)
    loss = (output * weights.sin()).sum()
    found = torch.autograd.grad(loss, [*sources.values()], allow_unused=True)
    return dict(zip(sources, found, strict=True))


def assert_alike(
    module: nn.Module, cut: nn.Module, call: Any, inputs: Mapping[str, Tensor], **options: Any
) -> None:
    """Outputs and all gradients are those of the whole module.

    Args:
        module: the whole one.
        cut: the other.
        call: from a module and inputs by name to the output.
        inputs: by name.
        options: ``tolerance``.
    """
    results = []
    for each in (module, cut):
        given = {
            name: array.clone().requires_grad_(array.dtype.is_floating_point)
            for name, array in inputs.items()
        }
        output = call(each, given)
        results.append((output.detach(), gradients(each, given, output)))
    (wanted, wanted_grads), (found, found_grads) = results
    assert_near(found, wanted, "output", **options)
    assert wanted_grads.keys() == found_grads.keys()
    for name, grad in wanted_grads.items():
        if grad is None:
            other = found_grads[name]
            assert other is None or not whole(other).any(), name
        else:
            assert_near(found_grads[name], grad, name, **options)


class Sent(TorchDispatchMode):
    """Collects collectives: kind and bytes of the result, whole for an all-gather."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what it does is seen
        made = function(*args, **(kwargs or {}))
        name = str(function)
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"):
            if f"c10d_functional.{kind}" in name:
                self.calls.append((kind.replace("_", "-"), made.numel() * made.itemsize))
        return made


@contextmanager
def sent() -> Iterator[list[tuple[str, int]]]:
    """The collectives of a block of code, and of backward passes in it."""
    with Sent() as seen:
        yield seen.calls


def call(module: Any, held: Any) -> Tensor:
    made: Tensor = module(held["x"])
    return made
