"""One budget shared out: in proportion to weights, or along curves of loss against cost."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log

# parts that the stretch between two measured points is cut into
_PARTS = 16
# losses below this share of a curve's largest are taken for noise
_FLOOR = 1e-3


@dataclass(frozen=True)
class Bounds:
    """Least and most that one taker can be given.

    Args:
        least: it needs as much.
        most: it can't use more.
    """

    least: float
    most: float


@dataclass(frozen=True)
class Point:
    """A point of a curve.

    Args:
        cost: of being there.
        loss: there.
        label: of the curve that it is on, where a taker has several.
    """

    cost: float
    loss: float
    label: Hashable = None


def in_proportion(weights: Sequence[float], bounds: Sequence[Bounds], limit: float) -> list[float]:
    """Shares in proportion to weights, as far as bounds allow; together the limit, or all of most.

    With weights √(w·n) they minimize Σ w·n/x, the losses of n entries that get x of them and lose
    as w · n/x: the derivative w·n/x² is the same for all (Lagrange).

    Args:
        weights: positive.
        bounds: of each.
        limit: at least the sum of what is least.

    >>> in_proportion([1, 3], [Bounds(2, 100), Bounds(2, 100)], 40)
    [10.0, 30.0]
    >>> in_proportion([1, 2], [Bounds(15, 100), Bounds(2, 100)], 40)
    [15, 25.0]
    """

    def shares(level: float) -> list[float]:
        return [
            min(max(level * weight, each.least), each.most)
            for weight, each in zip(weights, bounds, strict=True)
        ]

    # the sum is a polygon in the level, with a corner wherever one reaches a bound
    corners = sorted(
        {
            end / weight
            for weight, each in zip(weights, bounds, strict=True)
            for end in (each.least, each.most)
        }
    )
    low, high = 0, len(corners) - 1
    if sum(shares(corners[high])) <= limit:
        return shares(corners[high])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(shares(corners[middle])) <= limit else (low, middle)
    start, stop = corners[low], corners[high]
    given, more = sum(shares(start)), sum(shares(stop))
    part = (limit - given) / (more - given) if more > given else 0.0
    return shares(start + min(max(part, 0.0), 1.0) * (stop - start))


def along_curves(curves: Sequence[Iterable[Point]], limit: float) -> list[Point]:
    """The points of several curves with the smallest sum of losses within a sum of costs.

    Of each curve its lower convex hull counts. From the cheapest points on, the step with the
    highest gain per cost is taken next, until the limit is reached in the middle of one: the
    optimum over all hulls (Shoham and Gersho 1988; Fox 1966).

    Args:
        curves: at least a point each, in any order.
        limit: at least the sum of the cheapest points.

    >>> steep, flat = [Point(1, 8.0), Point(2, 1.0)], [Point(1, 3.0), Point(2, 2.0)]
    >>> [point.cost for point in along_curves([steep, flat], 3.5)]
    [2, 1.5]
    """
    hulls = [_hull(curve) for curve in curves]
    found = [hull[0] for hull in hulls]
    left = limit - sum(point.cost for point in found)
    steps = [
        ((start.loss - stop.loss) / (stop.cost - start.cost), index, stop)
        for index, hull in enumerate(hulls)
        for start, stop in pairwise(hull)
    ]
    # steps of one hull fall, so that those of each curve come in order
    for _, index, stop in sorted(steps, key=lambda step: (-step[0], step[1], step[2].cost)):
        start = found[index]
        cost = stop.cost - start.cost
        if cost > left:
            part = left / cost
            loss = start.loss + part * (stop.loss - start.loss)
            found[index] = Point(start.cost + left, loss, start.label)
            break
        found[index] = stop
        left -= cost
    return found


def smoothed(points: Sequence[Point]) -> list[Point]:
    """A curve through a few points of one label, with more between them.

    Losses fall about exponentially with cost, so that their logarithms are joined by straight
    lines; a loss above that of a cheaper point, or below zero, is noise.

    Args:
        points: by rising cost.
    """
    least = max(1e-300, *(_FLOOR * point.loss for point in points))
    falling: list[Point] = []
    for point in points:
        loss = max(point.loss, least)
        if falling and point.cost <= falling[-1].cost:
            continue
        if falling:
            loss = min(loss, falling[-1].loss)
        falling.append(Point(point.cost, loss, point.label))
    found = falling[:1]
    for start, stop in pairwise(falling):
        for k in range(1, _PARTS + 1):
            part = k / _PARTS
            loss = exp((1 - part) * log(start.loss) + part * log(stop.loss))
            found.append(Point(start.cost + part * (stop.cost - start.cost), loss, stop.label))
    return found


def _hull(points: Iterable[Point]) -> list[Point]:
    """The lower convex hull, as long as it falls, by rising cost."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda each: (each.cost, each.loss)):
        if hull and point.loss >= hull[-1].loss:
            continue
        while hull and point.cost == hull[-1].cost:
            hull.pop()
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(start: Point, middle: Point, stop: Point) -> bool:
    """Whether the middle point lies on the line between the others, or above it."""
    first = (start.loss - middle.loss) * (stop.cost - middle.cost)
    return first <= (middle.loss - stop.loss) * (middle.cost - start.cost)
