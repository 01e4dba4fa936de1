"""Invalid budgets in every public function that takes one: a clear error, no crash, no hang."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tensormoe_torch
from tensormoe import CP, Budget, Gate, rank_front, select_rank
from tensormoe.errors import Alternative, BudgetError, TensormoeError, located
from tensormoe.selection import select_block
from tensormoe_numpy import MuMoE, MuMoEEmbedding, MuMoEMLP
from tensormoe_torch import from_linear, from_mlp, replace

JUNK: tuple[Any, ...] = (
    True, False, 0, -1, 1.5, float("nan"), float("inf"), 10**30, 1j, "", "LINEAR", "linear ",
    b"linear", (), (5,), [500], {}, {"parameters": 500}, {500}, object(), len, Budget, Gate(),
    CP(2), np.float64(500), np.array(500), np.array([500, 600]), np.bool_(True), Decimal(500),
    torch.tensor(500.0), Fraction(1000, 2), range(5), slice(5), "∞",
)  # fmt: skip
"""Values that are not a valid budget, and edge cases."""


def _model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {"a": nn.Linear(8, 8), "b": nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))}
    )


DOORS: dict[str, Callable[[Any], object]] = {
    "Budget(parameters)": lambda junk: Budget(parameters=junk),
    "Budget(flops)": lambda junk: Budget(flops=junk),
    "Budget(memory)": lambda junk: Budget(memory=junk),
    "Budget(time)": lambda junk: Budget(time=junk),
    "Budget(batch)": lambda junk: Budget(flops=5, batch=junk),
    "Budget(itemsize)": lambda junk: Budget(flops=5, itemsize=junk),
    "Budget(gate)": lambda junk: Budget(flops=5, gate=junk),
    "Budget(roofline)": lambda junk: Budget(time=1.0, roofline=junk),
    "like_linear": lambda junk: Budget.like_linear(8, junk),
    "like_mlp": lambda junk: Budget.like_mlp(8, junk, 8),
    "select_rank": lambda junk: select_rank("cp", 8, 8, 4, budget=junk),
    "select_rank(bonds)": lambda junk: select_rank("tucker", 8, 8, 4, bonds=junk),
    "select_rank(bond)": lambda junk: select_rank("tucker", 8, 8, 4, bonds=(junk, None, None)),
    "select_rank(objective)": lambda junk: select_rank("cp", 8, 8, 4, objective=junk),
    "select_rank(gate)": lambda junk: select_rank("cp", 8, 8, 4, gate=junk),
    "select_rank(experts)": lambda junk: select_rank("cp", 8, 8, junk),
    "select_rank(bias)": lambda junk: select_rank("cp", 8, 8, 4, bias=junk),
    "rank_front": lambda junk: rank_front("tensor_ring", 8, 8, 4, budget=junk),
    "select_block": lambda junk: select_block("cp", 8, 16, 8, 4, budget=junk),
    "select_block(pair)": lambda junk: select_block(("cp", junk), 8, 16, 8, 4),
    "select_block(factorization)": lambda junk: select_block(junk, 8, 16, 8, 4),
    "select_block(hidden)": lambda junk: select_block("cp", 8, junk, 8, 4, gated=True),
    "select_block(gated)": lambda junk: select_block("cp", 8, 16, 8, 4, gated=junk),
    "MuMoE": lambda junk: MuMoE(8, 8, 4, budget=junk),
    "MuMoEMLP": lambda junk: MuMoEMLP(8, 16, experts=4, budget=junk),
    "MuMoEEmbedding": lambda junk: MuMoEEmbedding(20, 8, 4, budget=junk),
    "torch": lambda junk: tensormoe_torch.MuMoE(8, 8, 4, budget=junk, device="meta"),
    "torch, block": lambda junk: tensormoe_torch.MuMoEMLP(
        8, 16, experts=4, budget=junk, device="meta"
    ),
    "from_linear": lambda junk: from_linear(nn.Linear(8, 8), 4, budget=junk),
    "from_mlp": lambda junk: from_mlp(_model()["b"], 4, budget=junk),
    "replace": lambda junk: replace(_model(), ["a", "b"], experts=4, budget=junk),
}


@pytest.mark.parametrize("door", DOORS)
def test_junk_is_refused_in_words(door: str) -> None:
    refused = [error for junk in JUNK if (error := _refusal(DOORS[door], junk)) is not None]
    assert len(refused) >= len(JUNK) - 6
    for error in refused:
        assert isinstance(error, TensormoeError)
        assert str(error).rstrip().endswith((".", "'", ")", "}", "]"))


def _refusal(door: Callable[[Any], object], junk: Any) -> Exception | None:
    try:
        door(junk)
    except (TensormoeError, TypeError, ValueError) as error:
        return error
    return None


def test_an_impossible_budget_says_what_would_do() -> None:
    with pytest.raises(BudgetError) as caught:
        select_rank("cp", 64, 64, 512, budget="linear")
    error = caught.value
    assert (error.needed, error.given) == ({"parameters": 33409}, {"parameters": 4160})
    assert "experts=(16, 32) instead of 512 takes 3249" in str(error)
    assert "leave the gate out, Budget(…, gate=False)" in str(error)
    assert error.alternatives == (
        Alternative({"experts": (16, 32)}, {"parameters": 3249}),
        Alternative({"gate": False}, {"parameters": 33409 - 64 * 512}),
    )
    for again in (pickle.loads(pickle.dumps(error)), located(error, "a layer")):
        assert (again.needed, again.alternatives) == (error.needed, error.alternatives)
    # each of the remedies does what it says
    assert select_rank("cp", 64, 64, 512, budget=33409) == 1
    assert select_rank("cp", 64, 64, (16, 32), budget=3249) == 1
    assert select_rank("cp", 64, 64, 512, budget=Budget.like_linear(64, 64, gate=False)) == 6
    with pytest.raises(
        BudgetError, match=r"Raise the budget; or use fewer experts; or choose"
    ) as no:
        select_rank("hadamard", 64, 64, 7, budget=100, gate=None)
    assert no.value.alternatives == ()
    with pytest.raises(BudgetError) as block:
        MuMoEMLP(64, 256, experts=512, budget=Budget(parameters=20_000, flops=10**7, batch=64))
    assert set(block.value.needed) == {"parameters"}
    assert "a block of cp, 512 experts of 64 → 256 → 64 with a gate" in str(block.value)
    least = Budget(parameters=int(block.value.needed["parameters"]))
    assert MuMoEMLP(64, 256, experts=512, budget=least).num_parameters == least.parameters


@pytest.mark.parametrize(
    ("kind", "factorization"),
    [
        *((kind, "cp") for kind in ("parameters", "flops", "memory", "time")),
        ("parameters", ("tensor_ring", "tucker")),
        ("memory", ("tensor_ring", "tucker")),
    ],
    ids=str,
)
def test_the_smallest_block_is_as_large_as_the_error_says(kind: str, factorization: Any) -> None:
    layer = (factorization, 12, 20, 16, (4, 3))
    tiny: dict[str, Any] = {kind: 1e-12 if kind == "time" else 1}
    with pytest.raises(BudgetError) as caught:
        select_block(*layer, budget=Budget(**tiny, batch=32))
    needed = caught.value.needed[kind]
    first, second = select_block(*layer, budget=Budget(**{kind: needed}, batch=32))  # type: ignore[arg-type]
    if kind == "parameters":
        assert first.num_parameters + second.num_parameters + 12 * 7 == needed
    less = needed * (1 - 1e-9) if kind == "time" else needed - 1
    with pytest.raises(BudgetError):
        select_block(*layer, budget=Budget(**{kind: less}, batch=32))  # type: ignore[arg-type]


def test_the_data_of_an_error_travels_with_it() -> None:
    error = BudgetError("too little.", {"parameters": 5}, {"parameters": 4})
    for again in (pickle.loads(pickle.dumps(error)), located(error, "at 'a'")):
        assert type(again) is BudgetError
        assert (again.needed, again.given) == ({"parameters": 5}, {"parameters": 4})
    assert str(located(error, "at 'a'")) == "at 'a': too little."
    with pytest.raises(BudgetError) as caught:
        replace(_model(), "a", experts=512, budget="linear")
    assert caught.value.needed == {"parameters": 8 * 512 + 512 + 17}
    assert str(caught.value).startswith("at 'a': ")
