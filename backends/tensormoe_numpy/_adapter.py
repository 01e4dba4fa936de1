"""NumPy's primitives for the core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

NDArray = npt.NDArray[Any]


class NumpyBackend:
    """Adapter of :class:`tensormoe.backend.Backend` for ``numpy.ndarray``."""

    name = "numpy"
    # NumPy 2 follows the standard itself; the wrappers of array-api-compat cost microseconds a call
    namespace = np
    # what a core's own cache holds on current machines; larger slices were slower when measured
    row_block_bytes = 1024 * 1024
    eager = True

    def __repr__(self) -> str:
        return "NumpyBackend()"

    def owns(self, array: Any, /) -> bool:
        return isinstance(array, (np.ndarray, np.generic))

    def matmul(self, left: NDArray, right: NDArray, /) -> NDArray:
        product: NDArray = np.matmul(left, right)
        return product

    def reshape(self, array: NDArray, shape: tuple[int, ...], /) -> NDArray:
        return array.reshape(shape)

    def permute(self, array: NDArray, axes: tuple[int, ...], /) -> NDArray:
        return array.transpose(axes)

    def contiguous(self, array: NDArray, /) -> NDArray:
        # always a copy: the executor may add into what it gets
        return array.copy(order="C")

    def sum(self, array: NDArray, axes: tuple[int, ...], /) -> NDArray:
        total: NDArray = np.sum(array, axis=axes)
        return total

    def take(self, array: NDArray, indices: NDArray, axis: int, /) -> NDArray:
        gathered: NDArray = np.take(array, indices, axis=axis)
        return gathered

    def scatter_add(self, values: NDArray, indices: NDArray, axis: int, size: int, /) -> NDArray:
        before, after = values.shape[:axis], values.shape[axis + indices.ndim :]
        total = np.zeros((*before, size, *after), dtype=values.dtype)
        place: Any = (slice(None),) * axis + (indices,)
        np.add.at(total, place, values)
        return total

    def concat(self, arrays: Sequence[NDArray], /) -> NDArray:
        return np.concatenate(list(arrays), axis=0)

    def stop_gradient(self, array: NDArray, /) -> NDArray:
        return array

    def to_bytes(self, array: NDArray, /) -> tuple[str, tuple[int, ...], bytes]:
        little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
        return array.dtype.name, array.shape, little.tobytes()

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: bytes, /) -> NDArray:
        little = np.dtype(dtype).newbyteorder("<")
        return np.frombuffer(data, dtype=little).astype(dtype).reshape(shape)


BACKEND = NumpyBackend()
