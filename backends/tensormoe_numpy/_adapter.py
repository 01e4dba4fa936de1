"""NumPy's primitives for the core."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from tensormoe.backend import State, Step
from tensormoe_numpy._like_numpy import NumpyLikeBackend

NDArray = npt.NDArray[Any]


class NumpyBackend(NumpyLikeBackend):
    """Adapter of :class:`tensormoe.backend.Backend` for ``numpy.ndarray``."""

    name = "numpy"
    # what a core's own cache holds on current machines; larger slices were slower when measured
    row_block_bytes = 1024 * 1024
    buffers = 8192
    eager = True
    checks_values = True
    keeps_constants = True
    # DLPack's numbers of the host's memory, and of what CUDA has pinned there
    devices = frozenset({1, 3})

    def __init__(self) -> None:
        # NumPy 2 follows the standard; the wrappers of array-api-compat cost microseconds a call
        super().__init__(np, special)

    def from_host(self, array: NDArray, /) -> NDArray:
        return array

    def to_host(self, array: NDArray, /) -> NDArray:
        return array

    def owns(self, array: Any, /) -> bool:
        return isinstance(array, (np.ndarray, np.generic)) and not isinstance(array, _SPECIAL)

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

    def kth_largest(self, array: NDArray, k: int, /) -> NDArray:
        place = array.shape[1] - k
        return np.partition(array, place, axis=-1)[:, place : place + 1]

    def grouped_matmul(self, rows: NDArray, matrices: NDArray, counts: NDArray, /) -> NDArray:
        made = np.empty((len(rows), matrices.shape[2]), dtype=rows.dtype)
        for expert, some in _groups(counts):
            if expert == len(matrices):
                made[some] = 0.0
            else:
                np.matmul(rows[some], matrices[expert], out=made[some])
        return made

    def grouped_outer(self, left: NDArray, right: NDArray, counts: NDArray, /) -> NDArray:
        made = np.zeros((len(counts), left.shape[1], right.shape[1]), dtype=left.dtype)
        for expert, some in _groups(counts):
            np.matmul(left[some].T, right[some], out=made[expert])
        return made

    def while_loop(self, step: Step, state: State, max_steps: int, tolerance: float, /) -> State:
        for _ in range(max_steps):
            state, change = step(*state)
            if np.max(change, initial=0.0) <= tolerance:
                break
        return state

    def to_dlpack(self, array: Any, /, *, copy: bool) -> tuple[NDArray, bool]:
        if copy:
            # rows behind one another, in this machine's order of bytes
            native = array.dtype.newbyteorder("=")
            return np.array(array, dtype=native, order="C", copy=True), True
        # a scalar cannot be lent, but an array without axes can
        lent: NDArray = np.asarray(array)
        if any(stride < 0 for stride in lent.strides):
            # PyTorch ends the process over those
            raise BufferError("negative strides cannot be lent")
        return lent, lent.flags.writeable

    def from_dlpack(self, array: Any, /, *, copy: bool | None) -> NDArray:
        found: NDArray = np.from_dlpack(array)
        # libraries that cannot say that their memory may be written to get it read-only
        return found.copy() if copy and not found.flags.writeable else found


# entries that do not count, and products that mean something else
_SPECIAL = (np.ma.MaskedArray, np.matrix)

# A product that runs along a whole row adds up rounding errors over its length. Longer rows than
# _LONG are therefore cut into pieces, whose sums are added pairwise.
_LONG, _PIECE = 1024, 256


def _groups(counts: NDArray) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, each with its rows."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _pieces(array: NDArray) -> tuple[NDArray, NDArray]:
    rows, length = array.shape
    whole = length - length % _PIECE
    return array[:, :whole].reshape(rows, whole // _PIECE, _PIECE), array[:, whole:]


BACKEND = NumpyBackend()
"""The adapter of NumPy, which ``tensormoe.get_backend`` returns."""
