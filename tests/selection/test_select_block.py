"""The budget of a block, and the cost that blocks report: one function counts both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tensormoe import CP, Budget, Cost, Gate, LayerSpec
from tensormoe.errors import BudgetError
from tensormoe.planning import block_cost
from tensormoe.selection import select_block

IN, HIDDEN, OUT = 48, 96, 40
LIMITS: Mapping[str, float] = {
    "parameters": 12_000,
    "flops": 3_000_000,
    "memory": 250_000,
    "time": 3e-4,
}
TINY: Mapping[str, float] = {"parameters": 1, "flops": 1, "memory": 1, "time": 1e-12}
GATE = Gate("softmax", bias=True)


def make_budget(limits: Mapping[str, float], **options: Any) -> Budget:
    return Budget(**limits, **{"batch": 64, **options})


def cost_of(
    pair: tuple[LayerSpec, LayerSpec], budget: Budget, gated: bool, gate: Gate | None = GATE
) -> Cost:
    """The cost of a block in the call that a budget is about."""
    first, second = (spec.plan(budget.batch) for spec in pair)
    counted = gate if budget.gate else None
    return block_cost(first, second, counted, gated=gated, itemsize=budget.itemsize)


OPTIONS: list[dict[str, Any]] = [{}, {"gate": False}, {"itemsize": 2}, {"itemsize": 8, "batch": 24}]
KINDS: list[Any] = ["cp", ("tucker", "tensor_ring")]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", [*LIMITS, "all"])
def test_what_selection_checks_is_what_the_block_costs(
    name: str, kind: Any, options: dict[str, Any], gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = LIMITS if name == "all" else {name: LIMITS[name]}
    budget = make_budget(limits, **options)
    seen = []
    allows = Budget.allows

    def recorded(self: Budget, cost: Cost) -> bool:
        seen.append(self.spent(cost))
        return allows(self, cost)

    monkeypatch.setattr(Budget, "allows", recorded)
    pair = select_block(kind, IN, HIDDEN, OUT, (4, 4), budget=budget, gate=GATE, gated=gated)
    spent = budget.spent(cost_of(pair, budget, gated))
    assert all(spent[each] <= limit for each, limit in budget.limits.items())
    assert spent in seen


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("name", LIMITS)
def test_the_smallest_budget_is_what_the_smallest_block_costs(
    name: str, gate: bool, gated: bool
) -> None:
    def select(limit: float) -> tuple[LayerSpec, LayerSpec]:
        budget = make_budget({name: limit}, gate=gate, itemsize=2)
        return select_block("cp", IN, HIDDEN, OUT, 16, budget=budget, gate=GATE, gated=gated)

    with pytest.raises(BudgetError, match=f"{name} must be at least") as caught:
        select(TINY[name])
    width = 2 * HIDDEN if gated else HIDDEN
    smallest = LayerSpec(IN, width, 16, CP(1)), LayerSpec(HIDDEN, OUT, 16, CP(1))
    budget = make_budget({name: TINY[name]}, gate=gate, itemsize=2)
    needed = budget.spent(cost_of(smallest, budget, gated))
    assert caught.value.needed == needed
    pair = select(needed[name])
    taken = budget.spent(cost_of(pair, budget, gated))[name]
    assert taken <= needed[name]
    with pytest.raises(BudgetError, match=f"{name} must be at least"):
        select(needed[name] * (1 - 1e-9) if name == "time" else needed[name] - 1)


@pytest.mark.parametrize(
    ("name", "limit", "sizes", "gated"),
    [
        *(
            (name, LIMITS[name], (IN, HIDDEN, OUT), gated)
            for name in ("parameters", "flops", "time")
            for gated in (False, True)
        ),
        # where neither layer has all the bonds that it can use, of many ranks and of few
        ("memory", 188_000, (300, 300, 300), False),
        ("memory", 72_000, (200, 50, 200), True),
    ],
)
@pytest.mark.parametrize("gate", [GATE, None], ids=["gate", "none"])
def test_nothing_is_left_for_another_rank(
    name: str, limit: float, sizes: tuple[int, int, int], gated: bool, gate: Gate | None
) -> None:
    """A search that counted more than blocks cost would stop too early."""
    budget = make_budget({name: limit})
    pair = select_block("cp", *sizes, 16, budget=budget, gate=gate or False, gated=gated)
    assert budget.allows(cost_of(pair, budget, gated, gate))
    for place, spec in enumerate(pair):
        more = list(pair)
        more[place] = replace(spec, factorization=CP(spec.factorization.rank + 1))
        assert not budget.allows(cost_of((more[0], more[1]), budget, gated, gate))
