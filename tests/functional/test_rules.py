"""Learning rates from the network alone: closed forms, what a layer does, and groups."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch

from tensormoe import CP, Dense, Gate, Hadamard, LayerSpec, TensorRing, TensorTrain, Tucker
from tensormoe.errors import SpecError
from tensormoe.factorizations import BaseDelta, Initializer, responses
from tensormoe.functional import BlockConfig, LayerConfig, ParameterRule, parameter_rules
from tensormoe_numpy import MuMoE as NumPyMuMoE
from tensormoe_torch import MuMoE
from tests._kinds import KINDS

LEVELS = [(7,), (3, 2)]


@pytest.mark.parametrize("experts", LEVELS, ids=str)
@pytest.mark.parametrize("init", ["variance", "paper"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_mean_squares_are_those_of_what_is_drawn(
    kind: Any, init: str, experts: tuple[int, ...]
) -> None:
    spec = LayerSpec(6, 5, experts, kind)
    starts = spec.initializers(init)
    found: dict[str, list[float]] = {name: [] for name in starts}
    for seed in range(400):
        layer = NumPyMuMoE(6, 5, experts, kind, gate=None, init=init, dtype="float64", seed=seed)
        for name, array in layer.factors.items():
            found[name].append(float(np.mean(array**2)))
    for name, shape in spec.shapes.items():
        wanted = starts[name].mean_square(shape)
        error = np.std(found[name]) / sqrt(len(found[name]))
        assert abs(np.mean(found[name]) - wanted) <= 4 * error + 1e-12, name


def test_a_linear_layer_moves_as_a_dense_one() -> None:
    spec = LayerSpec(48, 20, 5, Dense())
    found = responses(spec.network, spec.initializers())
    assert (found["weight"].energy, found["weight"].alignment) == (pytest.approx(48), 48)
    assert (found["bias"].energy, found["bias"].alignment) == (pytest.approx(1), 1)
    rules = parameter_rules(LayerConfig(spec, None))
    assert {rule.multiplier for rule in rules.values()} == {1.0}


@pytest.mark.parametrize(("rank", "out"), [(8, 64), (256, 64), (64, 256)])
@pytest.mark.parametrize("k", [5.0, 20.0, 1e9])
def test_closed_forms_of_cp(rank: int, out: int, k: float) -> None:
    """Those of the docstring."""
    i, r, o, f = 32, rank, out, 3
    rules = parameter_rules(LayerConfig(LayerSpec(i, o, 9, CP(r)), None), directions=k)
    linear = i * (1 + i / k)
    assert {name: rule.multiplier for name, rule in rules.items()} == {
        "factors.expert_0": pytest.approx(
            sqrt(6 * linear / (f * (1 + max(1, r / o) / k))), rel=1e-5
        ),
        "factors.input": pytest.approx(
            sqrt(3 * (1 + i / k) / (f * (1 + max(i, i * r / o) / k))), rel=1e-5
        ),
        "factors.output": pytest.approx(sqrt(linear / (2 * r * f * (1 + r / k))), rel=1e-5),
        "factors.bias": pytest.approx(
            sqrt(3 * (1 + 1 / k) / (f * (1 + max(1, r / o) / k))), rel=1e-5
        ),
    }


CASES = [
    (CP(8), 64, 64, (16,)),
    (CP(256), 64, 64, (128,)),
    (CP(64), 32, 256, (8, 8)),
    (TensorRing((2, 2, 8)), 64, 64, (16,)),
    (TensorRing((4, 4, 64)), 64, 32, (16,)),
    (TensorTrain((8, 16)), 64, 64, (16,)),
    (Tucker((4, 16, 32)), 64, 64, (16,)),
    (Hadamard(), 64, 32, (16,)),
]


@pytest.mark.parametrize(("kind", "i", "o", "experts"), CASES, ids=str)
@pytest.mark.parametrize("inputs", [1, 512])
def test_a_step_of_adam_moves_outputs_as_predicted(
    kind: Any, i: int, o: int, experts: tuple[int, ...], inputs: int
) -> None:
    """One gradient direction, and very many, which are the two ends of the formula."""
    torch.manual_seed(0)
    found: dict[str, list[float]] = {}
    for _ in range(24 if inputs == 1 else 3):
        layer = MuMoE(i, o, experts, kind, gate=None, dtype=torch.float64)
        x = torch.randn(inputs, i, dtype=torch.float64)
        picked = [torch.randint(count, (inputs,)) for count in experts]
        made = [
            torch.nn.functional.one_hot(each, count).double()
            for each, count in zip(picked, experts, strict=True)
        ]
        cotangent = torch.randn(inputs, o, dtype=torch.float64)
        layer(x, made).backward(cotangent)
        with torch.no_grad():
            before = layer(x, made)
            for name, factor in layer.factors.items():
                step = 1e-6 * factor.grad.sign()
                factor += step
                moved = (layer(x, made) - before).square().mean()
                found.setdefault(name, []).append(moved.item() / 1e-12)
                factor -= step
    predicted = responses(layer.spec.network, layer.spec.initializers())
    for name, squares in found.items():
        # a batch has as many directions as the smallest of its inputs and features
        size = predicted[name].size(1.0 if inputs == 1 else 512.0)
        assert 0.5 < sqrt(np.mean(squares)) / size < 2.0, name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_parameter_has_a_rule(kind: Any) -> None:
    first = LayerConfig(LayerSpec(8, 12, (3, 2), kind), Gate(bias=True))
    config = BlockConfig(first, LayerConfig(LayerSpec(12, 8, (3, 2), kind), None), "gelu")
    rules = parameter_rules(config)
    assert rules.keys() == config.parameter_shapes().keys()
    for name, rule in rules.items():
        short = name.rpartition(".")[2]
        if name.startswith("gate."):
            assert rule == ParameterRule("gate", 1.0, "projection" in name)
        elif short.startswith("bias"):
            assert (rule.group, rule.decays) == ("bias", False)
        elif short.startswith(("expert_", "mixing")):
            assert (rule.group, rule.decays) == ("experts", False)
        else:
            assert (rule.group, rule.decays) == ("factors", True)
        assert 0 < rule.multiplier < 1e3


def test_terms_of_a_sum_have_rules_of_their_own() -> None:
    """Each by its own energy: half of the layer's at the start."""
    config = LayerConfig(LayerSpec(64, 32, 4, BaseDelta(8)), None)
    rules = parameter_rules(config, directions=1e9)
    assert rules["factors.base"].multiplier == pytest.approx(sqrt(1 / 3), rel=1e-5)
    assert rules["factors.output"].multiplier == pytest.approx(sqrt(64 / 8 / 3), rel=1e-5)


