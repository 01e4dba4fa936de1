"""The recommended factorization: sensible at extremes, and true for every objective."""

from __future__ import annotations

from typing import Any

import pytest

from tensormoe.choosing import explore, parse_request
from tensormoe.choosing._best import best
from tensormoe.choosing._rows import Row
from tensormoe.errors import BudgetError, RequestError


def _ask(**values: Any) -> Any:
    return explore({"in_features": 768, "out_features": 768, "parts": ["rows", "others"], **values})


def _rows(**figures: tuple[int, int, float]) -> list[Row]:
    return [
        Row(name, time=time, expert_rank=rank, expert_span=span)
        for name, (rank, span, time) in figures.items()
    ]


@pytest.mark.parametrize("objective", ["capacity", "expert_rank", "expert_span"])
@pytest.mark.parametrize("experts", ["512", "1000x1000"])
def test_others_are_what_the_other_objectives_recommend(experts: str, objective: str) -> None:
    found = _ask(experts=experts)["best"]["others"]
    assert _ask(experts=experts, objective=objective)["best"]["name"] == found[objective]


def test_a_million_experts_keep_ranks_that_are_of_use() -> None:
    for experts in ("1000x1000", "100x100x100", "10x10x10x10x10x10"):
        found = _ask(experts=experts)
        rows = {each["name"]: each for each in found["rows"] if each["feasible"]}
        star = rows[found["best"]["name"]]
        highest = max(each["expert_rank"] for each in rows.values())
        assert star["expert_rank"] >= highest / 2
        assert star["expert_span"] >= 100
        rank, span = star["expert_rank"], star["expert_span"]
        assert f"{rank:,} × {span:,}" in found["best"]["reason"]
    # in one level the gate alone is above any budget of a layer
    assert _ask(experts=10**6, budget="mlp")["best"] is None


def test_experts_in_full_win_where_they_fit() -> None:
    found = _ask(experts=128, budget="100M")["best"]
    assert found["name"] == "dense"
    assert "experts in full" in found["reason"]


def test_of_rows_that_are_alike_the_fastest_wins() -> None:
    # full rank and every direction: the others buy nothing with eight times the parameters
    found = _ask(experts=8, budget="mlp")
    fitting = [each for each in found["rows"] if each["feasible"]]
    full = [each for each in fitting if each["expert_rank"] == 768 and each["expert_span"] == 8]
    assert len(full) > 3
    assert found["best"]["name"] == min(full, key=lambda each: each["time"])["name"] == "hadamard"
    assert "least time" in found["best"]["reason"]


def test_experts_that_are_multiples_of_one_another_are_not_recommended() -> None:
    rows = _rows(cp=(4, 8, 1.0), tensor_train=(100, 1, 1.0))
    found = best({"capacity": rows, "expert_rank": rows}, "capacity")
    assert found is not None
    assert found.name == "cp"
    assert found.others == {"capacity": "cp", "expert_rank": "tensor_train"}
    # unless there is nothing else
    only = best({"capacity": _rows(cp=(4, 1, 1.0), dense=(8, 1, 2.0))}, "capacity")
    assert only is not None
    assert only.name == "dense"


def test_a_collapsed_rank_is_not_recommended_for_its_span() -> None:
    rows = _rows(cp=(300, 300, 1.0), tucker=(20, 5000, 1.0))
    found = best({"capacity": rows, "expert_span": rows}, "capacity")
    assert found is not None
    assert found.name == "cp"
    assert found.others["expert_span"] == "tucker"
    nothing = best({"capacity": [Row("cp", error=BudgetError("too large"))]}, "capacity")
    assert nothing is None


def test_other_objectives_of_a_budget_of_flops_are_not_guessed() -> None:
    found = _ask(experts=64, budget="flops=1G", factorizations="cp")["best"]
    assert found["others"] == {"capacity": "cp"}


def test_a_rank_belongs_to_the_only_factorization() -> None:
    (row,) = _ask(experts=16, factorizations="cp", rank=7)["rows"]
    assert row["rank"] == 7
    for rank, said in (("4,4", "one positive integer"), ("0", "positive integers")):
        (error,) = _ask(experts=16, factorizations="cp", rank=rank)["errors"]
        assert error["field"] == "rank"
        assert said in error["message"]
    # one error, not two, where the name is unknown
    (error,) = _ask(experts=16, factorizations="svd", rank="4,4,4")["errors"]
    assert error["field"] == "factorizations"


def test_blocks_and_embeddings_are_cut_over_devices() -> None:
    block = _ask(kind="mlp", experts=16, factorizations="cp", devices=2, device="h100")
    (row,) = block["rows"]
    assert row["leg"] == "hidden"
    assert row["parameters"] / 2 < row["cut"]["parameters"] < row["parameters"]
    assert row["cut"]["communicated"] > 0
    table = _ask(kind="embedding", experts=16, factorizations="cp", devices=2, device="h100")
    assert table["rows"][0]["leg"]
    odd = _ask(kind="mlp", hidden_features=7, experts=2, factorizations="cp", devices=2, rank=4)
    assert "multiple of the 2 devices" in odd["rows"][0]["note"]


def test_errors_of_fields_can_be_told_apart() -> None:
    with pytest.raises(RequestError) as caught:
        parse_request({"in_features": 0, "out_features": 8, "experts": "x", "batch": "many"})
    assert [*caught.value.fields] == ["in_features", "experts", "batch"]
