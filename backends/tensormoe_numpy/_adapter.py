"""NumPy's primitives for the core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import array_api_compat.numpy as array_api
import numpy as np
import numpy.typing as npt

NDArray = npt.NDArray[Any]


class NumpyBackend:
    """Adapter of :class:`tensormoe.backend.Backend` for ``numpy.ndarray``."""

    name = "numpy"
    namespace = array_api
    # two or three temporaries of this size stay in a core's own cache
    row_block_bytes = 256 * 1024
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
        return np.ascontiguousarray(array)

    def sum(self, array: NDArray, axes: tuple[int, ...], /) -> NDArray:
        total: NDArray = np.sum(array, axis=axes)
        return total

    def take(self, array: NDArray, indices: NDArray, axis: int, /) -> NDArray:
        gathered: NDArray = np.take(array, indices, axis=axis)
        return gathered

    def scatter_add(self, values: NDArray, indices: NDArray, axis: int, size: int, /) -> NDArray:
        before, after = values.shape[:axis], values.shape[axis + indices.ndim :]
        total = np.zeros((*before, size, *after), dtype=values.dtype)
        np.add.at(total, (slice(None),) * axis + (indices,), values)
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
