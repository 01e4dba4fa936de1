"""Budgets and plans that can't be: error class, rule, value, remedy."""

from __future__ import annotations

import pytest

from tensormoe import CP, Budget, LayerSpec, rank_front, select_rank
from tensormoe.errors import BudgetError, PlanError, SpecError
from tensormoe_numpy import MuMoE
from tests.bad_input._cases import Case, X, assert_refused, layer, spec

CASES: dict[str, Case] = {
    # budgets
    "no budget": (lambda: layer(rank=None, budget=0), BudgetError, "positive integer; got 0"),
    "negative budget": (lambda: Budget(parameters=-5), BudgetError, "positive integer; got -5"),
    "an empty budget": (
        lambda: Budget(),
        BudgetError,
        r"at least one of parameters, flops, memory and time; got none. Write Budget\(",
    ),
    "a budget in words": (
        lambda: layer(rank=None, budget="cheap"),
        BudgetError,
        "budget must be one of 'linear'; got 'cheap'",
    ),
    "a fraction of a parameter": (
        lambda: layer(rank=None, budget=1.5),
        BudgetError,
        r"budget must be a Budget.*; got 1\.5. Write Budget\(",
    ),
    "no time": (
        lambda: Budget(time=float("nan")),
        BudgetError,
        "time of a budget must be a positive number of seconds; got nan",
    ),
    "an unknown device": (
        lambda: Budget(time=1.0, roofline="abacus"),
        BudgetError,
        "roofline must be one of .*'h100'.*; got 'abacus'",
    ),
    "an impossible number of parameters": (
        lambda: select_rank("cp", 8, 4, 3, budget=15),
        BudgetError,
        "parameters must be at least 40 for cp.*; got 15. Raise the budget",
    ),
    "an impossible number of FLOPs": (
        lambda: select_rank("tensor_ring", 8, 4, 3, budget=Budget(flops=3, batch=1)),
        BudgetError,
        r"flops must be at least \d+ for tensor_ring.*; got 3. Raise",
    ),
    "an impossible memory": (
        lambda: select_rank("cp", 8, 4, 3, budget=Budget(memory=3)),
        BudgetError,
        r"memory must be at least \d+ for cp.*; got 3. Raise",
    ),
    "an impossible time": (
        lambda: select_rank("cp", 8, 4, 3, budget=Budget(time=1e-12)),
        BudgetError,
        r"time must be at least \S+ for cp.*; got 1e-12. Raise",
    ),
    "a budget below a factorization without rank": (
        lambda: MuMoE(8, 4, 3, "hadamard", budget=3),
        BudgetError,
        "parameters must be at least 72 for hadamard.*; got 3. Raise",
    ),
    "a front of an unknown factorization": (
        lambda: rank_front("cpd", 8, 4, 3, budget=100),
        SpecError,
        "factorization must be one of .*; got 'cpd'",
    ),
    # plans
    "a negative batch": (
        lambda: spec().plan(-1),
        PlanError,
        "batch must be a non-negative integer; got -1",
    ),
    "half a batch": (lambda: spec().cost(1.5), PlanError, r"non-negative integer; got 1\.5"),
    "more kept than planned for": (
        lambda: spec().plan(4, top_k=9),
        PlanError,
        "top_k must be at most the experts of each level; got 9 for level 0 of 3. Lower k",
    ),
    "none kept": (lambda: spec().plan(4, top_k=0), PlanError, "positive integer; got 0"),
    "no memory": (
        lambda: layer()(X, memory_limit=0),
        PlanError,
        "memory_limit must be a positive integer; got 0",
    ),
    "too little memory": (
        lambda: layer()(X, memory_limit=10),
        PlanError,
        r"memory_limit must be at least \d+ bytes for 3 inputs of .*; got 10. Raise the limit",
    ),
    "entries of no size": (
        lambda: LayerSpec(8, 4, 3, CP(2)).cost(16, itemsize=0),
        PlanError,
        "itemsize must be a positive integer; got 0",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str) -> None:
    assert_refused(*CASES[name])
