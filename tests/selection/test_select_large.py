"""Rank selection over families of hundreds and thousands of ranks, against all of them."""

from __future__ import annotations

import itertools
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest

from tensormoe import CP, Budget, Gate, LayerSpec, rank_front, select_rank
from tensormoe.factorizations import FACTORIZATIONS
from tensormoe.planning import PUBLISHED_ROOFLINES
from tensormoe.selection import excess

CPU = PUBLISHED_ROOFLINES["cpu"]
Sizes = tuple[int, int]
Pair = tuple[int, int]

OBJECTIVES: Mapping[str, Callable[[int, int], Pair]] = {
    "capacity": lambda rank, span: (rank * span, rank),
    "expert_rank": lambda rank, span: (rank, span),
    "expert_span": lambda rank, span: (span, rank),
}


@dataclass(frozen=True)
class Many:
    """A family of layers: the sizes of all, and how far both bond sizes are tried."""

    name: str
    in_features: int
    out_features: int
    experts: tuple[int, ...]
    outer: int
    inner: int
    batch: int = 64

    def __str__(self) -> str:
        return f"{self.name}-{'x'.join(map(str, self.experts))}-{self.batch}"

    @property
    def sizes(self) -> tuple[int, int, tuple[int, ...]]:
        return self.in_features, self.out_features, self.experts

    def spec(self, rank: Any) -> LayerSpec:
        return LayerSpec(*self.sizes, FACTORIZATIONS[self.name](rank))  # type: ignore[call-arg]

    def rank(self, sizes: Sizes) -> int | tuple[int, ...]:
        """Equal bonds around the expert modes, and the others."""
        outer, inner = sizes
        if self.name == "cp":
            return inner
        around = len(self.experts) + (self.name == "tensor_ring")
        return (outer,) * around + (inner,) * (2 if self.name == "tucker" else 1)


@cache
def figures(many: Many) -> dict[Sizes, Pair]:
    """Expert rank and expert span of every layer."""
    found = {}
    for outer in range(1, many.outer + 1):
        for inner in range(1, many.inner + 1):
            spec = many.spec(many.rank((outer, inner)))
            found[outer, inner] = spec.expert_rank, spec.expert_span
    return found


def parameters(many: Many, sizes: Sizes) -> int:
    """Stored entries with the biases, by the formulas of the papers."""
    (outer, inner), experts = sizes, many.experts
    rows, columns = many.in_features + 1, many.out_features
    if many.name == "cp":
        return inner * (sum(experts) + rows + columns)
    if many.name == "tensor_ring":
        return outer**2 * sum(experts) + outer * inner * (rows + columns)
    if many.name == "tensor_train":
        among = sum(
            outer * size * (1 if level == 0 else outer) for level, size in enumerate(experts)
        )
        return among + outer * rows * inner + inner * columns
    core = outer ** len(experts) * inner**2
    return core + outer * sum(experts) + inner * (rows + columns)


def merit(known: Mapping[Sizes, Pair], objective: str) -> Callable[[Sizes], Any]:
    """Order of ranks: by objective, other figure, smaller outer size, larger inner size."""
    measure = OBJECTIVES[objective]
    return lambda sizes: (measure(*known[sizes]), -sizes[0], sizes[1])


def bests(fitting: Mapping[Sizes, Pair], objective: str) -> Sizes:
    """The best rank."""
    return max(fitting, key=merit(fitting, objective))


def bests_within(
    taken: Mapping[Sizes, int], known: Mapping[Sizes, Pair], objective: str
) -> Callable[[int], Sizes | None]:
    """The best rank of those that take no more than a budget, if any does."""
    order = sorted(taken, key=lambda sizes: taken[sizes])
    spent = [taken[sizes] for sizes in order]
    best = [*itertools.accumulate(order, partial(max, key=merit(known, objective)))]

    def within(budget: int) -> Sizes | None:
        count = bisect_right(spent, budget)
        return best[count - 1] if count else None

    return within


