"""Search of a family for the undominated ranks within a budget.

Figures grow with both sizes of a rank, and so does the number of parameters: the ranks that fit are
those below a staircase, and the ranks that are worth anything those above another one. FLOPs,
memory and time fall now and then, where a larger rank runs by another path, but by little.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import product
from operator import itemgetter

from tensormoe.selection._family import INNER, OUTER, Choice, Family
from tensormoe.selection._spending import Spending

Figures = tuple[int, int]
"""The figure that is maximized, and the tie-breaker."""

Measure = Callable[[int, int], Figures]
Test = Callable[[Choice], bool]

# families of up to so many ranks are planned rank by rank, the best first, until one fits
_FEW = 256

# in larger ones, a rank that takes so much of a limit rules out those that are larger
_BEYOND = 1.005


def best(family: Family, spending: Spending, measure: Measure) -> Choice | None:
    """The rank that is best within the budget; None if none fits.

    Args:
        family: the layers.
        spending: the budget, and what counts against it.
        measure: what to maximize, from expert rank and expert span.
    """
    ranks = _Ranks(family, spending)
    found: Choice | None = None
    goal: Figures = (0, 1)
    last = ranks.last
    # outer sizes far apart give a goal that leaves few of the others to be planned
    for outers in ([2**k for k in range(last.bit_length())], range(1, last + 1)):
        # the rank with the goal is found again, or an equal one with a smaller outer size
        found, goal = None, (goal[0], goal[1] - 1)
        for sizes in ranks.search(outers, measure, lambda pair: measure(*pair) > goal):  # noqa: B023
            found, goal = sizes, measure(*family.figures(sizes))
    if found is None and spending.allows(family.spec((1, 1))):
        found = ranks.allowed(measure)
    return found


def front(family: Family, spending: Spending) -> list[Choice]:
    """The ranks within the budget that no other beats in both figures, by rising expert rank."""
    ranks = _Ranks(family, spending)
    found: dict[Figures, Choice] = {}

    reached = _Corners()

    def undominated(pair: Figures) -> bool:
        return not reached.cover(pair)

    for sizes in ranks.search(range(1, ranks.last + 1), lambda *pair: pair, undominated):
        pair = family.figures(sizes)
        reached.add(pair)
        found[pair] = sizes
    front: list[Choice] = []
    span = 0
    for pair in sorted(found, reverse=True):
        if pair[1] > span:
            span = pair[1]
            front.append(found[pair])
    return front[::-1]


class _Ranks:
    """The ranks of a family that keep to a budget.

    Args:
        family: the layers.
        spending: the budget, and what counts against it.
    """

    def __init__(self, family: Family, spending: Spending) -> None:
        self._family, self._spending = family, spending
        self.last = family.saturation(OUTER) if family.symbols == 2 else 1
        self._planned = not spending.budget.counts_parameters_alone
        self._few = self._planned and self.last * family.saturation(INNER) <= _FEW
        self._share = self._shares()
        beyond = _BEYOND if self._planned else 1.0
        self._near = _monotone(lambda sizes: self._share(sizes) <= beyond)
        self._end = self._ceiling()

    def search(
        self, outers: Sequence[int], measure: Measure, wanted: Callable[[Figures], bool]
    ) -> Iterable[Choice]:
        """Ranks that keep to the budget and are wanted when they are found.

        Args:
            outers: the outer sizes of a large family that are looked at.
            measure: a small family is searched from the highest to the lowest.
            wanted: a test of expert rank and expert span that larger figures pass if smaller ones
                do; what has been found may make it stricter.
        """
        family = self._family

        def wants(sizes: Choice) -> bool:
            return wanted(family.figures(sizes))

        if self._few:
            found = self._from_the_best(measure, wants)
        else:
            found = _staircase(outers, self._end, wants, self._near, self._fits)
        for sizes in found:
            # of paths that are equal to the planner, a layer may run by another one
            if self._spending.allows(family.spec(sizes)):
                yield sizes

    def allowed(self, measure: Measure) -> Choice:
        """A rank that the layer's own plan allows, where plans for one batch size allow none.

        The best one of a small family; of a large one the smallest, which must be allowed.
        """
        grid = [(1, 1)]
        if self._few:
            inners = range(1, self._family.saturation(INNER) + 1)
            grid = list(product(range(1, self.last + 1), inners))
            grid.sort(key=lambda sizes: measure(*self._family.figures(sizes)), reverse=True)
        return next(sizes for sizes in grid if self._spending.allows(self._family.spec(sizes)))

    def _shares(self) -> Callable[[Choice], float]:
        """The largest share of a limit that a rank takes."""
        family, spending = self._family, self._spending
        if self._planned:
            return cache(lambda sizes: spending.share(family.spec(sizes)))
        besides = spending.of(family.spec((1, 1))).parameters - family.parameters(1, 1)
        limit = spending.budget.limits["parameters"]
        return lambda sizes: (family.parameters(*sizes) + besides) / limit

    def _fits(self, sizes: Choice) -> bool:
        return self._share(sizes) <= 1

    def _ceiling(self) -> int:
        """An inner size that is out of reach, or larger than useful."""
        if self._family.symbols == 0:
            return 1
        if set(self._spending.budget.limits) == {"memory"}:
            # weights contracted beforehand may leave no trace of a bond in memory
            return self._family.saturation(INNER)
        size = 1
        while self._fits((1, size)):
            size *= 2
        return size

    def _from_the_best(self, measure: Measure, wants: Test) -> Iterable[Choice]:
        family = self._family

        def key(sizes: Choice) -> tuple[int, ...]:
            return *measure(*family.figures(sizes)), -sizes[0], sizes[1]

        grid = product(range(1, self.last + 1), range(1, family.saturation(INNER) + 1))
        for outer, inner in sorted(grid, key=key, reverse=True):
            if wants((outer, inner)) and self._fits((outer, inner)):
                yield outer, self._largest(outer, inner)

    def _largest(self, outer: int, inner: int) -> int:
        """The largest inner size, at least ``inner``, which fits."""
        return _first(lambda size: not self._fits((outer, size)), inner + 1, self._end) - 1


def _staircase(
    outers: Sequence[int], end: int, wants: Test, near: Test, fits: Test
) -> Iterable[Choice]:
    """The largest inner size that fits, for every outer size at which it is wanted.

    Args:
        outers: outer sizes in ascending order.
        end: the largest inner size that is looked at.
        wants: a test that larger ranks pass if smaller ones do.
        near: a test that smaller ranks pass if larger ones do, and all that fit.
        fits: whether a rank keeps to the budget.
    """
    place, bound, least = 0, end, 1
    while bound > 0:
        place = _next(lambda k: wants((outers[k], bound)), place, len(outers) - 1)  # noqa: B023
        if place == len(outers):
            return
        outer = outers[place]
        least = _around(lambda size: wants((outer, size)), least, bound)  # noqa: B023
        if near((outer, least)):
            bound = _first(lambda size: not near((outer, size)), least + 1, bound) - 1  # noqa: B023
            inner = next((k for k in range(bound, least - 1, -1) if fits((outer, k))), None)
            if inner is not None:
                yield outer, inner
            place += 1
        else:
            bound = least - 1


def _first(passes: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest size that passes, as all larger ones do; ``high + 1`` if there is none."""
    return low + bisect_left(range(low, high + 1), True, key=passes)


