"""One contraction of two operands as one step whose leg orders need no transposed copy.

A matrix product can look at an operand as a view if the summed legs lie side by side in storage,
in the same order in both operands. The legs that only one operand has form its rows (or columns);
if they lie in several places, one run forms the rows and the others are looped over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, product
from math import prod

from tensormoe.factorizations import BATCH, Leg
from tensormoe.planning._program import Kind, View

Order = tuple[Leg, ...]


@dataclass(frozen=True, slots=True)
class Look:
    """A view of an operand of any sizes.

    Args:
        groups: runs of legs that are merged, in storage order, empty ones for axes of size one;
            None where every leg has its own axis.
        axes: their order; None where it stays.
    """

    groups: tuple[Order, ...] | None = None
    axes: tuple[int, ...] | None = None

    def sized(self, sizes: Mapping[Leg, int]) -> View:
        """The view of an operand of these sizes."""
        return View(None if self.groups is None else dims(self.groups, sizes), self.axes)


@dataclass(frozen=True, slots=True)
class Lowered:
    """One way to run a contraction, of any sizes.

    Args:
        kind: the kind of its step.
        legs: leg order of the result.
        swapped: whether the second operand comes first.
        looks: how the operands, in running order, are looked at.
        groups: merged legs of a reshape of the result, if any.
        looped: legs of rows or columns that lie in several places, and are looped over.
        moved: how many operands' axes are moved.
        strided: for the operands in running order, whether the fastest axis is looped over, so that
            the entries of one matrix lie far apart.
    """

    kind: Kind
    legs: Order
    swapped: bool
    looks: tuple[Look, Look]
    groups: tuple[Order, ...] | None = None
    looped: Order = ()
    moved: int = 0
    strided: tuple[bool, bool] = (False, False)

    def loops(self, sizes: Mapping[Leg, int]) -> int:
        """Number of matrices that a product with rows in several places is cut into."""
        if self.kind == "multiply":
            return 1 + self.moved
        return volume(self.looped, sizes, 1)

    def views(self, sizes: Mapping[Leg, int]) -> tuple[View, View]:
        """Views of the operands."""
        first, second = self.looks
        return first.sized(sizes), second.sized(sizes)

    def shape(self, sizes: Mapping[Leg, int]) -> tuple[int, ...] | None:
        """Reshape of the result, if any."""
        return None if self.groups is None else dims(self.groups, sizes)


_WHOLE = Look()


def dims(groups: Sequence[Order], sizes: Mapping[Leg, int]) -> tuple[int, ...]:
    """Sizes of merged groups of legs; the group with the batch is -1."""
    return tuple(-1 if BATCH in group else prod(sizes[leg] for leg in group) for group in groups)


def volume(legs: Sequence[Leg], sizes: Mapping[Leg, int], batch: int) -> int:
    """The number of entries of an array with ``legs``."""
    return prod(batch if leg == BATCH else sizes[leg] for leg in legs)


@lru_cache(maxsize=2**14)
def lower(left: Order, right: Order, kept: frozenset[Leg]) -> tuple[Lowered, ...]:
    """Every way to contract two operands, stored in these orders, into the legs ``kept``.

    Legs that are not kept must be in both operands. There is no way where the storage orders would
    force a copy.
    """
    if all(leg in kept for leg in left + right):
        return tuple(_lower_product(left, right))
    return tuple(_lower_matmul(left, right, kept))


def _lower_product(left: Order, right: Order) -> Iterator[Lowered]:
    """Elementwise, with broadcasting: the result keeps one operand's order as far as it goes."""
    orders = [left + tuple(leg for leg in right if leg not in left)]
    orders.append(right + tuple(leg for leg in left if leg not in right))
    shared = tuple(leg for leg in left if leg in right)
    only_left = tuple(leg for leg in left if leg not in right)
    only_right = tuple(leg for leg in right if leg not in left)
    orders.append(shared + only_left + only_right)
    orders.append(shared + only_right + only_left)
    for order in dict.fromkeys(orders):
        looks = (_aligned(left, order), _aligned(right, order))
        moved = sum(look.axes is not None for look in looks)
        yield Lowered("multiply", order, False, looks, moved=moved)


def _aligned(legs: Order, order: Order) -> Look:
    """``legs`` seen in ``order``, with ones where it has no leg."""
    missing = [leg for leg in order if leg not in legs]
    if not missing and legs == order:
        return _WHOLE
    present = tuple(leg for leg in order if leg in legs)
    if legs == present:
        return Look(tuple(() if leg in missing else (leg,) for leg in order))
    stored = [*legs, *missing]
    groups = (*((leg,) for leg in legs), *(() for _ in missing))
    return Look(groups if missing else None, tuple(stored.index(leg) for leg in order))


def _lower_matmul(left: Order, right: Order, kept: frozenset[Leg]) -> Iterator[Lowered]:
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
        looped_over = (*left_loops, *right_loops)
        flat = not looped and not left_loops and not right_loops
        one_side = (BATCH in left) != (BATCH in right)
        kind: Kind = "linear" if flat and one_side else "matmul"
        strided = left[-1] in loops, right[-1] in loops
        for swapped in (False, True):
            first, second = (right, left) if swapped else (left, right)
            outer, inner = (columns, rows) if swapped else (rows, columns)
            looks = _matrix(first, loops, outer, middle), _matrix(second, loops, middle, inner)
            yield Lowered(
                kind,
                (*loops, *outer, *inner),
                swapped,
                looks,
                _unmerged(loops, outer, inner),
                looped_over,
                sum(look.axes is not None for look in looks),
                strided[::-1] if swapped else strided,
            )


def _runs(order: Order, summed: frozenset[Leg], looped: Order) -> list[Order]:
    """Maximal runs of neighbouring legs of one role; looped legs stand alone."""

    def role(place: int) -> tuple[int, int]:
        leg = order[place]
        return (0, 0) if leg in summed else (1, place) if leg in looped else (2, 0)

    return [tuple(order[k] for k in run) for _, run in groupby(range(len(order)), role)]


def _matrix(order: Order, loops: Order, rows: Order, columns: Order) -> Look:
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
    real = [stored.index(group) for group in wanted if group]
    if real == sorted(real):
        groups, axes = tuple(wanted), tuple(range(len(wanted)))
    else:
        ones = iter(range(len(stored), len(wanted)))
        groups = (*stored, *((),) * (len(wanted) - len(stored)))
        axes = tuple(stored.index(group) if group else next(ones) for group in wanted)
    return Look(
        None if groups == tuple((leg,) for leg in order) else groups,
        None if axes == tuple(range(len(axes))) else axes,
    )


def _unmerged(loops: Order, rows: Order, columns: Order) -> tuple[Order, ...] | None:
    """An axis for every leg of a result, if the product does not come so."""
    if len(rows) == 1 and len(columns) == 1:
        return None
    return tuple((leg,) for leg in (*loops, *rows, *columns))
