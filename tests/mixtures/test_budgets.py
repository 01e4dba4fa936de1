"""Budgets of sparse mixtures: never exceeded, not beaten, and covering all that is built."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

import tensormoe_numpy
import tensormoe_torch
from tensormoe import CP, Dense
from tensormoe.errors import BudgetError, RankError
from tensormoe.mixtures import sparse_config
from tensormoe.routing import Router
from tensormoe.selection import Budget


def build(hidden: int | None = 12, **options: Any) -> Any:
    kind = "swiglu" if hidden else "linear"
    return sparse_config(8, hidden, 6, **{"experts": 4, "top_k": 2, "kind": kind} | options)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "mlp"])
def test_everything_counts_and_nothing_in_the_family_is_better(kind: str, mixed: bool) -> None:
    options: dict[str, Any] = {"kind": kind, "bias": True, "router": Router(bias=True)}
    options |= {"shared_features": 5, "mix_shared": mixed}
    found = build(factorization="cp", budget=1200, **options)
    assert found.num_parameters <= 1200
    first, second = found.experts.up.factorization, found.experts.down.factorization
    for more in ((1, 0), (0, 1)):
        pair = CP(first.rank + more[0]), CP(second.rank + more[1])
        assert build(factorization=pair, **options).num_parameters > 1200
    # what was not built is there to be spent
    alone = build(factorization="cp", budget=1200, kind=kind, bias=True)
    assert alone.experts.up.factorization.rank > first.rank
    free = Budget(parameters=1200, gate=False)
    wider = build(factorization="cp", budget=free, **options)
    router = 8 * 4 + 4 + (8 * 2 + 2) * mixed
    assert 1200 < wider.num_parameters <= 1200 + router
    assert (
        wider.num_parameters
        == build(factorization="cp", budget=1200 + router, **options).num_parameters
    )


@pytest.mark.parametrize("budget", range(90, 400, 31))
def test_linear_experts_by_brute_force(budget: int) -> None:
    found = build(None, factorization="cp", budget=budget)
    sizes = {
        rank: build(None, factorization=CP(rank)).num_parameters
        for rank in range(1, found.experts.down.factorization.rank + 2)
    }
    best = max(rank for rank, size in sizes.items() if size <= budget)
    assert found.experts.down.factorization == CP(best)


def test_classes_pairs_and_dense_experts() -> None:
    dense = build().num_parameters
    assert build(budget=dense).experts.up.factorization == Dense()
    pair = build(factorization=("dense", CP), budget=dense, experts=4)
    assert pair.experts.up.factorization == Dense()
    assert pair.num_parameters <= dense
    for package, random in ((tensormoe_numpy, {"seed": 0}), (tensormoe_torch, {})):
        layer = package.SparseMoE(
            8, 12, experts=4, top_k=2, factorization="cp", budget=900, **random
        )
        assert 800 < layer.num_parameters <= 900


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too small": (
        {"factorization": "cp", "budget": 80},
        BudgetError,
        r"parameters must be at least 90 for this mixture, of which 32 are not its experts'; got "
        r"80\. Raise the budget; or leave the router out, Budget\(…, gate=False\); or use fewer",
    ),
    "smaller than the router": (
        {"factorization": "cp", "budget": 5},
        BudgetError,
        r"at least 90 for this mixture, of which 32 .*; got 5\. Raise the budget; or use fewer",
    ),
    "dense experts": (
        {"budget": 1000},
        BudgetError,
        r"parameters must be at least 1088 for this mixture",
    ),
    "a name": (
        {"factorization": "cp", "budget": "linear"},
        BudgetError,
        "budget of a mixture must be a number of parameters, as it takes the place of no one "
        "linear layer; got 'linear'. Write a number",
    ),
    "flops": (
        {"factorization": "cp", "budget": Budget(flops=10**6)},
        BudgetError,
        r"must limit parameters alone; got Budget\(flops=1000000, batch=1024\)\. Write a number",
    ),
    "two limits": (
        {"factorization": "cp", "budget": Budget(parameters=900, memory=10**6)},
        BudgetError,
        "must limit parameters alone; got Budget",
    ),
    "not a number": (
        {"factorization": "cp", "budget": 1.5},
        BudgetError,
        "budget of a mixture must be a number of parameters, .*; got 1.5",
    ),
    "a rank besides": (
        {"factorization": "cp", "rank": 3, "budget": 900},
        RankError,
        r"rank and budget exclude one another; got rank=3 and budget=900\. Drop one",
    ),
    "a ranked factorization": (
        {"factorization": ("cp", CP(3)), "budget": 900},
        RankError,
        r"rank and budget exclude one another; got CP\(rank=3\) and budget=900\. Drop one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        build(**options)


def test_the_least_that_an_error_names_is_enough() -> None:
    for hidden, kind in product((None, 12), ("cp", "tensor_ring", "dense")):
        with pytest.raises(BudgetError) as caught:
            build(hidden, factorization=kind, budget=3)
        needed = int(caught.value.needed["parameters"])
        assert build(hidden, factorization=kind, budget=needed).num_parameters <= needed
        with pytest.raises(BudgetError):
            build(hidden, factorization=kind, budget=needed - 1)
