"""One contraction of two operands as one step whose leg orders need no transposed copy.

A matrix product can look at an operand as a view if the summed legs lie side by side in storage,
in the same order in both operands. The legs that only one operand has form its rows (or columns);
if they lie in several places, one run forms the rows and the others are looped over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from math import prod

from tensormoe.factorizations import BATCH, Leg
from tensormoe.planning._program import IDENTITY, Kind, View

Order = tuple[Leg, ...]


@dataclass(frozen=True, slots=True)
class Lowered:
    """One way to run a contraction.

    Args:
        kind: the kind of its step.
        legs: leg order of the result.
        swapped: whether the second operand comes first.
        views: how the operands, in running order, are looked at.
        shape: reshape of the result, if any.
        loops: how many matrices a product with rows in several places is cut into.
        strided: for the operands in running order, whether the fastest axis is looped over, so that
            the entries of one matrix lie far apart.
    """

    kind: Kind
    legs: Order
    swapped: bool
    views: tuple[View, View]
    shape: tuple[int, ...] | None
    loops: int = 1
    strided: tuple[bool, bool] = (False, False)


def dims(groups: Sequence[Order], sizes: Mapping[Leg, int]) -> tuple[int, ...]:
    """Sizes of merged groups of legs; the group with the batch is -1."""
    return tuple(-1 if BATCH in group else prod(sizes[leg] for leg in group) for group in groups)


def volume(legs: Sequence[Leg], sizes: Mapping[Leg, int], batch: int) -> int:
    """The number of entries of an array with ``legs``."""
    return prod(batch if leg == BATCH else sizes[leg] for leg in legs)


def lower(
    left: Order, right: Order, kept: frozenset[Leg], sizes: Mapping[Leg, int]
) -> Iterator[Lowered]:
    """Every way to contract two operands, stored in these orders, into the legs ``kept``.

    Legs that are not kept must be in both operands. Yields nothing if the storage orders would
    force a copy.
    """
    if all(leg in kept for leg in left + right):
        yield from _lower_product(left, right, sizes)
    else:
        yield from _lower_matmul(left, right, kept, sizes)


def _lower_product(left: Order, right: Order, sizes: Mapping[Leg, int]) -> Iterator[Lowered]:
    """Elementwise, with broadcasting: the result keeps one operand's order as far as it goes."""
    orders = [left + tuple(leg for leg in right if leg not in left)]
    orders.append(right + tuple(leg for leg in left if leg not in right))
    shared = tuple(leg for leg in left if leg in right)
    only_left = tuple(leg for leg in left if leg not in right)
    only_right = tuple(leg for leg in right if leg not in left)
    orders.append(shared + only_left + only_right)
    orders.append(shared + only_right + only_left)
    for order in dict.fromkeys(orders):
        views = (_aligned(left, order, sizes), _aligned(right, order, sizes))
        moved = sum(view.axes is not None for view in views)
        yield Lowered("multiply", order, False, views, None, 1 + moved)


def _aligned(legs: Order, order: Order, sizes: Mapping[Leg, int]) -> View:
    """``legs`` seen in ``order``, with ones where it has no leg."""
    missing = [leg for leg in order if leg not in legs]
    if not missing and legs == order:
        return IDENTITY
    present = tuple(leg for leg in order if leg in legs)
    if legs == present:
        shape = tuple(1 if leg in missing else dims([(leg,)], sizes)[0] for leg in order)
        return View(shape, None)
    stored = [*legs, *missing]
    shape = (*dims([(leg,) for leg in legs], sizes), *(1 for _ in missing))
    return View(shape if missing else None, tuple(stored.index(leg) for leg in order))


