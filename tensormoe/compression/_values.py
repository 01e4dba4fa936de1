"""Tensors on disk as NumPy arrays that can be worked with, and back.

NumPy has no bfloat16: its values are the upper halves of float32's, so they are widened exactly,
and rounded to the nearest (ties to even) when they are written back.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

from tensormoe.compression._groups import Group
from tensormoe.compression._shards import Model, read_range
from tensormoe.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# entries that are converted at a time
_ENTRIES = 2**20
# the largest that the 16-bit dtypes hold: what is beyond is closest to it, not to infinity
_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}


def working_dtype(dtype: str) -> str:
    """The dtype that weights of a dtype are decomposed in."""
    return "float64" if dtype == "float64" else "float32"


def decoded(data: bytes, dtype: str) -> NDArray[Any]:
    """A flat array in the working dtype."""
    import numpy as np

    if dtype == "bfloat16":
        wide = np.frombuffer(data, "<u2").astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(working_dtype(dtype))


def encoded(array: NDArray[Any], dtype: str) -> bytes:
    """The bytes of an array's entries in a dtype, rounded to the nearest."""
    import numpy as np

    if dtype in _LARGEST:
        array = np.clip(array, -_LARGEST[dtype], _LARGEST[dtype])
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        half = (bits >> np.uint32(16)) & np.uint32(1)
        half += np.uint32(0x7FFF)
        half += bits
        half >>= np.uint32(16)
        array, dtype = half, "uint16"
    data: bytes = array.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    return data


def rounded(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """An array's entries as a dtype holds them, in the working dtype."""
    if dtype == working_dtype(dtype):
        return array
    return decoded(encoded(array, dtype), dtype).reshape(array.shape)


def pieces(array: NDArray[Any], dtype: str) -> Iterator[bytes]:
    """:func:`encoded`, some of the first axis at a time."""
    step = max(1, _ENTRIES // max(prod(array.shape[1:]), 1))
    for start in range(0, len(array), step):
        yield encoded(array[start : start + step], dtype)


def read_stack(model: Model, group: Group) -> NDArray[Any]:
    """The experts of a group, (experts, in, out), a few rows in memory twice.

    Raises:
        CheckpointError: NaN or infinity, or a file that can't be read.
    """
    import numpy as np

    sizes = (group.experts, group.in_features, group.out_features)
    stack = np.empty(sizes, working_dtype(group.dtype))
    for number in range(group.experts):
        key = group.keys[0 if group.stacked else number]
        shard, placed = model.places[key]
        size = placed.nbytes // (group.experts if group.stacked else 1)
        begin = placed.begin + (number * size if group.stacked else 0)
        matrix = stack[number].T if group.transposed else stack[number]
        itemsize = size // matrix.size
        step = max(1, _ENTRIES // matrix.shape[1])
        for start in range(0, len(matrix), step):
            rows = matrix[start : start + step]
            first = begin + start * matrix.shape[1] * itemsize
            data = b"".join(read_range(shard, first, first + rows.size * itemsize))
            values = decoded(data, group.dtype)
            if not np.isfinite(values).all():
                place = f"{key!r}, expert {number}" if group.stacked else repr(key)
                raise CheckpointError(
                    f"weights must be finite; got NaN or infinity in {place}, of {shard.name!r}. "
                    "Repair the checkpoint, or leave that layer out."
                )
            rows[...] = values.reshape(rows.shape)
    return stack