def _next(passes: Callable[[int], bool], low: int, high: int) -> int:
    """The same, asked fewer times where it is near ``low``."""
    step = 1
    while low + step <= high and not passes(low + step - 1):
        low, step = low + step, 2 * step
    return _first(passes, low, min(low + step - 1, high))


def _around(passes: Callable[[int], bool], guess: int, high: int) -> int:
    """The smallest size from 1 on that passes, asked fewer times where it is near a guess."""
    guess = min(guess, high)
    if not passes(guess):
        return _next(passes, guess + 1, high)
    step = 1
    while guess > step and passes(guess - step):
        guess, step = guess - step, 2 * step
    return _first(passes, max(guess - step + 1, 1), guess)


def _monotone(fits: Test) -> Test:
    """``fits`` for ranks of which smaller ones pass and larger ones fail, asked where needed."""
    passed, failed = _Corners(), _Corners()

    def told(sizes: Choice) -> bool:
        outer, inner = sizes
        if passed.cover(sizes):
            return True
        if failed.cover((-outer, -inner)):
            return False
        answer = fits(sizes)
        if answer:
            passed.add(sizes)
        else:
            failed.add((-outer, -inner))
        return answer

    return told


class _Corners:
    """Pairs, of which those are kept that no other is at least as large as in both entries."""

    def __init__(self) -> None:
        # the first entries rise, and so the second ones fall
        self._pairs: list[tuple[int, int]] = []

    def cover(self, pair: tuple[int, int]) -> bool:
        """Whether one of them is at least as large in both entries."""
        index = bisect_left(self._pairs, pair[0], key=itemgetter(0))
        return index < len(self._pairs) and self._pairs[index][1] >= pair[1]

    def add(self, pair: tuple[int, int]) -> None:
        """Keep a pair that is not covered, and drop those that it covers."""
        if self.cover(pair):
            return
        end = bisect_right(self._pairs, pair[0], key=itemgetter(0))
        start = end
        while start > 0 and self._pairs[start - 1][1] <= pair[1]:
            start -= 1
        self._pairs[start:end] = [pair]