# at least 2000 ranks each within the largest budgets tested
MANY = [
    Many("cp", 2100, 2200, (40,), 1, 2500),
    Many("tensor_ring", 60, 48, (900,), 34, 72),
    Many("tensor_train", 40, 48, (60,), 64, 60),
    Many("tucker", 48, 40, (60,), 64, 48),
    Many("tucker", 40, 40, (30, 35), 40, 60),
    Many("tensor_train", 48, 32, (50, 4), 52, 52),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("many", MANY, ids=str)
def test_no_rank_within_a_number_of_parameters_is_better(many: Many, objective: str) -> None:
    known = figures(many)
    taken = {sizes: parameters(many, sizes) for sizes in known}
    assert len(taken) >= 2000
    sample = random.Random(0).sample(sorted(taken), 25)
    assert all(many.spec(many.rank(each)).num_parameters == taken[each] for each in sample)
    # beyond this, ranks that were not checked fit as well
    most = min(parameters(many, (outer, many.inner + 1)) for outer in range(1, many.outer + 1)) - 1
    limits = sorted({value for value in taken.values() if value <= most})
    gate = many.in_features * sum(many.experts)
    best = bests_within(taken, known, objective)
    # ties are where bonds are small
    small = limits[: max(40, len(limits) // 20)]
    drawn = [random.Random(1).sample(each, min(len(each), 40)) for each in (small, limits)]
    for limit in itertools.chain(*drawn):
        for budget in (limit, limit - 1):
            wanted = best(budget)
            if wanted is None:
                continue
            found = select_rank(many.name, *many.sizes, budget=budget + gate, objective=objective)
            if not excess(many.spec(many.rank(wanted))):
                assert found == many.rank(wanted)
                continue
            # bonds beyond use are cut, and what they leave goes to the others
            spec = many.spec(found)
            assert spec.num_parameters <= budget
            assert not excess(spec)
            reached = OBJECTIVES[objective](spec.expert_rank, spec.expert_span)
            assert reached >= OBJECTIVES[objective](*known[wanted])


def _covers(one: Sizes, other: Sizes) -> bool:
    return one[0] >= other[0] and one[1] >= other[1]


@pytest.mark.parametrize("many", MANY, ids=str)
def test_the_front_of_a_large_family_is_whole(many: Many) -> None:
    known = figures(many)
    taken = {sizes: parameters(many, sizes) for sizes in known}
    most = min(parameters(many, (outer, many.inner + 1)) for outer in range(1, many.outer + 1)) - 1
    limits = sorted({value for value in taken.values() if value <= most})
    for limit in random.Random(2).sample(limits, min(len(limits), 12)):
        within = {known[sizes] for sizes, value in taken.items() if value <= limit}
        front, span = [], 0
        for pair in sorted(within, reverse=True):
            if pair[1] > span:
                span = pair[1]
                front.append(pair)
        found = rank_front(many.name, *many.sizes, budget=limit, gate=None)
        pairs = [(each.expert_rank, each.expert_span) for each in found]
        assert pairs == sorted(pairs)
        assert not any(_covers(*two) for two in itertools.permutations(pairs, 2))
        if not any(excess(many.spec(many.rank(sizes))) for sizes in taken if known[sizes] in front):
            assert pairs == front[::-1]
        # bonds beyond use are cut, and what they leave goes to the others
        for objective in OBJECTIVES:
            rank = select_rank(many.name, *many.sizes, budget=limit, gate=None, objective=objective)
            spec = many.spec(rank)
            front.append((spec.expert_rank, spec.expert_span))
        assert all(any(_covers(own, pair) for own in pairs) for pair in front)
        assert all(each.parameters <= limit for each in found)
        assert not any(excess(each.spec) for each in found)


# more ranks than are planned one by one by the search, few enough to plan here
PLANNED = [
    Many("tucker", 24, 20, (20,), 20, 20),
    Many("tensor_train", 24, 20, (20,), 20, 20),
    Many("tensor_ring", 24, 20, (100,), 13, 20),
    Many("cp", 300, 310, (20,), 1, 320),
    # few inputs, for which the planner contracts weights beforehand
    Many("tucker", 24, 20, (20,), 20, 20, batch=16),
]


KINDS = ("flops", "memory", "time")


@cache
def costs(many: Many) -> dict[Sizes, dict[str, float]]:
    found = {}
    for sizes in figures(many):
        cost = many.spec(many.rank(sizes)).cost(many.batch, gate="entmax")
        spent = {"flops": cost.flops, "memory": cost.peak_memory, "time": CPU.time(cost)}
        found[sizes] = spent
    return found


@pytest.mark.parametrize(("many", "kind"), [*itertools.product(PLANNED, KINDS)], ids=str)
def test_no_rank_within_work_memory_or_time_is_better(many: Many, kind: str) -> None:
    known = figures(many)
    taken = {sizes: spent[kind] for sizes, spent in costs(many).items()}
    assert len(taken) > 256
    # ranks with less than bonds of one are left out: overheads can make paths of small ones dear
    limits = sorted({value for value in taken.values() if value >= taken[1, 1]})
    for limit in random.Random(3).sample(limits, 12):
        budget = Budget(**{kind: limit}, batch=many.batch)  # type: ignore[arg-type]
        for objective in ("capacity", "expert_span"):
            fitting = {sizes: known[sizes] for sizes, value in taken.items() if value <= limit}
            wanted = OBJECTIVES[objective](*fitting[bests(fitting, objective)])
            spec = many.spec(
                select_rank(many.name, *many.sizes, budget=budget, objective=objective)
            )
            assert budget.allows(spec.cost(many.batch, gate=Gate()))
            assert not excess(spec)
            assert OBJECTIVES[objective](spec.expert_rank, spec.expert_span) >= wanted


@pytest.mark.parametrize(("many", "kind"), [*itertools.product(PLANNED, KINDS)], ids=str)
def test_the_front_within_work_memory_or_time_is_whole(many: Many, kind: str) -> None:
    known = figures(many)
    taken = {sizes: spent[kind] for sizes, spent in costs(many).items()}
    limits = sorted({value for value in taken.values() if value >= taken[1, 1]})
    for limit in random.Random(6).sample(limits, 4):
        budget = Budget(**{kind: limit}, batch=many.batch)  # type: ignore[arg-type]
        within = {known[sizes] for sizes, value in taken.items() if value <= limit}
        found = rank_front(many.name, *many.sizes, budget=budget)
        assert all(budget.allows(each.spec.cost(many.batch, gate=Gate())) for each in found)
        pairs = [(each.expert_rank, each.expert_span) for each in found]
        for pair in within:
            assert any(pair[0] <= rank and pair[1] <= span for rank, span in pairs)


# as many ranks as are planned one by one
FALLING = Many("tucker", 16, 16, (16,), 16, 16)


def test_a_rank_beyond_others_that_do_not_fit_is_found() -> None:
    known = figures(FALLING)
    taken = {sizes: spent["time"] for sizes, spent in costs(FALLING).items()}
    assert len(taken) == 256

    def smaller(sizes: Sizes) -> list[Sizes]:
        return [*itertools.product(range(1, sizes[0] + 1), range(1, sizes[1] + 1))]

    tried = 0
    limits = sorted({*taken.values()})
    for limit in random.Random(4).sample(limits, len(limits) // 3):
        fitting = {sizes: known[sizes] for sizes, value in taken.items() if value <= limit}
        wanted = bests(fitting, "capacity")
        if all(taken[each] <= limit for each in smaller(wanted)):
            continue
        tried += 1
        budget = Budget(time=limit, batch=FALLING.batch)
        spec = FALLING.spec(select_rank(FALLING.name, *FALLING.sizes, budget=budget))
        reached = OBJECTIVES["capacity"](spec.expert_rank, spec.expert_span)
        assert budget.allows(spec.cost(FALLING.batch, gate=Gate()))
        assert reached >= OBJECTIVES["capacity"](*known[wanted])
    assert tried >= 10


@pytest.mark.parametrize("kind", ["parameters", *KINDS])
@pytest.mark.parametrize("size", [4, 300])
def test_bonds_that_add_nothing_to_the_figures_take_what_is_left(kind: str, size: int) -> None:
    # with fewer components than entries of a matrix, a CP tensor is not any tensor
    sizes = (size, size, 4)
    spec = LayerSpec(*sizes, CP(2 * size + 3))
    cost = spec.cost(64)
    limit = {
        "parameters": cost.parameters,
        "flops": cost.flops,
        "memory": cost.peak_memory,
        "time": CPU.time(cost),
    }[kind]
    budget = Budget(**{kind: limit}, batch=64)  # type: ignore[arg-type]
    rank = select_rank("cp", *sizes, budget=budget, gate=None)
    # memory alone does not tell bonds apart once the figures are reached
    assert rank == (size if kind == "memory" else 2 * size + 3)
