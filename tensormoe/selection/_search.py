"""Search of a family for the undominated ranks within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

from tensormoe.selection._estimate import Estimator
from tensormoe.selection._family import INNER, OUTER, Choice, Family, largest

__all__ = ["Figures", "best", "front"]

Figures = tuple[int, int]
"""The figure that is maximized, and the tie-breaker."""

# families of up to so many ranks are searched in full; of larger ones, few ranks are checked
_FEW = 256
# outer sizes that are checked on both sides of the best one, where there are many
_NEAR = 3


def best(estimator: Estimator, measure: Callable[[int, int], Figures]) -> Choice | None:
    """The rank that is best within the budget; None if none fits.

    Args:
        estimator: of the family and the budget.
        measure: what to maximize, from expert rank and expert span.
    """
    family = estimator.family

    def figures(sizes: Choice) -> Figures:
        return measure(*family.figures(sizes))

    def rivals(found: list[Choice]) -> Iterable[Choice]:
        return _rivals(family, figures, found[0] if found else None)

    found = _settled(estimator, lambda: _best(estimator, figures), rivals)
    return found[0] if found else None


def front(estimator: Estimator) -> list[Choice]:
    """The ranks within the budget that no other beats in both figures, by rising expert rank."""
    family = estimator.family

    def rivals(found: list[Choice]) -> Iterable[Choice]:
        if not _small(family):
            return [(outer, inner + 1) for outer, inner in found]
        reached = [family.figures(sizes) for sizes in found]
        grid = product(range(1, _last(family) + 1), range(1, family.saturation(INNER) + 1))
        return [sizes for sizes in grid if not _dominated(family.figures(sizes), reached)]

    return _settled(estimator, lambda: _front(estimator), rivals)


def _settled(
    estimator: Estimator,
    search: Callable[[], list[Choice]],
    rivals: Callable[[list[Choice]], Iterable[Choice]],
) -> list[Choice]:
    """Repeat ``search`` until every rank that matters has all its paths explored."""
    while True:
        found = search()
        # ranks that would be better if they fitted: the estimate was right if their best
        # paths are among those that it chose from
        news = [estimator.explore(sizes) for sizes in [*found, *rivals(found)]]
        if any(news):
            continue
        # one that turns out not to fit is left out of the next search
        fits = [estimator.verify(sizes) for sizes in found]
        if not all(fits):
            continue
        # small bonds make paths nearly equal, and ties can fall otherwise than estimated
        others = list(rivals(found)) if _small(estimator.family) else []
        fits = [estimator.verify(sizes) for sizes in (others if found else [(1, 1), *others])]
        if not any(fits):
            return found


def _last(family: Family) -> int:
    """The largest useful outer size."""
    return family.saturation(OUTER) if family.symbols == 2 else 1


def _small(family: Family) -> bool:
    """Whether there are so few ranks that all that matter can be planned."""
    return _last(family) * family.saturation(INNER) <= _FEW


def _dominated(figures: Figures, others: Iterable[Figures]) -> bool:
    """Whether another rank has as much of both figures."""
    return any(figures[0] <= rank and figures[1] <= span for rank, span in others)


class _Reach:
    """The largest inner size at an outer one, by the current estimate."""

    def __init__(self, estimator: Estimator) -> None:
        family = estimator.family
        self._estimator = estimator
        self._high = estimator.ceiling() if family.symbols else 1
        self._seen: dict[int, tuple[int, int]] = {}
        self.last = _last(family)

    def __call__(self, outer: int) -> tuple[int, int]:
        """The inner size that is taken, and one that no larger outer size gets beyond."""
        if outer not in self._seen:
            ranks = self._estimator.slice(outer)
            widest = ranks.widest(self._high)
            self._seen[outer] = (ranks.largest(widest), max(widest))
        return self._seen[outer]

    def walk(self, wanted: Callable[[int, Choice], bool]) -> Iterable[Choice]:
        """The largest inner size for every outer one at which some rank is wanted.

        ``wanted`` says of an outer size and a rank whether any rank up to that one, from the outer
        size on, may be of use.
        """
        outer, bound = 1, self._high
        while outer <= self.last and bound > 0:
            start = outer
            # figures grow with both sizes: nothing is wanted before
            outer = 1 + largest(lambda size: not wanted(start, (size, bound)), start - 1, self.last)  # noqa: B023
            if outer > self.last:
                return
            least = 1 + largest(lambda size: not wanted(start, (outer, size)), 0, bound)  # noqa: B023
            # an inner size that does not fit here fits with no larger outer size
            if self._estimator.fits_any(outer, least):
                inner, bound = self(outer)
                if inner > 0:
                    yield outer, inner
                outer += 1
            else:
                bound = least - 1

    def spread(self) -> Iterable[Choice]:
        """The same for few outer sizes far apart."""
        outer = 1
        while outer <= self.last and self(outer)[1] > 0:
            if self(outer)[0] > 0:
                yield outer, self(outer)[0]
            outer *= 2


def _best(estimator: Estimator, figures: Callable[[Choice], Figures]) -> list[Choice]:
    """The best rank by the estimate; the first of equals."""
    best: list[Choice] = []
    goal: Figures = (0, 0)

    def propose(sizes: Choice) -> None:
        nonlocal best, goal
        reached = figures(sizes)
        # of equals the one with the smaller outer size, in whatever order they were found
        if reached > goal or (reached == goal and bool(best) and sizes[0] < best[0][0]):
            best, goal = [sizes], reached

    def wanted(outer: int, corner: Choice) -> bool:
        bound = figures(corner)
        return bound > goal or (bound == goal and bool(best) and outer < best[0][0])

    reach = _Reach(estimator)
    for sizes in reach.spread():
        propose(sizes)
    for sizes in reach.walk(wanted):
        propose(sizes)
    for sizes, fits in estimator.known.items():
        # planned ranks that fit count even where the estimate is too high
        if fits:
            propose(sizes)
    return best


def _front(estimator: Estimator) -> list[Choice]:
    """The undominated ranks by the estimate, in order of expert rank."""
    figures = estimator.family.figures
    found: dict[Figures, Choice] = {}

    def wanted(_: int, corner: Choice) -> bool:
        return not _dominated(figures(corner), found)

    for sizes in _Reach(estimator).walk(wanted):
        found.setdefault(figures(sizes), sizes)
    for sizes, fits in estimator.known.items():
        # planned ranks that fit count even where the estimate is too high
        if fits:
            found.setdefault(figures(sizes), sizes)
    front: list[Choice] = []
    span = 0
    for pair in sorted(found, reverse=True):
        if pair[1] > span:
            span = pair[1]
            front.append(found[pair])
    return front[::-1]


def _rivals(
    family: Family, figures: Callable[[Choice], Figures], best: Choice | None
) -> Iterable[Choice]:
    """Ranks that would be better: of few all, of many some near the best one and far from it.

    Larger ones may have another path, which costs less of what is limited.
    """
    outer, _ = best or (1, 0)
    goal = figures(best) if best else (0, 0)
    last, end, small = _last(family), family.saturation(INNER), _small(family)
    near = set(range(outer - _NEAR, outer + _NEAR + 1))
    others = {*range(1, last + 1)} if small else near.union(2**k for k in range(last.bit_length()))
    for other in sorted(each for each in others if 1 <= each <= last):
        low = largest(lambda size: figures((other, size)) <= goal, 0, end)  # noqa: B023
        steps: Iterable[int] = [1]
        if small:
            steps = range(1, end - low + 1)
        elif other in near:
            steps = [2**k for k in range((end - low).bit_length())]
        yield from ((other, low + step) for step in steps if low < end)
