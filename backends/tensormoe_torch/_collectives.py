"""Communication between the devices of a mesh, differentiable any number of times.

An array is either *whole*, equal on all devices, or each device has one of its own: a term of a
sum, a slice, or rows of its batch. Each function leads from one to the other, and its derivative is
the one that leads back. They are functional collectives, which compilers follow.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def spread(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """A whole array for use on every device: the sum of their gradients is its gradient."""
    return _applied(_Spread, whole, mesh)


def summed(term: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the devices' terms, whole: one all-reduce."""
    return _applied(_Summed, term, mesh)


def sliced(whole: Tensor, axis: int, mesh: DeviceMesh) -> Tensor:
    """A device's own slice of a whole array; the gradient is joined by one all-gather."""
    return _applied(_Sliced, whole, mesh, axis % whole.ndim)


def joined(piece: Tensor, axis: int, mesh: DeviceMesh) -> Tensor:
    """The devices' slices, whole: one all-gather."""
    return _applied(_Joined, piece, mesh, axis % piece.ndim)


def exchanged(rows: Tensor, sent: list[int], received: list[int], mesh: DeviceMesh) -> Tensor:
    """Rows from every device, in the order of the devices, for rows to each: one all-to-all.

    Args:
        rows: those for the first device first.
        sent: how many go to each device.
        received: how many come from each.
        mesh: of one dimension.
    """
    return _applied(_Exchanged, rows, mesh, sent, received)


@torch.no_grad()
def agreed(drawn: Tensor, mesh: DeviceMesh) -> Tensor:
    """The first device's draw, on all of them."""
    if mesh.size() == 1:
        return drawn
    first = int(mesh.mesh.flatten()[0])
    return _waited(collectives.broadcast(drawn.contiguous(), first, (mesh, 0)))


def _applied(way: type[torch.autograd.Function], array: Tensor, *options: Any) -> Tensor:
    if options[0].size() == 1:
        return array
    made: Tensor = way.apply(array, *options)
    return made


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, array: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return array.view_as(array)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return _Summed.apply(cotangent, ctx.mesh), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, array: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return _waited(collectives.all_reduce(array.contiguous(), "sum", (mesh, 0)))

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(cotangent, ctx.mesh), None


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, array: Tensor, mesh: DeviceMesh, axis: int) -> Tensor:
        ctx.mesh, ctx.axis = mesh, axis
        size = array.shape[axis] // mesh.size()
        return array.narrow(axis, mesh.get_local_rank() * size, size).contiguous()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return _Joined.apply(cotangent, ctx.mesh, ctx.axis), None, None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, array: Tensor, mesh: DeviceMesh, axis: int) -> Tensor:
        ctx.mesh, ctx.axis = mesh, axis
        gathered = collectives.all_gather_single(array.contiguous(), axis, (mesh, 0))
        return _waited(gathered)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return _Sliced.apply(cotangent, ctx.mesh, ctx.axis), None, None


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, mesh: DeviceMesh, sent: list[int], received: list[int]
    ) -> Tensor:
        ctx.mesh, ctx.sent, ctx.received = mesh, sent, received
        made = collectives.all_to_all_single(rows.contiguous(), received, sent, (mesh, 0))
        return _waited(made)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchanged.apply(cotangent, ctx.mesh, ctx.received, ctx.sent), None, None, None


def _waited(made: Tensor) -> Tensor:
    # a plain tensor, as what wraps it until it is used would be traced
    if isinstance(made, collectives.AsyncCollectiveTensor):
        found: Tensor = made.wait()
        return found
    return made
