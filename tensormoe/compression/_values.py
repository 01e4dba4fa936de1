"""Tensors on disk as NumPy arrays that can be worked with, and back.

NumPy has no bfloat16: its values are the upper halves of float32's, so they are widened exactly,
and rounded to the nearest (ties to even) when they are written back.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

from tensormoe.compression._groups import Group
from tensormoe.compression._low_precision import from_e2m1, from_e4m3, from_e8m0
from tensormoe.compression._quantized import FP8, Quantized
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
    quantized = {each.name: each for each in group.quantized}
    for number in range(group.experts):
        for key, columns in group.sources(number):
            found = quantized.get(key)
            turned = group.transposed != (found is not None and found.turned)
            matrix = stack[number][:, columns]
            for rows, values in _read(model, group, key, number, found):
                if not np.isfinite(values).all():
                    held = key if found is None else found.values
                    shown = f"{held!r}, expert {number}" if group.stacked else repr(held)
                    raise CheckpointError(
                        f"weights must be finite; got NaN or infinity in {shown}, of "
                        f"{model.places[held][0].name!r}. Repair the checkpoint, or leave that "
                        "layer out."
                    )
                (matrix.T if turned else matrix)[rows] = values
    return stack


def _read(
    model: Model, group: Group, key: str, number: int, found: Quantized | None
) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Rows of a stored matrix that are a group's, some at a time, and where they belong."""
    place = number if group.stacked else 0
    turned = group.transposed != (found is not None and found.turned)
    inputs = slice(0, group.in_features, 1)
    taken, others = (group.taken, inputs) if turned else (inputs, group.taken)
    size = group.in_features if turned else group.width
    count = len(range(taken.start, taken.stop, taken.step))
    step = max(1, _ENTRIES // (size * taken.step))
    for start in range(0, count, step):
        stop = min(start + step, count)
        first = taken.start + start * taken.step
        last = taken.start + (stop - 1) * taken.step + 1
        if found is not None:
            values = quantized_rows(model, found, place, first, last)
        else:
            values = _rows(model, group, key, place, (last - first, size), first)
        yield slice(start, stop), values.reshape(last - first, size)[:: taken.step, others]


def _rows(
    model: Model, group: Group, key: str, number: int, shape: tuple[int, ...], start: int
) -> NDArray[Any]:
    """Some rows of a matrix that is stored as it is."""
    matrix = group.in_features * group.width
    itemsize = model.places[key][1].nbytes // (matrix * (group.experts if group.stacked else 1))
    first = number * matrix + start * shape[1]
    return decoded(_bytes(model, key, first * itemsize, prod(shape) * itemsize), group.dtype)


def quantized_rows(
    model: Model, each: Quantized, number: int, start: int, stop: int
) -> NDArray[Any]:
    """Rows ``start`` to ``stop`` of one stored matrix (out, in) of a quantized tensor, in float32.

    Raises:
        CheckpointError: a file that can't be read.
    """
    import numpy as np

    (rows, columns), (height, width) = each.sizes, each.block
    decode, share = (from_e4m3, 1) if each.method == FP8 else (from_e2m1, 2)
    first, count = (number * rows + start) * columns, (stop - start) * columns
    values = decode(_bytes(model, each.values, first // share, count // share))
    down, across = -(-rows // height), -(-columns // width)
    top, bottom = start // height, -(-stop // height)
    itemsize = model.places[each.scales][1].nbytes // (each.count * down * across)
    first, count = (number * down + top) * across, (bottom - top) * across
    data = _bytes(model, each.scales, first * itemsize, count * itemsize)
    dtype = each.scale_dtype
    scales = from_e8m0(data) if dtype is None else decoded(data, dtype)
    taken = scales.reshape(bottom - top, across)[np.arange(start, stop) // height - top]
    with np.errstate(over="ignore"):
        # infinity is refused where it matters
        found: NDArray[Any] = values.reshape(stop - start, columns)
        found = found * np.repeat(taken, width, axis=1)[:, :columns]
    return found


def dequantized(model: Model, each: Quantized) -> Iterator[bytes]:
    """The bytes of a plain tensor in bfloat16; rows at a time, or a matrix where it is turned."""
    rows, columns = each.sizes
    step = rows if each.turned else max(1, _ENTRIES // columns)
    for number in range(each.count):
        for start in range(0, rows, step):
            found = quantized_rows(model, each, number, start, min(start + step, rows))
            yield from pieces(found.T if each.turned else found, each.dtype)


def _bytes(model: Model, key: str, begin: int, count: int) -> bytes:
    """Some bytes of a tensor."""
    shard, placed = model.places[key]
    begin += placed.begin
    return b"".join(read_range(shard, begin, begin + count))
