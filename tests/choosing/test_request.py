"""Requests: words and numbers that they are read from, and messages for those that cannot be."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from tensormoe import Budget, Gate
from tensormoe.choosing import parse_request
from tensormoe.errors import RequestError
from tensormoe.planning import PUBLISHED_ROOFLINES

LAYER: dict[str, Any] = {"in_features": 64, "out_features": 32, "experts": [4, 8]}


def fields(**values: Any) -> dict[str, str]:
    """The messages of a request that cannot be, by field."""
    with pytest.raises(RequestError) as caught:
        parse_request({**LAYER, **values})
    return {name: str(error) for name, error in caught.value.fields.items()}


def test_words_and_numbers_are_the_same_request() -> None:
    words = {
        "in_features": "64",
        "out_features": "32",
        "experts": "4x8",
        "factorizations": "cp,tensor-ring",
        "bonds": "tensor_ring=4,4,4,free",
        "budget": "parameters=2k,time=1ms",
        "gate": "top-k",
        "top_k": "3",
        "batch": "128",
    }
    numbers = {
        **LAYER,
        "factorizations": ["cp", "tensor_ring"],
        "bonds": {"tensor_ring": [4, 4, 4, None]},
        "budget": {"parameters": 2000, "time": 1e-3},
        "gate": Gate("top_k", k=3).to_dict(),
        "top_k": 3,
        "batch": 128,
    }
    assert parse_request(words) == parse_request(numbers)


@pytest.mark.parametrize(
    ("kind", "without", "linear", "mlp"),
    [
        ("layer", 65 * 32, 65 * 32, 65 * 256 + 257 * 32),
        ("mlp", 65 * 256 + 257 * 32, 65 * 256 + 257 * 32, 65 * 256 + 257 * 32),
        ("gated", 65 * 512 + 257 * 32, 65 * 512 + 257 * 32, 65 * 512 + 257 * 32),
        ("embedding", 64 * 32, 64 * 32, 64 * 256 + 256 * 32),
    ],
)
def test_budgets_stand_for_what_is_replaced(kind: str, without: int, linear: int, mlp: int) -> None:
    given = {**LAYER, "kind": kind}
    assert parse_request(given).budget == Budget(parameters=without, gate=False)
    assert parse_request({**given, "budget": "linear"}).budget == Budget(parameters=linear)
    assert parse_request({**given, "budget": "mlp"}).budget == Budget(parameters=mlp)
    on_top = parse_request({**given, "budget": 900, "gate_in_budget": False}).budget
    assert on_top == Budget(parameters=900, gate=False)


def test_budgets_know_the_call() -> None:
    asked = parse_request(
        {**LAYER, "budget": {"memory": "1MiB", "time": "1ms"}, "batch": 7, "dtype": "bfloat16"}
    )
    found = asked.budget
    assert (found.memory, found.time, found.batch, found.itemsize) == (2**20, 1e-3, 7, 2)
    assert found.roofline == asked.device


def test_null_is_the_default_but_for_the_gate() -> None:
    nulls = dict.fromkeys(("kind", "budget", "bonds", "rank", "selected", "parts", "device"))
    assert parse_request({**LAYER, **nulls}) == parse_request(LAYER)
    assert parse_request(LAYER).gate == Gate()
    assert parse_request({**LAYER, "gate": None}).gate is None
    assert parse_request({**LAYER, "gate": "none"}).gate is None


def test_outputs_are_as_wide_as_inputs_unless_said() -> None:
    asked = parse_request({"in_features": 48, "experts": 4})
    assert (asked.out_features, asked.hidden_features) == (48, 192)


def test_every_field_is_read_before_the_error() -> None:
    found = fields(
        in_features=-1,
        out_features="x",
        experts="3x",
        gate="foo",
        budget="bar",
        device="abacus",
        kind="wheel",
        batch=2.5,
        dtype="int8",
        objective="all",
        top_k=True,
        parts=["nothing"],
        zzz=1,
    )
    assert set(found) == {
        *("in_features", "out_features", "experts", "gate", "budget", "device", "kind", "batch"),
        *("dtype", "objective", "top_k", "parts", "zzz"),
    }
    assert all(message.endswith(".") and "got" in message for message in found.values())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("in_features", None, "in_features must be a positive integer; got None"),
        ("in_features", 2**70, "in_features must be below 2**63"),
        ("in_features", "9" * 40, "in_features must be a positive integer"),
        ("in_features", "<b>1</b>", "in_features must be a positive integer; got '<b>1</b>'"),
        ("experts", [], "experts"),
        ("experts", [4, 0], "got 0 for level 1"),
        ("experts", {"a": 1}, "experts"),
        ("factorizations", "cp,abacus", "abacus"),
        ("factorizations", [], "factorizations must be a list of names"),
        ("factorizations", 3, "factorizations must be a list of names"),
        ("bonds", {"tensor_ring": 4}, "bonds of tensor_ring must be a list"),
        ("bonds", {"abacus": [4]}, "abacus"),
        ("bonds", 4, "bonds must be an object"),
        ("budget", {"weight": 3}, "a budget must limit parameters, flops, memory, time"),
        ("budget", {"flops": float("nan")}, "flops of a budget must be a quantity"),
        ("budget", {"flops": True}, "flops of a budget must be a number; got True"),
        ("budget", {"time": -1}, "time of a budget must be a quantity"),
        ("budget", 0, "budget must be a positive integer; got 0"),
        ("budget", "parameters=1k,parameters=2k", "must limit parameters once"),
        ("gate", {"activation": "entmax"}, "gate"),
        ("gate", {**Gate("top_k", k=5).to_dict()}, "got 5 for level 0 of 4"),
        ("gate", 3, "gate must be a Gate or the name of an activation"),
        ("bias", 1, "bias must be True or False"),
        ("training", "yes", "training must be True or False"),
        ("device", {"name": "mine"}, "a roofline must have exactly"),
        ("devices", 0, "devices must be a positive integer"),
        ("selected", "abacus", "selected must be one of"),
        ("rank", 3, "rank must come with a selected factorization"),
        ("parts", "rows", "parts must be a list"),
    ],
)
def test_one_wrong_value(name: str, value: Any, said: str) -> None:
    found = fields(**{name: value})
    assert set(found) == {name}
    assert said in found[name]


@pytest.mark.parametrize(
    ("values", "name", "said"),
    [
        ({"selected": "cp", "rank": 0}, "rank", "rank must be a positive integer"),
        (
            {"selected": "cp", "rank": [3, 4, 5]},
            "rank",
            "rank must be one positive integer; got (3, 4, 5)",
        ),
        ({"selected": "hadamard", "rank": 3}, "rank", "rank must be None for hadamard"),
        ({"kind": "embedding", "gate": "entmax"}, "gate", "gate must be left out for embeddings"),
        ({"kind": "embedding", "bias": True}, "bias", "bias must be left out for embeddings"),
        ({"kind": "mlp", "bonds": "tensor_ring=4,4,4,free"}, "bonds", "left out for blocks"),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, Any], name: str, said: str) -> None:
    found = fields(**values)
    assert set(found) == {name}
    assert said in found[name]


@pytest.mark.parametrize("value", [None, 3, "a request", [("in_features", 3)]])
def test_not_an_object(value: Any) -> None:
    with pytest.raises(RequestError, match="a request must be an object"):
        parse_request(value)


def test_the_error_can_be_pickled() -> None:
    with pytest.raises(RequestError) as caught:
        parse_request({"in_features": 0, "experts": 0})
    found = pickle.loads(pickle.dumps(caught.value))
    assert str(found) == str(caught.value)
    assert set(found.fields) == {"in_features", "experts"}


def test_devices_are_values_as_well() -> None:
    profile = PUBLISHED_ROOFLINES["a100"]
    for value in ("a100", profile, profile.to_dict()):
        assert parse_request({**LAYER, "device": value}).device == profile