def test_embeddings_are_compared_with_a_table() -> None:
    dense = LayerConfig(LayerSpec(100, 16, 4, Dense(), bias=False), None, indexed_input=True)
    assert parameter_rules(dense)["factors.weight"] == ParameterRule("factors", 1.0, False)
    cp = LayerConfig(LayerSpec(100, 16, 4, CP(8), bias=False), None, indexed_input=True)
    more = LayerConfig(LayerSpec(900, 16, 4, CP(8), bias=False), None, indexed_input=True)
    rules = parameter_rules(cp)
    assert [rules[f"factors.{name}"].decays for name in ("input", "output")] == [False, True]
    assert {name: rule.multiplier for name, rule in parameter_rules(more).items()} == {
        name: pytest.approx(rule.multiplier, rel=1e-4) for name, rule in rules.items()
    }


def test_a_mean_square_counts_the_center() -> None:
    shape = (9, 2, 6)
    assert Initializer(2.0).mean_square(shape) == 4.0
    assert Initializer(2.0, center="tiled").mean_square(shape) == 4.0 + 0.5
    assert Initializer(2.0, center="identity").mean_square(shape) == 4.0 + 2 / 12
    diagonal = Initializer(2.0, center="identity", diagonal=True)
    assert diagonal.mean_square(shape) == pytest.approx(5.0 * 2 / 12)


@pytest.mark.parametrize("directions", [0, -1.0, 0.5, float("nan"), "20", None, True])
def test_directions_must_be_a_number(directions: Any) -> None:
    config = LayerConfig(LayerSpec(8, 4, 3, CP(2)), None)
    with pytest.raises(SpecError, match="directions must be a number of at least 1; got"):
        parameter_rules(config, directions=directions)


def test_directions_without_end() -> None:
    config = LayerConfig(LayerSpec(8, 4, 3, CP(2)), None)
    wanted = parameter_rules(config, directions=1e200)
    for directions in (float("inf"), 10**400):
        assert parameter_rules(config, directions=directions) == wanted


def test_rules_need_a_configuration() -> None:
    with pytest.raises(SpecError, match="config must be a LayerConfig or a BlockConfig; got"):
        parameter_rules(LayerSpec(8, 4, 3, CP(2)))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="init must be one of"):
        parameter_rules(LayerConfig(LayerSpec(8, 4, 3, CP(2)), None), init="zeros")
