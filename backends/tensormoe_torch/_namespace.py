"""The functions of the Array-API standard that gates and layouts use, on tensors.

Most are PyTorch's own under the standard's names. The general wrappers for all of the standard cost
microseconds a call, which is what a whole operation costs for a small batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import abs as abs
from torch import arange as arange
from torch import bool as bool
from torch import broadcast_to as broadcast_to
from torch import concat as concat
from torch import empty_like as empty_like
from torch import exp as exp
from torch import expm1 as expm1
from torch import eye as eye
from torch import finfo as finfo
from torch import float32 as float32
from torch import float64 as float64
from torch import full_like as full_like
from torch import int8 as int8
from torch import int32 as int32
from torch import int64 as int64
from torch import isfinite as isfinite
from torch import isinf as isinf
from torch import isnan as isnan
from torch import log as log
from torch import log1p as log1p
from torch import minimum as minimum
from torch import moveaxis as moveaxis
from torch import ones as ones
from torch import ones_like as ones_like
from torch import round as round
from torch import sqrt as sqrt
from torch import uint8 as uint8
from torch import where as where
from torch import zeros as zeros
from torch import zeros_like as zeros_like

Axes = int | tuple[int, ...] | None


def isdtype(dtype: torch.dtype, kind: str) -> Any:
    if kind == "bool":
        return dtype == torch.bool
    if kind == "real floating":
        return dtype.is_floating_point
    if kind == "integral":
        return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    raise ValueError(f"kind must be 'bool', 'real floating' or 'integral'; got {kind!r}.")


def astype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def asarray(
    x: Tensor | Sequence[int], *, dtype: Any = None, device: Any = None, copy: Any = None
) -> Tensor:
    if not isinstance(x, Tensor):
        return torch.tensor(x, dtype=dtype, device=device)
    if dtype is not None:
        x = x.to(dtype)
    if copy:
        x = x.clone(memory_format=torch.contiguous_format)
    return x if device is None else x.to(device)


def maximum(x: Tensor, y: Tensor | float) -> Tensor:
    return torch.maximum(x, y) if isinstance(y, Tensor) else torch.clamp_min(x, y)


def max(x: Tensor, *, axis: Axes = None, keepdims: Any = False) -> Tensor:
    return torch.amax(x, dim=() if axis is None else axis, keepdim=keepdims)


def min(x: Tensor, *, axis: Axes = None, keepdims: Any = False) -> Tensor:
    return torch.amin(x, dim=() if axis is None else axis, keepdim=keepdims)


def sum(x: Tensor, *, axis: Axes = None, keepdims: Any = False) -> Tensor:
    return torch.sum(x) if axis is None else torch.sum(x, dim=axis, keepdim=keepdims)


def mean(x: Tensor, *, axis: Axes = None, keepdims: Any = False) -> Tensor:
    return torch.mean(x) if axis is None else torch.mean(x, dim=axis, keepdim=keepdims)


def any(x: Tensor, *, axis: int | None = None, keepdims: Any = False) -> Tensor:
    return torch.any(x) if axis is None else torch.any(x, dim=axis, keepdim=keepdims)


def all(x: Tensor, *, axis: int | None = None, keepdims: Any = False) -> Tensor:
    return torch.all(x) if axis is None else torch.all(x, dim=axis, keepdim=keepdims)


def argmax(x: Tensor, *, axis: int | None = None, keepdims: Any = False) -> Tensor:
    return torch.argmax(x, dim=axis, keepdim=keepdims)


def argsort(x: Tensor, *, axis: int = -1, stable: Any = True) -> Tensor:
    return torch.argsort(x, dim=axis, stable=stable)


def take(x: Tensor, indices: Tensor, *, axis: int) -> Tensor:
    return torch.index_select(x, axis, indices)


def take_along_axis(x: Tensor, indices: Tensor, *, axis: int = -1) -> Tensor:
    return torch.take_along_dim(x, indices, dim=axis)


def nonzero(x: Tensor) -> tuple[Tensor, ...]:
    return torch.nonzero(x, as_tuple=True)


def vecdot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x, y) if x.ndim == 1 == y.ndim else torch.sum(x * y, dim=-1)


def permute_dims(x: Tensor, axes: Sequence[int]) -> Tensor:
    return torch.permute(x, tuple(axes))


def expand_dims(x: Tensor, *, axis: int = 0) -> Tensor:
    return torch.unsqueeze(x, axis)


def cumulative_sum(x: Tensor, *, axis: int) -> Tensor:
    return torch.cumsum(x, dim=axis)