def _lower_matmul(
    left: Order, right: Order, kept: frozenset[Leg], sizes: Mapping[Leg, int]
) -> Iterator[Lowered]:
    shared = frozenset(left) & frozenset(right)
    summed = shared - kept
    looped = tuple(leg for leg in left if leg in shared and leg in kept)
    left_runs, right_runs = _runs(left, summed, looped), _runs(right, summed, looped)
    left_sum = [run for run in left_runs if run[0] in summed]
    right_sum = [run for run in right_runs if run[0] in summed]
    if len(left_sum) != 1 or left_sum != right_sum:
        return
    middle = left_sum[0]
    left_rows = [run for run in left_runs if run != middle and run[0] not in looped]
    right_rows = [run for run in right_runs if run != middle and run[0] not in looped]
    for rows, columns in product(left_rows or [()], right_rows or [()]):
        left_loops = tuple(leg for run in left_rows if run != rows for leg in run)
        right_loops = tuple(leg for run in right_rows if run != columns for leg in run)
        # a run that is looped over is looped leg by leg
        loops = (*looped, *left_loops, *right_loops)
        extra = volume([*left_loops, *right_loops], sizes, 1)
        first = _matrix_view(left, loops, rows, middle, sizes)
        second = _matrix_view(right, loops, middle, columns, sizes)
        flat = not looped and not left_loops and not right_loops
        one_side = (BATCH in left) != (BATCH in right)
        kind: Kind = "linear" if flat and one_side else "matmul"
        legs = (*loops, *rows, *columns)
        shape = _result_shape([(leg,) for leg in loops], rows, columns, sizes)
        strided = left[-1] in loops, right[-1] in loops
        yield Lowered(kind, legs, False, (first, second), shape, extra, strided)
        first = _matrix_view(right, loops, columns, middle, sizes)
        second = _matrix_view(left, loops, middle, rows, sizes)
        legs = (*loops, *columns, *rows)
        shape = _result_shape([(leg,) for leg in loops], columns, rows, sizes)
        yield Lowered(kind, legs, True, (first, second), shape, extra, strided[::-1])


def _runs(order: Order, summed: frozenset[Leg], looped: Order) -> list[Order]:
    """Maximal runs of neighbouring legs of one role; looped legs stand alone."""

    def role(place: int) -> tuple[int, int]:
        leg = order[place]
        return (0, 0) if leg in summed else (1, place) if leg in looped else (2, 0)

    return [tuple(order[k] for k in run) for _, run in groupby(range(len(order)), role)]


def _matrix_view(
    order: Order, loops: Order, rows: Order, columns: Order, sizes: Mapping[Leg, int]
) -> View:
    """``order`` seen as matrices (rows, columns) over ``loops``; ones where it has no such leg."""
    wanted: list[Order] = [(leg,) if leg in order else () for leg in loops]
    # leading axes of size one broadcast by themselves
    while wanted and not wanted[0]:
        wanted.pop(0)
    wanted += [rows, columns]
    stored: list[Order] = []
    for leg in order:
        group = next(group for group in wanted if leg in group)
        if group not in stored:
            stored.append(group)
    sized = dims(stored, sizes)
    real = [stored.index(group) for group in wanted if group]
    if real == sorted(real):
        shape = tuple(sized[stored.index(group)] if group else 1 for group in wanted)
        axes = tuple(range(len(wanted)))
    else:
        ones = iter(range(len(stored), len(wanted)))
        shape = (*sized, *(1,) * (len(wanted) - len(stored)))
        axes = tuple(stored.index(group) if group else next(ones) for group in wanted)
    unmerged = dims([(leg,) for leg in order], sizes)
    return View(
        None if shape == unmerged else shape,
        None if axes == tuple(range(len(axes))) else axes,
    )


def _result_shape(
    loops: Sequence[Order], rows: Order, columns: Order, sizes: Mapping[Leg, int]
) -> tuple[int, ...] | None:
    """The reshape that gives every leg its own axis, if the product does not come so."""
    unmerged = dims([*loops, *((leg,) for leg in (*rows, *columns))], sizes)
    return None if len(rows) == 1 and len(columns) == 1 else unmerged
