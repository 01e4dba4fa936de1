"""PyTorch's primitives for the core, twice: for any tensors, and for those that nobody follows.

The general adapter is what any transformation of PyTorch can follow: no value steers Python,
nothing is written in place, and every operation has a derivative. The eager one is for CPU tensors
that nobody traces, inside :mod:`tensormoe_torch._autograd`, where gradients come from closed forms.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from tensormoe.backend import State, Step
from tensormoe.errors import BackendError
from tensormoe.planning import Library
from tensormoe_torch import _namespace
from tensormoe_torch._convolution import convolution
from tensormoe_torch._grouped import grouped_matmul, grouped_outer
from tensormoe_torch._products import copies_transposed, packed_columns, product
from tensormoe_torch._tracing import is_traced

if TYPE_CHECKING:
    from tensormoe.factorizations import Factorization
    from tensormoe.selection import LayerSite, Sensitivity

__all__ = ["BACKEND", "EAGER", "TorchBackend", "library"]


class TorchBackend:
    """Adapter of :class:`tensormoe.backend.Backend` for ``torch.Tensor``.

    Args:
        eager: whether values may be read and fresh tensors written to; needs tensors on the CPU
            that are neither traced nor differentiated.
    """

    name = "torch"
    namespace = _namespace
    # NaN propagates, as everywhere in PyTorch: a scaler of gradients skips such a step
    checks_values = False
    keeps_constants = False
    # a tensor is where its memory is
    devices = None
    convolves: Literal["each"] = "each"
    channels_first = True

    def __init__(self, eager: bool = False) -> None:
        self.eager = eager
        # larger slices leave the cache that the cores share, and come from the system every time
        self.row_block_bytes = 4 * 1024 * 1024 if eager else None

    def __repr__(self) -> str:
        return f"TorchBackend(eager={self.eager})"

    def owns(self, array: Any, /) -> bool:
        strided = isinstance(array, Tensor) and array.layout is torch.strided
        return strided and not array.is_nested

    def matmul(self, left: Tensor, right: Tensor, /) -> Tensor:
        if self.eager:
            return product(left, right)
        followed = left.requires_grad or right.requires_grad or is_traced(left) or is_traced(right)
        return torch.matmul(left, right) if followed or not left.is_cpu else product(left, right)

    def reshape(self, array: Tensor, shape: tuple[int, ...], /) -> Tensor:
        return array.reshape(shape)

    def permute(self, array: Tensor, axes: tuple[int, ...], /) -> Tensor:
        return array.permute(axes)

    def contiguous(self, array: Tensor, /) -> Tensor:
        # always a copy: the executor may add into what it gets
        return array.clone(memory_format=torch.contiguous_format)

    def sum(self, array: Tensor, axes: tuple[int, ...], /) -> Tensor:
        return torch.sum(array, dim=axes, dtype=array.dtype)

    def row_sums(self, array: Tensor, /) -> Tensor:
        return torch.sum(array, dim=-1, keepdim=True)

    def square_sums(self, array: Tensor, /) -> Tensor:
        if self.eager:
            # one pass and no product of the array's size; a norm has no derivative at zero
            norm: Tensor = torch.linalg.vector_norm(array, dim=-1, keepdim=True)
            return norm * norm
        return torch.sum(array * array, dim=-1, keepdim=True)

    def kth_largest(self, array: Tensor, k: int, /) -> Tensor:
        return torch.topk(array, k, dim=-1, sorted=True).values[:, -1:]

    def largest_indices(self, array: Tensor, k: int, /) -> Tensor | None:
        if array.device.type != "cpu" or is_traced(array) or not array.numel():
            return None
        values, indices = torch.topk(array.detach(), k, dim=-1)
        # ties are in no order, and NaN is equal to nothing: both need the sort
        apart = values[:, 1:] < values[:, :-1]
        alone = torch.count_nonzero(array >= values[:, -1:]) == values.numel()
        return indices if bool(alone) and bool(apart.all()) else None

    def while_loop(self, step: Step, state: State, max_steps: int, tolerance: float, /) -> State:
        for _ in range(max_steps):
            state, change = step(*state)
            if self.eager and change.numel() and float(torch.max(change)) <= tolerance:
                break
        return state

    def take(self, array: Tensor, indices: Tensor, axis: int, /) -> Tensor:
        flat = torch.index_select(array, axis, indices.reshape(-1))
        if indices.ndim == 1:
            return flat
        return flat.reshape(*array.shape[:axis], *indices.shape, *array.shape[axis + 1 :])

    def scatter_add(self, values: Tensor, indices: Tensor, axis: int, size: int, /) -> Tensor:
        before, after = values.shape[:axis], values.shape[axis + indices.ndim :]
        total = values.new_zeros((*before, size, *after))
        flat = values.reshape(*before, indices.numel(), *after)
        return torch.index_add(total, axis, indices.reshape(-1), flat)

    def grouped_matmul(self, rows: Tensor, matrices: Tensor, counts: Tensor, /) -> Tensor:
        return grouped_matmul(rows, matrices, counts)

    def grouped_outer(self, left: Tensor, right: Tensor, counts: Tensor, /) -> Tensor:
        return grouped_outer(left, right, counts)

    def convolve(
        self,
        images: Tensor,
        kernels: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[tuple[int, int], ...],
        dilation: tuple[int, ...],
        /,
    ) -> Tensor:
        return convolution(images, kernels, bias, stride, padding, dilation)

    def model_sites(
        self, model: nn.Module, parts: Sequence[str] | None, /
    ) -> tuple[LayerSite, ...]:
        # surgery and compression stand on this adapter
        from tensormoe_torch.allocation import model_sites

        return model_sites(model, parts)

    def model_sensitivities(
        self,
        model: nn.Module,
        sites: Sequence[LayerSite],
        kinds: Sequence[type[Factorization]],
        experts: int | tuple[int, ...],
        inputs: Any,
        share: float,
        /,
    ) -> Iterable[Sensitivity]:
        from tensormoe_torch.allocation import measure_sensitivities
        from tensormoe_torch.allocation._measure import around

        return measure_sensitivities(
            model,
            inputs,
            sites=sites,
            factorization=kinds,
            experts=experts,
            shares=around(share),
        )

    def floats(self, array: Tensor, /) -> list[float]:
        return array.tolist()

    def stop_gradient(self, array: Tensor, /) -> Tensor:
        return array if self.eager else array.detach()

    def to_bytes(self, array: Tensor, /) -> tuple[str, tuple[int, ...], bytes]:
        if array.is_meta:
            raise BackendError(
                "a tensor must have values to be written; got one on the meta device. Load or "
                "initialize it first: to_empty(device=…), then reset_parameters()."
            )
        if type(array).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            # the memory of a wrapper subclass is undefined
            raise BackendError(
                "a tensor must have values of its own in this process to be written; got a "
                f"{type(array).__qualname__}. Gather it first, as full_tensor() does a DTensor."
            )
        solid = array.detach().to("cpu").contiguous()
        # no NumPy, which an installation of PyTorch may lack
        content = ctypes.string_at(solid.data_ptr(), solid.nbytes) if solid.nbytes else b""
        return str(solid.dtype).removeprefix("torch."), tuple(solid.shape), content

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: bytes, /) -> Tensor:
        found: torch.dtype = getattr(torch, dtype)
        if not data:
            return torch.empty(shape, dtype=found)
        return torch.frombuffer(bytearray(data), dtype=found).reshape(shape)

    def to_dlpack(self, array: Tensor, /, *, copy: bool) -> tuple[Tensor, bool]:
        if array.requires_grad:
            raise BackendError(
                "a tensor must be cut off from differentiation before other libraries get it; got "
                "one that requires grad. Call .detach() on it, or take the module's state_dict()."
            )
        functions = torch._C._are_functorch_transforms_active()
        if functions or type(array) not in (Tensor, torch.nn.Parameter):
            # the memory of a wrapper subclass is undefined
            raise BackendError(
                "a tensor must have values of its own before other libraries get it; got "
                f"{'one inside a transformation' if functions else type(array).__qualname__}. "
                "Convert outside of torch.compile, torch.func and the like."
            )
        lent = array.clone(memory_format=torch.contiguous_format) if copy else array
        return lent.detach(), True

    def from_dlpack(self, array: Any, /, *, copy: bool | None) -> Tensor:
        try:
            return from_dlpack(array)
        except AssertionError as error:
            # what an installation without CUDA says of arrays that are there
            raise BufferError(str(error)) from error


def library(dtype: torch.dtype, *, keeps_input: bool = True) -> Library:
    """Properties that the memory of an eager call on the CPU depends on."""
    return Library(
        EAGER.row_block_bytes,
        copies_transposed=copies_transposed(dtype),
        packs=packed_columns(dtype),
        merges_batch_axes=True,
        frees_saved=True,
        keeps_input=keeps_input,
        holds_coefficients=True,
        sums_rows=True,
        convolves="each",
    )


BACKEND = TorchBackend()
"""The adapter of PyTorch, which ``tensormoe.get_backend`` returns."""
EAGER = TorchBackend(eager=True)
