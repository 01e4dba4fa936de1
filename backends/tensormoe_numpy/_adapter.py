"""NumPy's primitives for the core."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tensormoe.backend import State, Step

NDArray = npt.NDArray[Any]


class NumpyBackend:
    """Adapter of :class:`tensormoe.backend.Backend` for ``numpy.ndarray``."""

    name = "numpy"
    # NumPy 2 follows the standard itself; the wrappers of array-api-compat cost microseconds a call
    namespace = np
    # what a core's own cache holds on current machines; larger slices were slower when measured
    row_block_bytes = 1024 * 1024
    eager = True
    checks_values = True
    picks_entries = True

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

    def excess(
        self, array: NDArray, threshold: NDArray | float, /, out: NDArray | None = None
    ) -> NDArray:
        difference = np.subtract(array, threshold, out=out)
        return np.maximum(difference, 0, out=difference)

    def row_sums(self, array: NDArray, /) -> NDArray:
        # the product with ones is the fastest
        if array.shape[1] <= _LONG:
            return array @ np.ones((array.shape[1], 1), dtype=array.dtype)
        pieces, rest = _pieces(array)
        total = np.sum(pieces @ np.ones(_PIECE, dtype=array.dtype), axis=-1, keepdims=True)
        sums: NDArray = total + np.sum(rest, axis=-1, keepdims=True)
        return sums

    def square_sums(self, array: NDArray, /) -> NDArray:
        sums: NDArray
        if array.shape[1] <= _LONG:
            sums = np.vecdot(array, array)[:, None]
            return sums
        pieces, rest = _pieces(array)
        total = np.sum(np.vecdot(pieces, pieces), axis=-1, keepdims=True)
        sums = total + np.vecdot(rest, rest)[:, None]
        return sums

    def repeat(self, step: Step, state: State, rounds: int, enough: float, /) -> State:
        for _ in range(rounds):
            state, way = step(*state)
            if np.max(way, initial=0.0) <= enough:
                break
        return state

    def take(self, array: NDArray, indices: NDArray, axis: int, /) -> NDArray:
        gathered: NDArray = np.take(array, indices, axis=axis)
        return gathered

    def scatter_add(self, values: NDArray, indices: NDArray, axis: int, size: int, /) -> NDArray:
        before, after = values.shape[:axis], values.shape[axis + indices.ndim :]
        total = np.zeros((*before, size, *after), dtype=values.dtype)
        place: Any = (slice(None),) * axis + (indices,)
        np.add.at(total, place, values)
        return total

    def floats(self, array: NDArray, /) -> list[float]:
        listed: list[float] = array.tolist()
        return listed

    def stop_gradient(self, array: NDArray, /) -> NDArray:
        return array

    def to_bytes(self, array: NDArray, /) -> tuple[str, tuple[int, ...], bytes]:
        little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
        return array.dtype.name, array.shape, little.tobytes()

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: bytes, /) -> NDArray:
        little = np.dtype(dtype).newbyteorder("<")
        return np.frombuffer(data, dtype=little).astype(dtype).reshape(shape)


# A product that runs along a whole row adds up rounding errors over its length. Longer rows than
# _LONG are therefore cut into pieces, whose sums are added pairwise.
_LONG, _PIECE = 1024, 256


def _pieces(array: NDArray) -> tuple[NDArray, NDArray]:
    rows, length = array.shape
    whole = length - length % _PIECE
    return array[:, :whole].reshape(rows, whole // _PIECE, _PIECE), array[:, whole:]


BACKEND = NumpyBackend()
