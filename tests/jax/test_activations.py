"""Blocks in JAX with any function or module between their layers, gated or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tensormoe_jax.equinox
import tensormoe_jax.nnx
from tensormoe import CP, Gate, LayerSpec
from tensormoe.errors import SpecError
from tensormoe.functional import BlockConfig, LayerConfig

GATED = BlockConfig(
    LayerConfig(LayerSpec(4, 6, 3, CP(3)), Gate()),
    LayerConfig(LayerSpec(3, 5, 3, CP(2)), None),
    None,
    gated=True,
)
X = jnp.asarray(np.random.default_rng(0).standard_normal((7, 4)), dtype="float32")


def by_hand(block: Any, function: Any) -> Any:
    made = block.coefficients(X)
    middle = block.first(X, made)
    halves = middle[:, :3], middle[:, 3:]
    bent = function(halves[0]) * halves[1] if block.config.gated else function(middle)
    return block.second(bent, made)


@pytest.mark.parametrize("gated", [False, True])
def test_functions_and_modules_of_flax(gated: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"experts": 3, "rank": 2, "gated": gated, "rngs": 0}
    plain = tensormoe_jax.nnx.MuMoEMLP(4, 3, 5, jnp.sin, **options)
    assert (plain.act, plain.config.act_layer) == (jnp.sin, None)
    np.testing.assert_allclose(
        nnx.jit(lambda block, x: block(x))(plain, X), by_hand(plain, jnp.sin), atol=1e-5
    )
    block = tensormoe_jax.nnx.MuMoEMLP(4, 3, 5, nnx.PReLU(0.3), **options)
    np.testing.assert_allclose(block(X), by_hand(block, block.act), atol=1e-5)
    slopes = nnx.grad(lambda block: (block(X) ** 2).sum())(block)
    assert float(jnp.abs(slopes["act"]["negative_slope"][...])) > 0.0
    assert block.num_parameters == block.config.num_parameters + 1
    assert plain.num_parameters == plain.config.num_parameters
    with pytest.raises(SpecError, match=r"act_layer must be one of .* to be saved"):
        block.save(tmp_path / "block")
    again = tensormoe_jax.nnx.MuMoEMLP.restore(block.config, block.parameters, act=block.act)
    np.testing.assert_array_equal(again(X), block(X))


@pytest.mark.parametrize("gated", [False, True])
def test_functions_and_modules_of_equinox(gated: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"experts": 3, "rank": 2, "gated": gated, "key": jax.random.key(0)}
    plain = tensormoe_jax.equinox.MuMoEMLP(4, 3, 5, jnp.sin, **options)
    assert (plain.act, plain.config.act_layer) == (jnp.sin, None)
    np.testing.assert_allclose(eqx.filter_jit(plain)(X), by_hand(plain, jnp.sin), atol=1e-5)
    block = tensormoe_jax.equinox.MuMoEMLP(4, 3, 5, eqx.nn.PReLU(0.3), **options)
    np.testing.assert_allclose(block(X), by_hand(block, block.act), atol=1e-5)
    slopes = eqx.filter_grad(lambda block: (block(X) ** 2).sum())(block)
    assert float(jnp.abs(slopes.act.negative_slope)) > 0.0
    assert block.num_parameters == block.config.num_parameters + 1
    with pytest.raises(SpecError, match=r"act_layer must be one of .* to be saved"):
        block.save(tmp_path / "block")
    again = tensormoe_jax.equinox.MuMoEMLP.restore(block.config, block.parameters, act=block.act)
    np.testing.assert_array_equal(again(X), block(X))


def test_functions_of_the_functional_form() -> None:
    parameters = tensormoe_jax.initialize(GATED, jax.random.key(0))

    @jax.jit
    def run(slope: Any) -> Any:
        # what the activation closes over is differentiated too
        return tensormoe_jax.apply(
            GATED, parameters, X, act=lambda x: jnp.where(x > 0, x, slope * x)
        )

    rectified = BlockConfig(GATED.first, GATED.second, "relu", gated=True)
    want = tensormoe_jax.apply(rectified, parameters, X)
    np.testing.assert_allclose(run(0.0), want, atol=1e-6)
    assert float(jax.grad(lambda slope: (run(slope) ** 2).sum())(0.1)) != 0.0
    trained, _ = tensormoe_jax.train(GATED, parameters, X, act=jax.nn.relu)
    np.testing.assert_allclose(trained, want, atol=1e-6)
    for config, act in ((GATED, None), (rectified, jnp.sin)):
        with pytest.raises(SpecError, match=r"a block has one activation"):
            tensormoe_jax.apply(config, parameters, X, act=act)


@pytest.mark.parametrize("package", [tensormoe_jax.nnx, tensormoe_jax.equinox])
def test_restored_blocks_have_one_activation(package: Any) -> None:
    parameters = tensormoe_jax.initialize(GATED, jax.random.key(0))
    with pytest.raises(SpecError, match=r"act must be the activation .*; got None for None"):
        package.MuMoEMLP.restore(GATED, parameters)
    named = BlockConfig(GATED.first, GATED.second, "relu", gated=True)
    with pytest.raises(SpecError, match=r"act must be .* for 'relu'"):
        package.MuMoEMLP.restore(named, parameters, act=jnp.sin)
    block = package.MuMoEMLP.restore(named, parameters, act=jax.nn.relu)
    assert block.act is None
    want = tensormoe_jax.apply(named, parameters, X)
    np.testing.assert_allclose(block(X), want, atol=1e-6)
    sizes = (block.in_features, block.hidden_features, block.out_features)
    assert sizes == (4, 3, 5)
    assert (block.first.in_features, block.first.out_features) == (4, 6)
