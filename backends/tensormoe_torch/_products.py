"""Matrix products of eager float32 tensors on the CPU, by the fastest library in PyTorch.

``torch.matmul`` calls MKL, which takes a slow path on processors of other makers: half the speed of
oneDNN's kernels, which PyTorch carries as well and uses for convolutions and compiled models. The
operation called here is the one that its compiler emits for a linear layer. Where it is missing,
switched off (``torch.backends.mkldnn.enabled``), or watched by a dispatch mode such as a counter of
FLOPs, which knows the public operations only, ``torch.matmul`` does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# below, starting oneDNN costs more than it saves
_LEAST_ROWS = 8
_LEAST_WORK = 2**20
_LEAST_COLUMNS = 32
# rows that a matrix stored by columns is faster multiplied with as columns: a third of the time
_FEW_ROWS = range(2, 4)


def _linear() -> Callable[..., Tensor] | None:
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        found: Any = torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None
    return found


_LINEAR = _linear()


def copies_transposed(dtype: torch.dtype) -> bool:
    """Whether a transposed first operand of a large product is copied: oneDNN wants it by rows."""
    enabled: bool = torch.backends.mkldnn.enabled  # type: ignore[assignment]
    return _LINEAR is not None and dtype is torch.float32 and enabled


def packed_columns(dtype: torch.dtype) -> int:
    """Columns of a second operand that oneDNN copies at a time: 64 per thread with AVX-512."""
    known = copies_transposed(dtype) and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return 64 * torch.get_num_threads() if known else 0


def product(left: Tensor, right: Tensor) -> Tensor:
    """The product of tensors that no autograd follows; any shapes that ``torch.matmul`` takes."""
    if (
        _LINEAR is not None
        and left.dtype is torch.float32
        and left.ndim == 2
        and right.ndim == 2
        and left.shape[0] >= _LEAST_ROWS
        and left.numel() * right.shape[1] >= _LEAST_WORK
        and torch.backends.mkldnn.enabled  # type: ignore[truthy-bool]
        and torch._C._len_torch_dispatch_stack() == 0
    ):
        return _LINEAR(left, right.t(), None, "none", [], "")
    if (
        left.ndim == 2
        and right.ndim == 2
        and left.shape[0] in _FEW_ROWS
        and left.dtype is torch.float32
        and right.stride(0) == 1
    ):
        return torch.mm(right.t(), left.t()).t()
    if left.ndim == 2 and right.ndim > 3:
        many = product(left, right.flatten(0, -3))
        return many.reshape(*right.shape[:-2], *many.shape[-2:])
    if left.ndim == 2 and right.ndim == 3:
        # PyTorch would make one product of them, and copy the operand or the result into order
        if right.shape[2] >= _LEAST_COLUMNS:
            return torch.bmm(left.expand(right.shape[0], *left.shape), right)
        # products with few columns are several times as slow as those with few rows
        return torch.matmul(right.mT, left.mT).mT
    return torch.matmul(left, right)
