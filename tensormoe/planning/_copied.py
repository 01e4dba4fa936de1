"""Entries that libraries copy while a step runs."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from tensormoe.factorizations import Leg
from tensormoe.planning._access import product_sizes
from tensormoe.planning._library import Library
from tensormoe.planning._program import ELEMENTWISE, PRODUCTS, Step

# products of fewer multiply-adds, or rows, are left to libraries that copy nothing
_LEAST_COPIED, _LEAST_ROWS = 2**20, 8
# rows of a matrix whose columns are packed at a time: a half of those of a large one, which are
# no more than twice as many
_DEPTH = 512
# columns from which on those of a power of two lie too far apart to be read in place
_APART = 512


def copied(step: Step, sizes: Mapping[Leg, int], library: Library) -> int:
    """Entries that a library copies beside a step's operands and result.

    Args:
        step: of a program.
        sizes: the size of every leg, the batch included.
        library: what it copies.
    """
    if step.kind in ELEMENTWISE:
        return _buffered(step, sizes, library.buffers)
    if step.kind not in PRODUCTS:
        return 0
    found = _transposed(step, sizes) if library.copies_transposed else 0
    found += _unmerged(step, sizes) if library.merges_batch_axes else 0
    return found + (_packed(step, sizes, library.packs) if library.packs else 0)


def _transposed(step: Step, sizes: Mapping[Leg, int]) -> int:
    """Entries of the first operand of a large product of two matrices, if it is transposed."""
    if step.views[0].axes != (1, 0):
        return 0
    work = prod(sizes[leg] for leg in {*step.input_legs[0], *step.input_legs[1]})
    return prod(sizes[leg] for leg in step.input_legs[0]) if work >= _LEAST_COPIED else 0


def _packed(step: Step, sizes: Mapping[Leg, int], columns: int) -> int:
    """Entries of the columns of a second operand that are packed at a time."""
    if any(_axes(step, place) != 2 for place in (0, 1)):
        return 0
    _, (rows, depth, width), _ = product_sizes(step, sizes)
    if rows < _LEAST_ROWS or rows * depth * width < _LEAST_COPIED:
        return 0
    far = width >= _APART and width & (width - 1) == 0
    if step.views[1].axes != (1, 0) and not far:
        return 0
    return columns * (depth if depth <= _DEPTH else min(-(-depth // 2), 2 * _DEPTH))


def _buffered(step: Step, sizes: Mapping[Leg, int], entries: int) -> int:
    """Entries of the buffers by which operands are repeated along legs that they lack."""
    whole = prod(sizes[leg] for leg in step.legs)
    repeated = sum(prod(sizes[leg] for leg in legs) < whole for legs in step.input_legs)
    return repeated * min(entries, whole)


def _axes(step: Step, place: int) -> int:
    """Number of axes of an operand as a product has it."""
    shape = step.views[place].shape
    return len(step.input_legs[place] if shape is None else shape)


def _unmerged(step: Step, sizes: Mapping[Leg, int]) -> int:
    """Entries of both operands, once all batch axes of a product are one: 0 if that is a view."""
    axes = step.views[-1].axes
    if step.kind != "matmul" or axes is None or len(axes) < 4 or axes[0] + 1 == axes[1]:
        return 0
    left, right = step.input_legs
    batches = [sizes[leg] for leg in step.legs[:2]]
    if min(batches) == 1:
        return 0
    batch = prod(batches)
    summed = prod(sizes[leg] for leg in left if leg in right and leg not in step.legs)
    return batch * summed + prod(sizes[leg] for leg in right)
