"""Dask's primitives for tensormoe, all of them lazy."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import dask.array as da
import numpy as np

from tensormoe.backend import State, Step
from tensormoe_dask import _loop, _namespace

__all__ = ["BACKEND", "DaskBackend"]


class DaskBackend:
    """Adapter of :class:`tensormoe.backend.Backend` for ``dask.array.Array``."""

    name = "dask"
    namespace = _namespace
    # chunks are the blocks of rows, and the caller has chosen them
    row_block_bytes = None
    # looking at a value would run the graph that leads to it
    eager = False
    checks_values = False

    def __repr__(self) -> str:
        return "DaskBackend()"

    def owns(self, array: Any, /) -> bool:
        return isinstance(array, da.Array)

    def matmul(self, left: da.Array, right: da.Array, /) -> da.Array:
        return da.matmul(left, right)

    def reshape(self, array: da.Array, shape: tuple[int, ...], /) -> da.Array:
        if not array.size:
            # Dask divides by the sizes of axes
            return da.zeros(np.empty(array.shape, bool).reshape(shape).shape, dtype=array.dtype)
        try:
            return da.reshape(array, shape)
        except NotImplementedError:
            # it merges or splits axes, and does one after the other only in two calls
            return da.reshape(da.reshape(array, (-1,)), shape)

    def permute(self, array: da.Array, axes: tuple[int, ...], /) -> da.Array:
        return da.transpose(array, axes)

    def contiguous(self, array: da.Array, /) -> da.Array:
        # an order of axes is all that an array which is not computed yet has
        return array

    def sum(self, array: da.Array, axes: tuple[int, ...], /) -> da.Array:
        return da.sum(array, axis=axes, dtype=array.dtype)

    def row_sums(self, array: da.Array, /) -> da.Array:
        return da.sum(array, axis=-1, keepdims=True)

    def square_sums(self, array: da.Array, /) -> da.Array:
        return da.sum(array * array, axis=-1, keepdims=True)

    def while_loop(self, step: Step, state: State, max_steps: int, tolerance: float, /) -> State:
        return _loop.while_loop(step, state, max_steps, tolerance)

    def take(self, array: da.Array, indices: da.Array, axis: int, /) -> da.Array:
        legs = list(range(array.ndim))
        # Dask's own take of indices that are not computed yet now and then forgets the new size
        flat = da.blockwise(
            partial(np.take, axis=axis),
            [array.ndim if leg == axis else leg for leg in legs],
            array.rechunk({axis: -1}),
            legs,
            self.reshape(indices, (-1,)),
            [array.ndim],
            dtype=array.dtype,
            concatenate=True,
        )
        shape = (*array.shape[:axis], *indices.shape, *array.shape[axis + 1 :])
        return self.reshape(flat, shape)

    def scatter_add(self, values: da.Array, indices: da.Array, axis: int, size: int, /) -> da.Array:
        before, after = values.shape[:axis], values.shape[axis + indices.ndim :]
        count = prod(indices.shape)
        flat = self.reshape(values, (*before, count, *after))
        # every chunk of indices is added up for itself, and then the chunks' totals
        legs = list(range(flat.ndim))
        totals = da.blockwise(
            _scattered,
            [*legs[:axis], axis, flat.ndim, *legs[axis + 1 :]],
            flat,
            legs,
            self.reshape(indices, (count,)),
            [axis],
            axis=axis,
            size=size,
            new_axes={flat.ndim: size},
            adjust_chunks={axis: lambda _: 1},
            dtype=values.dtype,
        )
        return da.sum(totals, axis=axis, dtype=values.dtype)

    def floats(self, array: da.Array, /) -> list[float]:
        return [float(value) for value in array.compute()]

    def stop_gradient(self, array: da.Array, /) -> da.Array:
        return array

    def to_bytes(self, array: da.Array, /) -> tuple[str, tuple[int, ...], bytes]:
        little = np.asarray(array.compute(), dtype=array.dtype.newbyteorder("<"))
        return array.dtype.name, array.shape, little.tobytes()

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: bytes, /) -> da.Array:
        little = np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<"))
        return da.from_array(little.astype(dtype).reshape(shape))


def _scattered(values: np.ndarray, indices: np.ndarray, axis: int, size: int) -> np.ndarray:
    """The total of one chunk, with an axis of one entry for the chunk before it."""
    total = np.zeros((*values.shape[:axis], size, *values.shape[axis + 1 :]), values.dtype)
    place: Any = (slice(None),) * axis + (indices,)
    np.add.at(total, place, values)
    return np.expand_dims(total, axis)


BACKEND = DaskBackend()
