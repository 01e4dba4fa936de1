"""Gradients of the JAX layers: NumPy's closed forms, differences, and second derivatives."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tensormoe_jax
from tensormoe import CP, Gate, LayerSpec, TensorRing
from tensormoe.functional import LayerConfig
from tensormoe.gates import (
    entropy_loss,
    entropy_loss_vjp,
    importance_loss,
    importance_loss_vjp,
    load_balance_loss,
    load_balance_loss_vjp,
    z_loss,
    z_loss_vjp,
)
from tests._kinds import DELTAS
from tests.jax._helpers import (
    Arrays,
    assert_same,
    block_of,
    config_of,
    eqx_layer,
    nnx_layer,
    normal,
    numpys,
    split,
    to_jax,
    values,
)

pytestmark = pytest.mark.usefixtures("wide")

BATCH_NORM = Gate(normalization="batch", bias=True)


def numpys_gradients(config: Any, arrays: Arrays, x: np.ndarray) -> tuple[Any, Any, Any]:
    """Of the sum of squares, in training: by parameters, by the input, and the buffers then."""
    layer = numpys(config, arrays)
    output, pull = layer.vjp(x, training=True)
    found = pull(2 * output)
    return found.parameters, found.input, layer.buffers


def jax_gradients(config: Any, arrays: Arrays, x: np.ndarray) -> tuple[Any, Any, Any]:
    parameters, buffers = split(config, to_jax(arrays))

    def loss(parameters: Any, x: Any) -> Any:
        output, kept = tensormoe_jax.train(config, parameters, x, buffers=buffers)
        return (output**2).sum(), kept

    slopes, kept = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(parameters, jnp.asarray(x))
    return *slopes, kept


@pytest.mark.parametrize("kind", DELTAS, ids=str)
def test_of_sums_of_networks(kind: Any) -> None:
    config = config_of(kind, gate=Gate())
    arrays, x = values(config), normal(7, 5)
    assert_same(jax_gradients(config, arrays, x), numpys_gradients(config, arrays, x))


def test_of_blocks_in_every_form() -> None:
    config = block_of(BATCH_NORM)
    arrays, x = values(config), normal(7, 5)
    want = numpys_gradients(config, arrays, x)
    assert_same(jax_gradients(config, arrays, x), want)

    module = nnx_layer(config, arrays)
    slopes = nnx.jit(nnx.grad(lambda block, x: (block(x) ** 2).sum()))(module, jnp.asarray(x))
    flat = {".".join(map(str, path)): each[...] for path, each in nnx.to_flat_state(slopes)}
    assert_same(flat, want[0])
    assert_same(module.buffers, want[2])

    def loss(layer: Any, state: Any, x: Any) -> Any:
        output, state = layer(x, state=state)
        return (output**2).sum(), state

    layer, state = eqx_layer(config, arrays)
    slopes, state = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))(
        layer, state, jnp.asarray(x)
    )
    assert_same(slopes.parameters, want[0])
    assert_same(layer.buffers(state), want[2])


@pytest.mark.parametrize(
    ("kind", "gate"), [(CP(3), Gate()), (TensorRing(2), Gate("softmax", normalization=None))]
)
def test_second_derivatives(kind: Any, gate: Gate) -> None:
    """A product with the Hessian is the slope of the gradient; forward mode is reverse mode."""
    # of two experts, layer norm would leave next to nothing to differentiate
    config = config_of(kind, (3, 4), gate)
    parameters, x = to_jax(values(config)), jnp.asarray(normal(4, 5))
    way = to_jax(values(config, 1))

    def loss(parameters: Any) -> Any:
        return jnp.tanh(tensormoe_jax.apply(config, parameters, x)).sum()

    slope = jax.jit(jax.grad(loss))

    def moved(step: float) -> Any:
        return slope(jax.tree.map(lambda a, b: a + step * b, parameters, way))

    differences = jax.tree.map(lambda a, b: (a - b) / 2e-5, moved(1e-5), moved(-1e-5))
    product = jax.jit(lambda: jax.jvp(jax.grad(loss), (parameters,), (way,))[1])()
    assert_same(product, differences, 1e-6)
    assert_same(
        jax.jit(lambda: jax.jvp(loss, (parameters,), (way,))[1])(), dot(slope(parameters), way)
    )
    reverse = jax.jit(jax.grad(lambda parameters: dot(jax.grad(loss)(parameters), way)))(parameters)
    assert_same(reverse, product, 1e-9)


def dot(left: Any, right: Any) -> Any:
    """The sum of products of all entries of two trees."""
    return sum(map(jnp.vdot, jax.tree.leaves(left), jax.tree.leaves(right)))


@pytest.mark.parametrize(
    ("loss", "vjp"),
    [
        (load_balance_loss, load_balance_loss_vjp),
        (entropy_loss, entropy_loss_vjp),
        (importance_loss, importance_loss_vjp),
        (z_loss, z_loss_vjp),
    ],
)
def test_losses_of_routing(loss: Any, vjp: Any) -> None:
    weights = jax.nn.softmax(jnp.asarray(normal(5, 4)), axis=-1)
    assert_same(jax.grad(lambda each: 3 * loss(each))(weights), vjp(weights, 3.0))


def test_one_expert_has_second_derivatives_without_its_gate() -> None:
    """A layer norm over one logit would multiply what cancels by 1/eps."""
    config = LayerConfig(LayerSpec(5, 4, 1, CP(3)), Gate("softmax", eps=1e-5))
    drawn = tensormoe_jax.initialize(config, jax.random.key(0))
    parameters = {name: array.astype("float32") for name, array in drawn.items()}
    keys = jax.random.split(jax.random.key(1), len(parameters))
    ways = {
        name: jax.random.normal(key, parameters[name].shape, "float32")
        for name, key in zip(parameters, keys, strict=True)
    }
    x = jnp.asarray(normal(7, 5), "float32")
    weights = 30 * jnp.asarray(normal(7, 4), "float32")

    def bend(coefficients: Any) -> float:
        def total(parameters: Any) -> Any:
            return jnp.sum(
                tensormoe_jax.apply(config, parameters, x, coefficients=coefficients) * weights
            )

        _, bends = jax.jit(lambda p: jax.jvp(jax.grad(total), (p,), (ways,)))(parameters)
        return float(sum(jnp.sum(bends[name] * way) for name, way in ways.items()))

    assert bend(None) == pytest.approx(bend([jnp.ones((7, 1), "float32")]), rel=1e-4)
