"""Sizes of a step's matrix products, and the contiguous runs that its elementwise work has.

Both are read off the views of a step: an array in a slot is contiguous in the order of its legs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from tensormoe.factorizations import Leg
from tensormoe.planning._program import Step, View

Layout = tuple[list[int], list[int]]
"""Sizes and strides of an array, in entries."""


def product_sizes(step: Step, sizes: Mapping[Leg, int]) -> tuple[int, tuple[int, int, int]]:
    """Number of matrix products of a step, and the rows, summed entries and columns of each."""
    (left, _), (right, _) = _layouts(step, sizes)
    before = [left[:-2], right[:-2]]
    longest = max(map(len, before))
    padded = [[1] * (longest - len(each)) + each for each in before]
    # an empty batch has no product
    count = prod(min(pair) and max(pair) for pair in zip(*padded, strict=True))
    return count, (left[-2], left[-1], right[-1])


def runs(step: Step, sizes: Mapping[Leg, int]) -> int:
    """Number of runs in which an elementwise step or a copy goes through memory.

    Along a run, every operand is read entry after entry, or is one entry.
    """
    arrays = _layouts(step, sizes)
    axes = max(len(shape) for shape, _ in arrays)
    shape = [
        max(own[k - axes] if k >= axes - len(own) else 1 for own, _ in arrays) for k in range(axes)
    ]
    strides = [_spread(each, axes) for each in arrays]
    entries = prod(min(own, default=1) and 1 for own, _ in arrays) * prod(shape)
    return entries // max(_run(shape, strides, step.kind == "permute"), 1)


def _run(shape: Sequence[int], strides: Sequence[Sequence[int]], copies: bool) -> int:
    """Entries from the last axis on that follow one another in all operands."""
    real = [k for k, size in enumerate(shape) if size > 1]
    if not real or (copies and strides[0][real[-1]] != 1):
        return 1
    length = shape[real[-1]]
    for axis, inner in zip(reversed(real[:-1]), reversed(real[1:]), strict=True):
        if any(each[axis] != each[inner] * shape[inner] for each in strides):
            break
        length *= shape[axis]
    return length


def _spread(array: Layout, axes: int) -> list[int]:
    """Strides of an operand that is broadcast to more axes: 0 where it repeats."""
    shape, strides = array
    missing = axes - len(shape)
    own = [0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
    return [0] * missing + own


def _layouts(step: Step, sizes: Mapping[Leg, int]) -> list[Layout]:
    pairs = zip(step.input_legs, step.views, strict=False)
    return [_viewed([sizes[leg] for leg in legs], view) for legs, view in pairs]


def _viewed(shape: list[int], view: View) -> Layout:
    """Sizes and strides of a contiguous array that is reshaped, and then permuted."""
    if view.shape is not None:
        known = prod(size for size in view.shape if size != -1)
        rest = prod(shape) // known if known else 0
        shape = [rest if size == -1 else size for size in view.shape]
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    if view.axes is not None:
        shape = [shape[axis] for axis in view.axes]
        strides = [strides[axis] for axis in view.axes]
    return shape, strides
