"""Rules for models of Flax and Equinox: one for each parameter, and what optax makes of them."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tensormoe import CP, Gate, LayerSpec, TensorRing
from tensormoe.errors import SpecError
from tensormoe.functional import LayerConfig, ParameterRule, parameter_rules
from tensormoe_jax import equinox, initialize
from tensormoe_jax import nnx as flax

RATE, DECAY = 1e-3, 0.1
GATE = Gate(bias=True, normalization="batch")


def optimizer(rules: Any, labels: Any) -> optax.GradientTransformation:
    """AdamW whose decay is the same for all that decay."""
    transforms = {
        rule: optax.adamw(
            RATE * rule.multiplier, weight_decay=DECAY * rule.decays / rule.multiplier
        )
        for rule in jax.tree.leaves(rules)
    }
    return optax.multi_transform(transforms, labels)


def check_step(before: dict[str, Any], after: dict[str, Any], rules: dict[str, Any]) -> None:
    """A step along gradients of ones: the rate times the multiplier, and decay."""
    assert before.keys() == rules.keys()
    for name, rule in rules.items():
        moved = RATE * rule.multiplier + RATE * DECAY * rule.decays * before[name]
        np.testing.assert_allclose(before[name] - after[name], moved, rtol=2e-3, atol=1e-7)


def test_rules_are_labels_of_the_functional_form() -> None:
    config = LayerConfig(LayerSpec(8, 4, (3, 2), TensorRing(2)), GATE)
    rules, parameters = parameter_rules(config), initialize(config, jax.random.key(0))
    adam = optimizer(rules, rules)
    updates, _ = adam.update(
        jax.tree.map(jnp.ones_like, parameters), adam.init(parameters), parameters
    )
    check_step(parameters, optax.apply_updates(parameters, updates), rules)


class Model(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.tokens = nnx.Embed(11, 8, rngs=rngs)
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.block = flax.MuMoEMLP(8, 16, experts=3, factorization=CP(4), gate=GATE, rngs=rngs)
        self.layers = nnx.List([flax.MuMoE(8, 4, (3, 2), "tensor_ring", rank=2, rngs=rngs)])


def named(state: Any) -> dict[str, Any]:
    return {".".join(map(str, path)): each for path, each in nnx.to_flat_state(state)}


def wanted(block: Any, layer: Any, others: dict[str, bool], place: str) -> dict[str, Any]:
    """Rules of the layers by their configurations, and of other parameters as they are told."""
    found = {f"block.{name}": rule for name, rule in parameter_rules(block.config).items()}
    found |= {f"{place}.{name}": rule for name, rule in parameter_rules(layer.config).items()}
    return found | {name: ParameterRule("other", 1.0, decays) for name, decays in others.items()}


def test_models_of_flax() -> None:
    model = Model()
    rules = flax.parameter_rules(model)
    others = {
        "tokens.embedding": False,
        "linear.kernel": True,
        "linear.bias": False,
        "norm.scale": False,
        "norm.bias": False,
    }
    found = named(rules)
    assert found == wanted(model.block, model.layers[0], others, "layers.0")
    adam = nnx.Optimizer(model, optimizer(rules, rules), wrt=nnx.Param)
    before = named(nnx.state(model, nnx.Param))
    before = {name: np.asarray(each.get_value()) for name, each in before.items()}
    adam.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    after = {
        name: np.asarray(each.get_value())
        for name, each in named(nnx.state(model, nnx.Param)).items()
    }
    check_step(before, after, found)


def test_models_of_equinox() -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    model, _ = eqx.nn.make_with_state(
        lambda: {
            "tokens": eqx.nn.Embedding(11, 8, key=keys[0]),
            "linear": eqx.nn.Linear(8, 8, key=keys[1]),
            "block": equinox.MuMoEMLP(
                8, 16, experts=3, factorization=CP(4), gate=GATE, key=keys[2]
            ),
            "layer": equinox.MuMoE(8, 4, (3, 2), "tensor_ring", rank=2, key=keys[3]),
            "given": equinox.MuMoE(8, 4, 3, rank=2, gate=None, key=keys[4]),
            "act": jax.nn.gelu,
        }
    )()
    rules = equinox.parameter_rules(model)
    arrays = eqx.filter(model, eqx.is_inexact_array)
    assert jax.tree.structure(rules) == jax.tree.structure(arrays)
    for name in ("block", "layer", "given"):
        assert rules[name].parameters == parameter_rules(model[name].config)
    assert rules["tokens"].weight == ParameterRule("other", 1.0, False)
    assert rules["linear"].weight == ParameterRule("other", 1.0, True)
    assert rules["linear"].bias == ParameterRule("other", 1.0, False)
    adam = optimizer(rules, lambda _: rules)
    updates, _ = adam.update(jax.tree.map(jnp.ones_like, arrays), adam.init(arrays), arrays)
    moved = eqx.apply_updates(model, updates)
    for name in ("block", "layer", "given"):
        check_step(model[name].parameters, moved[name].parameters, rules[name].parameters)


def test_rules_of_no_module() -> None:
    with pytest.raises(SpecError, match=r"model must be an nnx\.Module; got 3"):
        flax.parameter_rules(3)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="init must be one of"):
        flax.parameter_rules(Model(), init="zeros")
