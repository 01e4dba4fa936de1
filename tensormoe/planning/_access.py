"""Sizes of a step's matrix products, and the contiguous runs that its elementwise work has.

Both are read off the views of a step: an array in a slot is contiguous in the order of its legs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from math import prod

from tensormoe.factorizations import Leg
from tensormoe.planning._program import Step, View


def product_sizes(step: Step, sizes: Mapping[Leg, int]) -> tuple[int, tuple[int, int, int], int]:
    """Matrix products of a step.

    Returns:
        Their number; the rows, summed entries and columns of each; and the entries of second
        operands that lie column by column and meet several rows, which are turned round first.
    """
    left, right = (
        _ordered(_reshaped([sizes[leg] for leg in legs], view), view)
        for legs, view in zip(step.input_legs, step.views, strict=True)
    )
    # a leading axis of one operand may be 1, or missing, in the other; an empty one leaves nothing
    leading = zip_longest(left[-3::-1], right[-3::-1], fillvalue=1)
    count = prod(max(pair) if min(pair) else 0 for pair in leading)
    axes = step.views[1].axes
    turned = axes is not None and axes[-1] < axes[-2] and left[-2] > 1 and min(right[-2:]) > 1
    return count, (left[-2], left[-1], right[-1]), prod(right) if turned else 0


def runs(step: Step, sizes: Mapping[Leg, int]) -> int:
    """Number of runs in which an elementwise step or a copy goes through memory.

    Along a run, every operand goes on by one stride, which is that of neighbours in a copy.
    """
    arrays = [
        _viewed([sizes[leg] for leg in legs], view)
        for legs, view in zip(step.input_legs, step.views, strict=False)
    ]
    axes = max(len(shape) for shape, _ in arrays)
    shapes = [[1] * (axes - len(shape)) + shape for shape, _ in arrays]
    whole = [max(each) if min(each) else 0 for each in zip(*shapes, strict=True)]
    entries = prod(whole)
    if not entries:
        return 0
    strides = [[0] * (axes - len(each)) + each for _, each in arrays]
    return entries // _run(whole, strides, copies=step.kind == "permute")


def _run(shape: Sequence[int], strides: Sequence[Sequence[int]], *, copies: bool) -> int:
    """Entries from the last axis on that follow one another in all operands."""
    real = [axis for axis, size in enumerate(shape) if size > 1]
    if not real or (copies and strides[0][real[-1]] != 1):
        return 1
    length = shape[real[-1]]
    for axis, inner in zip(real[-2::-1], real[:0:-1], strict=True):
        if any(each[axis] != each[inner] * shape[inner] for each in strides):
            break
        length *= shape[axis]
    return length


def _viewed(shape: list[int], view: View) -> tuple[list[int], list[int]]:
    """Sizes and strides of a contiguous array that is reshaped and permuted; 0 where it repeats."""
    shape = _reshaped(shape, view)
    strides, step = [0] * len(shape), 1
    for axis in range(len(shape) - 1, -1, -1):
        strides[axis] = step if shape[axis] != 1 else 0
        step *= shape[axis]
    return _ordered(shape, view), _ordered(strides, view)


def _reshaped(shape: list[int], view: View) -> list[int]:
    if view.shape is None:
        return shape
    # -1 stands for what is left
    known = prod(size for size in view.shape if size != -1)
    rest = prod(shape) // known if known else 0
    return [rest if size == -1 else size for size in view.shape]


def _ordered(values: list[int], view: View) -> list[int]:
    return values if view.axes is None else [values[axis] for axis in view.axes]
