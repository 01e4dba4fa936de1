"""Responses: as the library's own functions, for every kind of layer, and as their schema says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import tensormoe.selection
from tensormoe import Gate, LayerSpec, rank_front, select_rank
from tensormoe.choosing import (
    answer,
    explore,
    parse_request,
    request_schema,
    response_schema,
)
from tensormoe.choosing._best import best
from tensormoe.choosing._rows import Row
from tensormoe.errors import BudgetError
from tensormoe.factorizations import resolve_factorization
from tensormoe.functional import Options
from tensormoe.planning import PUBLISHED_ROOFLINES, compare_legs
from tensormoe.selection import Budget, linear_cost, mlp_cost, select_block, sparse_moe_cost
from tests._kinds import KINDS

LAYER: dict[str, Any] = {"in_features": 64, "out_features": 32, "experts": [4, 8]}
QUESTIONS: list[dict[str, Any]] = [
    {},
    {"kind": "mlp"},
    {"kind": "gated", "gate": None},
    {"kind": "embedding"},
    {"devices": 4, "training": True},
    {"budget": 10},
    {"budget": "time=1ms,flops=9M"},
    {"selected": "cp", "rank": 7},
    {"bonds": {"tensor_ring": [4, 4, 4, None]}},
    {"gate": "top_k", "top_k": 3, "dtype": "bfloat16"},
    {"parts": []},
    {"parts": ["rows"]},
    {"batch": "none", "device": "abacus"},
]


def row_of(response: dict[str, Any], name: str, part: str = "rows") -> dict[str, Any]:
    return next(each for each in response[part] if each["name"] == name)


def picked(values: dict[str, Any], cost: Any) -> None:
    """Check the figures of a row."""
    assert values["parameters"] == cost.parameters
    assert values["flops"] == cost.flops
    assert values["memory"] == cost.peak_memory
    assert values["time"] == PUBLISHED_ROOFLINES["cpu"].time(cost)


@pytest.mark.parametrize("extra", QUESTIONS, ids=str)
def test_values_fit_their_schemas(extra: dict[str, Any]) -> None:
    asked = {**LAYER, **extra}
    response = explore(asked)
    Draft202012Validator(response_schema()).validate(response)
    assert json.loads(json.dumps(response)) == response
    if response["errors"]:
        return
    Draft202012Validator(request_schema()).validate(asked)
    # the request that comes back is the same one, nothing left open
    Draft202012Validator(request_schema()).validate(response["request"])
    assert parse_request(response["request"]) == parse_request(asked)
    assert explore(response["request"]) == response


def test_schemas_are_schemas_and_can_fail() -> None:
    for schema in (request_schema(), response_schema()):
        Draft202012Validator.check_schema(schema)
    assert not Draft202012Validator(request_schema()).is_valid({**LAYER, "colour": "red"})
    assert not Draft202012Validator(response_schema()).is_valid({"version": 1})


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
@pytest.mark.parametrize("objective", ["capacity", "expert_rank"])
def test_rows_are_what_layers_choose(name: str, objective: str) -> None:
    response = explore({**LAYER, "objective": objective, "budget": 9000})
    row = row_of(response, name)
    budget = Budget(parameters=9000)
    if not row["feasible"]:
        with pytest.raises(BudgetError) as caught:
            select_rank(name, 64, 32, (4, 8), budget=budget, objective=objective)
        assert row["smallest_budget"] == caught.value.needed
        assert row["message"] == str(caught.value)
        return
    rank = select_rank(name, 64, 32, (4, 8), budget=budget, objective=objective)
    spec = LayerSpec(64, 32, (4, 8), resolve_factorization(name, rank))
    assert row["ranks"] == [list(rank) if isinstance(rank, tuple) else rank]
    assert (row["expert_rank"], row["expert_span"]) == (spec.expert_rank, spec.expert_span)
    picked(row, spec.cost(1024, gate=Gate()))
    front = rank_front(name, 64, 32, (4, 8), budget=budget)
    assert [each["parameters"] for each in response["fronts"][name]] == [
        each.parameters for each in front
    ]


@pytest.mark.parametrize("gated", [False, True])
def test_blocks_are_what_constructors_make(gated: bool) -> None:
    asked = {**LAYER, "kind": "gated" if gated else "mlp", "hidden_features": 96, "budget": 20_000}
    response = explore({**asked, "batch": 33, "training": True})
    sizes = 64, 96, 32
    for name in ("cp", "tensor_ring"):
        pair = select_block(name, *sizes, (4, 8), budget=20_000, gated=gated)
        kinds = pair[0].factorization, pair[1].factorization
        config = Options((4, 8), kinds).block(*sizes, gated=gated)
        picked(row_of(response, name), config.cost(33, training=True))
    if not gated:
        picked(row_of(response, "MLP", "baselines"), mlp_cost(*sizes, 33, training=True))


def test_embeddings_have_no_gate_and_take_ids() -> None:
    response = explore({**LAYER, "kind": "embedding", "experts": 8, "batch": 5})
    config = Options(8, "cp", bias=False, gate=None).layer(64, 32, indexed_input=True)
    row = row_of(response, "cp")
    assert row["rank"] == config.spec.factorization.rank
    picked(row, config.cost(5))
    assert response["gate"] is None
    assert row_of(response, "embedding", "baselines")["parameters"] == 64 * 32


def test_baselines_are_counted_as_elsewhere() -> None:
    response = explore({**LAYER, "batch": 16, "hidden_features": 128})
    picked(row_of(response, "linear", "baselines"), linear_cost(64, 32, 16))
    picked(row_of(response, "MLP", "baselines"), mlp_cost(64, 128, 32, 16))
    picked(row_of(response, "sparse MoE", "baselines"), sparse_moe_cost(64, 32, (4, 8), 2, 16))
    names = [each["name"] for each in response["baselines"]]
    assert names == ["linear", "MLP", "dense MoE", "sparse MoE", "soft MoE"]
    block = explore({**LAYER, "kind": "mlp", "out_features": 64})["baselines"]
    assert [each["name"] for each in block][2:] == [
        *("sparse MoE", "soft MoE", "Cartesian MoE", "product keys")
    ]
    assert all(each["feasible"] for each in block)


def test_mixtures_that_cannot_be_say_why() -> None:
    block = explore({**LAYER, "kind": "mlp", "experts": 1})["baselines"]
    assert all(each["feasible"] or each["message"] for each in block)


def test_a_rank_replaces_the_budget_for_one_factorization() -> None:
    response = explore({**LAYER, "selected": "cp", "rank": 500})
    assert row_of(response, "cp")["rank"] == 500
    spec = response["selected"]["layers"][0]["spec"]
    assert (spec["factorization"], spec["rank"]) == ("cp", 500)
    assert row_of(response, "tensor_ring")["parameters"] < 64 * 33 * 32


def test_layers_over_devices_name_the_fastest_leg() -> None:
    response = explore({**LAYER, "devices": 4, "selected": "tucker", "device": "a100"})
    spec = LayerSpec.from_dict(response["selected"]["layers"][0]["spec"])
    legs = compare_legs(
        spec.network, 4, batch=1024, training=False, roofline=PUBLISHED_ROOFLINES["a100"]
    )
    assert row_of(response, "tucker")["leg"] == legs[0].leg
    assert [each["leg"] for each in response["selected"]["legs"]] == [each.leg for each in legs]
    none = explore({**LAYER, "devices": 7, "selected": "cp"})
    assert "must have a multiple of the 7 devices" in row_of(none, "cp")["note"]


def test_the_selected_layer_is_told_in_full() -> None:
    found = explore({**LAYER, "kind": "mlp", "selected": "cp", "training": True})["selected"]
    assert [layer["name"] for layer in found["layers"]] == ["first", "second"]
    assert all(layer["network"].startswith("<svg") for layer in found["layers"])
    row = row_of(explore({**LAYER, "kind": "mlp", "training": True}), "cp")
    counted = sum(step["matmul_flops"] + step["elementwise_flops"] for step in found["steps"])
    assert counted == row["flops"]
    assert found["memory"]["training"] == row["memory"] > found["memory"]["forward"]
    assert found["memory"]["parameters"] == 4 * row["parameters"]


def test_nothing_fits() -> None:
    response = explore({**LAYER, "budget": 10})
    assert response["best"] is None
    assert response["selected"] is None
    assert not any(each["feasible"] for each in response["rows"])


def test_errors_are_values_and_never_raised() -> None:
    response = explore({"in_features": "<script>", "experts": 4})
    assert response == {
        "version": 1,
        "errors": [
            {
                "field": "in_features",
                "message": "in_features must be a positive integer; got '<script>'. Write digits: "
                "768.",
            }
        ],
    }
    # sizes that are possible alone, and bonds that leave nothing to choose
    found = explore({**LAYER, "factorizations": ["tensor_ring"], "bonds": "4,4,4,4,4"})
    assert [each["field"] for each in found["errors"]] == [""]


def test_others_are_told_where_they_are_asked_for() -> None:
    for budget, parts, told in (
        (9000, ["others"], 3),
        (9000, ["rows"], 1),
        ("flops=9M", ["others"], 1),
    ):
        found = explore({**LAYER, "budget": budget, "parts": parts})["best"]
        assert len(found["others"]) == told
        assert found["others"]["capacity"] == found["name"]


def test_parts_are_answered_alone() -> None:
    whole = explore(LAYER)
    for part, keys in {"rows": {"rows", "gate"}, "baselines": {"baselines"}}.items():
        found = explore({**LAYER, "parts": [part]})
        assert {*found} == {"version", "errors", "request", "best", *keys}
        assert all(found[key] == whole[key] for key in keys)


def test_selection_has_the_same_function() -> None:
    assert tensormoe.selection.explore is explore
    assert answer(parse_request(LAYER)) == explore(LAYER)
    with pytest.raises(AttributeError, match="has no attribute 'guess'"):
        tensormoe.selection.guess  # noqa: B018


def test_the_best_row_has_no_collapsed_rank() -> None:
    rows = [
        Row("flat", expert_rank=10, expert_span=10_000),
        Row("round", expert_rank=100, expert_span=100),
        Row("tall", expert_rank=120, expert_span=2),
    ]
    found = best(dict.fromkeys(("capacity", "expert_rank", "expert_span"), rows), "capacity")
    assert found is not None
    assert found.name == "round"
    assert found.others == {"capacity": "round", "expert_rank": "tall", "expert_span": "flat"}
    assert "100 × 100" in found.reason
    assert best({"capacity": [Row("none", error=BudgetError("No."))]}, "capacity") is None
