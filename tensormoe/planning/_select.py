"""The rank that a budget buys, and the front of expert rank against expert span."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product

from tensormoe._spec import LayerSpec
from tensormoe._validation import choice
from tensormoe.errors import BudgetError
from tensormoe.factorizations import Factorization
from tensormoe.gates import Gate
from tensormoe.planning._budget import Budget
from tensormoe.planning._estimate import Estimator
from tensormoe.planning._family import INNER, OUTER, Choice, Family, largest

__all__ = ["OBJECTIVES", "RankChoice", "rank_front", "select_rank"]

Figures = tuple[int, int]

_MEASURES: dict[str, Callable[[int, int], Figures]] = {
    "capacity": lambda rank, span: (rank * span, rank),
    "expert_rank": lambda rank, span: (rank, span),
    "expert_span": lambda rank, span: (span, rank),
}

# ranks of a family that are all looked at before one is settled; of more, few
_FEW = 256

OBJECTIVES = tuple(_MEASURES)
"""What rank selection can maximize."""


@dataclass(frozen=True)
class RankChoice:
    """A rank with what it buys.

    Args:
        factorization: the factorization with its rank.
        rank: bond sizes, as the factorization takes them.
        spec: the layer.
        expert_rank: the generic rank of one expert's matrix.
        expert_span: the dimension of the space that the experts span.
        parameters: stored entries of the layer without a gate.
    """

    factorization: Factorization
    rank: int | tuple[int, ...] | None
    spec: LayerSpec = field(repr=False)
    expert_rank: int
    expert_span: int
    parameters: int


def select_rank(
    factorization: str | type[Factorization],
    in_features: int,
    out_features: int,
    experts: int | tuple[int, ...],
    *,
    budget: Budget | int | str = "linear",
    bias: bool = True,
    objective: str = "capacity",
    bonds: Sequence[int | str | None] | None = None,
    gate: Gate | str | None = None,
) -> int | tuple[int, ...] | None:
    """The rank with the most capacity that a budget allows.

    The budget is never exceeded, and no other rank of the same family within it has a higher
    objective: without exception for parameters, and for FLOPs, memory and time as far as the
    paths go that the planner takes at the ranks around the best one and at some far from it. (In
    families of a few hundred ranks every rank that could be better is planned in full.) The
    family is one size for every symbol of the factorization's pattern: the bonds of a tensor
    ring next to an expert mode are equally large and the one between input and output
    is free. Equal objectives are told apart by the other figure, then by smaller bonds around the
    expert modes, then by the larger bond between input and output. Where a budget limits memory
    alone, bonds stop where a larger one would add nothing to either figure.

    Args:
        factorization: "cp", "tensor_ring", "tensor_train", "tucker", "shared_basis", "base_delta",
            "shared_delta", "hadamard", "dense", another name that is registered, or a class.
        in_features: I, the size of an input.
        out_features: O, the size of an output.
        experts: N, or one size a level of hierarchy.
        budget: upper limits; an integer counts parameters, "linear" stands for those of a linear
            layer of the same sizes.
        bias: whether every expert has a bias.
        objective: "capacity" is expert rank × expert span. Either figure alone lets the other
            collapse: the tensor ring of the highest expert rank has r₁ = r₂ = 1 and experts that
            are multiples of one another. "expert_rank" and "expert_span" are there for those who
            fix the other one by ``bonds``.
        bonds: one entry a bond: a size that is fixed, or None for bonds that vary together. Names
            instead of None make several such groups, two at most.
        gate: counted against the budget if given. Papers differ: Oldfield et al. 2024 count it in
            their CLIP head.

    Returns:
        The rank as the factorization takes it; None for one that has no rank, if it fits.

    Raises:
        BudgetError: nothing fits, and the message names the smallest budget that something fits;
            or the budget or the objective makes no sense.
        SpecError: sizes that make no layer, or an unknown factorization.
        RankError: ``bonds`` do not fit the factorization.

    >>> select_rank("cp", 768, 768, 512)
    288
    >>> select_rank("tensor_ring", 768, 768, 512, bonds=(4, 4, None))
    (4, 4, 94)
    >>> select_rank("hadamard", 768, 768, 512)
    Traceback (most recent call last):
        ...
    tensormoe.errors.BudgetError: parameters must be at least 983808 for hadamard, 512 experts of \
