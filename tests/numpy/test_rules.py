"""Adam with a rule for each parameter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensormoe import CP
from tensormoe.errors import SpecError
from tensormoe.functional import ParameterRule, parameter_rules
from tensormoe_numpy import Adam, MuMoEMLP


def block() -> MuMoEMLP:
    return MuMoEMLP(8, 16, experts=3, factorization=CP(4), dtype="float64", seed=0)


def test_the_first_step_is_the_rate_times_the_multiplier() -> None:
    layer = block()
    rules = parameter_rules(layer.config)
    adam = Adam(layer.parameters, lr=0.01, rules=rules)
    before = {name: array.copy() for name, array in layer.parameters.items()}
    adam.step({name: np.ones_like(array) for name, array in layer.parameters.items()})
    for name, array in layer.parameters.items():
        np.testing.assert_allclose(before[name] - array, 0.01 * rules[name].multiplier, rtol=1e-6)


def test_decay_is_the_same_for_all_that_decay() -> None:
    layer = block()
    rules = parameter_rules(layer.config)
    adam = Adam(layer.parameters, lr=0.1, weight_decay=0.5, rules=rules)
    for array in layer.parameters.values():
        array += 1.0
    before = {name: array.copy() for name, array in layer.parameters.items()}
    adam.step({name: np.zeros_like(array) for name, array in layer.parameters.items()})
    for name, array in layer.parameters.items():
        wanted = before[name] * (0.95 if rules[name].decays else 1.0)
        np.testing.assert_allclose(array, wanted, rtol=1e-12)
    assert {rule.decays for rule in rules.values()} == {True, False}


def test_what_has_no_rule_is_trained_as_without_rules() -> None:
    arrays = {"head": np.ones(3), "factor": np.ones(3)}
    adam = Adam(arrays, lr=0.1, weight_decay=0.5, rules={"factor": ParameterRule("experts", 2.0)})
    adam.step({name: np.ones(3) for name in arrays})
    np.testing.assert_allclose(arrays["head"], 0.95 - 0.1, rtol=1e-6)
    np.testing.assert_allclose(arrays["factor"], 0.95 - 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"b": ParameterRule("other")}, "rules must be for parameters; got one for 'b'"),
        ({"a": 2.0}, r"rules\['a'\] must be a ParameterRule; got 2\.0"),
        ([ParameterRule("other")], "rules must be a mapping from names to rules"),
    ],
    ids=["unknown name", "number", "list"],
)
def test_rules_of_another_layer_are_refused(rules: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Adam({"a": np.ones(3)}, rules=rules)