768 → 768; got 590592. Raise the budget, use fewer experts, or choose another factorization.
    """
    measure = _MEASURES[choice(objective, OBJECTIVES, "objective", BudgetError)]
    estimator = _estimator(
        factorization, in_features, out_features, experts, budget, bias, bonds, gate
    )
    family = estimator.family

    def figures(sizes: Choice) -> Figures:
        return measure(*family.figures(sizes))

    def rivals(found: list[Choice]) -> Iterable[Choice]:
        return _rivals(family, figures, found[0] if found else None)

    settled = _settled(estimator, lambda: _best(estimator, figures), rivals)
    if not settled:
        raise _impossible(estimator)
    rank: int | tuple[int, ...] | None = family.spec(settled[0]).factorization.rank
    return rank


def rank_front(
    factorization: str | type[Factorization],
    in_features: int,
    out_features: int,
    experts: int | tuple[int, ...],
    *,
    budget: Budget | int | str = "linear",
    bias: bool = True,
    bonds: Sequence[int | str | None] | None = None,
    gate: Gate | str | None = None,
) -> tuple[RankChoice, ...]:
    """The ranks within a budget that no other one beats in both figures.

    Args:
        factorization: as for :func:`select_rank`, like all that follows.
        in_features: I, the size of an input.
        out_features: O, the size of an output.
        experts: N, or one size a level of hierarchy.
        budget: upper limits.
        bias: whether every expert has a bias.
        bonds: sizes that are fixed, and symbols.
        gate: counted against the budget if given.

    Returns:
        One choice for every pair of figures on the front, by rising expert rank.

    Raises:
        BudgetError: nothing fits.
        SpecError: sizes that make no layer, or an unknown factorization.
        RankError: ``bonds`` do not fit the factorization.

    >>> front = rank_front("tensor_ring", 768, 768, 512)
    >>> [(each.rank, each.expert_rank, each.expert_span) for each in front[-2:]]
    [((2, 2, 191), 382, 4), ((1, 1, 383), 383, 1)]
    """
    estimator = _estimator(
        factorization, in_features, out_features, experts, budget, bias, bonds, gate
    )
    family = estimator.family

    def rivals(found: list[Choice]) -> Iterable[Choice]:
        if not _small(family):
            return [(outer, inner + 1) for outer, inner in found]
        reached = [family.figures(sizes) for sizes in found]
        grid = product(range(1, _last(family) + 1), range(1, family.saturation(INNER) + 1))
        return [sizes for sizes in grid if not _dominated(family.figures(sizes), reached)]

    settled = _settled(estimator, lambda: _front(estimator), rivals)
    if not settled:
        raise _impossible(estimator)
    choices = []
    for sizes in settled:
        spec = family.spec(sizes)
        choices.append(
            RankChoice(
                spec.factorization,
                spec.factorization.rank,
                spec,
                *family.figures(sizes),
                spec.num_parameters,
            )
        )
    return tuple(choices)


def _estimator(
    factorization: str | type[Factorization],
    in_features: int,
    out_features: int,
    experts: int | tuple[int, ...],
    budget: Budget | int | str,
    bias: bool,
    bonds: Sequence[int | str | None] | None,
    gate: Gate | str | None,
) -> Estimator:
    family = Family(factorization, in_features, out_features, experts, bias, bonds)
    return Estimator(
        family,
        Budget.parse(budget, in_features, out_features, bias),
        None if gate is None else Gate.parse(gate),
    )


def _settled(
    estimator: Estimator,
    search: Callable[[], list[Choice]],
    rivals: Callable[[list[Choice]], Iterable[Choice]],
) -> list[Choice]:
    """What ``search`` finds once no rank that matters has a path that was not seen."""
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
    """The largest outer size that is of use."""
    return family.saturation(OUTER) if family.symbols == 2 else 1


def _small(family: Family) -> bool:
    """Whether there are so few ranks that all that matter can be planned."""
    return _last(family) * family.saturation(INNER) <= _FEW


def _dominated(figures: Figures, others: Iterable[Figures]) -> bool:
    """Whether another rank has as much of both figures."""
    return any(figures[0] <= rank and figures[1] <= span for rank, span in others)


class _Reach:
    """How far the inner size goes at an outer one, by the estimate as it stands."""

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
        while outer <= self.last:
            if wanted(outer, (outer, bound)):
                # no larger outer size leaves room for an inner one that has no room here
                least = 1 + largest(lambda size: not wanted(outer, (outer, size)), 0, bound)  # noqa: B023
                if self._estimator.fits_any(outer, least):
                    inner, bound = self(outer)
                    if inner > 0:
                        yield outer, inner
                else:
                    bound = least - 1
                    # a lower bound lets the walk take longer steps
                    gap = 1
                    while bound > 0 and not self._estimator.fits_any(outer, bound):
                        bound, gap = max(bound - gap, 0), 4 * gap
                if bound == 0:
                    return
            step = 1
            while outer + step <= self.last and not wanted(outer, (outer + step, bound)):
                step *= 2
            # everything up to `low` is skipped, and `step` is not
            low = step // 2
            while step - low > 1:
                middle = (low + step) // 2
                if outer + middle <= self.last and not wanted(outer, (outer + middle, bound)):
                    low = middle
                else:
                    step = middle
            outer += step

    def spread(self) -> Iterable[Choice]:
        """The same for few outer sizes far apart."""
        outer = 1
        while outer <= self.last and self(outer)[1] > 0:
            if self(outer)[0] > 0:
                yield outer, self(outer)[0]
            outer *= 2

    def plateau(self, sizes: Choice) -> Choice:
        """The largest outer size that leaves room for the same inner one."""
        outer, inner = sizes
        end = largest(lambda size: self._estimator.fits_any(size, inner), outer, self.last)
        return end, self(end)[0]


def _best(estimator: Estimator, figures: Callable[[Choice], Figures]) -> list[Choice]:
    """The rank that the estimate has for the best; the first of equals."""
    best: list[Choice] = []
    goal: Figures = (0, 0)

    def propose(sizes: Choice) -> bool:
        nonlocal best, goal
        reached = figures(sizes)
        # of equals the one with the smaller outer size, whenever it was come upon
        better = reached > goal or (reached == goal and bool(best) and sizes[0] < best[0][0])
        if better:
            best, goal = [sizes], reached
        return better

    def wanted(outer: int, corner: Choice) -> bool:
        bound = figures(corner)
        return bound > goal or (bound == goal and bool(best) and outer < best[0][0])

    reach = _Reach(estimator)
    for sizes in reach.spread():
        propose(sizes)
    for sizes in reach.walk(wanted):
        if propose(sizes) and reach.last > 1:
            propose(reach.plateau(sizes))
    for sizes, fits in estimator.known.items():
        # planned ranks that fit count even where the estimate is too high
        if fits:
            propose(sizes)
    return best


def _front(estimator: Estimator) -> list[Choice]:
    """The ranks that the estimate has for undominated, by rising expert rank."""
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
    """The smallest ranks that would be better, at outer sizes near the best one and far from it."""
    outer, _ = best or (1, 0)
    goal = figures(best) if best else (0, 0)
    last = _last(family)
    others = {outer, outer - 1, outer + 1, *(8**k for k in range(last.bit_length() // 3 + 1))}
    small = _small(family)
    if small:
        others = set(range(1, last + 1))
    end = family.saturation(INNER)
    for other in sorted(each for each in others if 1 <= each <= last):
        if figures((other, end)) > goal:
            low = largest(lambda size: figures((other, size)) <= goal, 0, end)  # noqa: B023
            # a still larger one may have another path, which costs less of what is limited
            for size in range(low + 1, end + 1 if small else low + 2):
                yield other, size


def _impossible(estimator: Estimator) -> BudgetError:
    """The error for a budget that nothing fits, with what the smallest bonds take."""
    budget, given = estimator.budget, estimator.family.sizes
    needed = budget.spent(estimator.cost((1, 1)))
    rules = " and ".join(
        f"{name} must be at least {value}"
        for name, value in needed.items()
        if value > budget.limits[name]
    )
    values = ", ".join(str(value) for name, value in budget.limits.items() if needed[name] > value)
    experts = " × ".join(map(str, given.experts))
    gate = "" if estimator.gate is None else " with a gate"
    return BudgetError(
        f"{rules} for {estimator.family.name}, {experts} experts of {given.in_features} → "
        f"{given.out_features}{gate}; got {values}. Raise the budget, use fewer experts, "
        "or choose another factorization."
    )
