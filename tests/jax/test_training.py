"""Training on JAX: loops of Flax and Equinox, batch norm's statistics, dropped entries."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tensormoe_jax
from tensormoe import CP, Gate, LayerSpec
from tensormoe.functional import LayerConfig
from tensormoe_jax import equinox as in_equinox
from tensormoe_jax import nnx as in_nnx
from tests._task import task
from tests.jax._helpers import (
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

BATCH_NORM = Gate(normalization="batch", bias=True)


def nnx_loop(module: Any, x: Any, target: Any, steps: int) -> list[float]:
    optimizer = nnx.Optimizer(module, optax.adam(0.02), wrt=nnx.Param)

    @nnx.jit
    def step(module: Any, optimizer: Any) -> Any:
        def loss(module: Any) -> Any:
            return ((module(x) - target) ** 2).mean()

        found, slopes = nnx.value_and_grad(loss)(module)
        optimizer.update(module, slopes)
        return found

    return [float(step(module, optimizer)) for _ in range(steps)]


def eqx_loop(
    layer: Any, state: Any, x: Any, target: Any, steps: int
) -> tuple[Any, Any, list[float]]:
    adam = optax.adam(0.02)
    kept = adam.init(eqx.filter(layer, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(layer: Any, state: Any, kept: Any) -> Any:
        def loss(layer: Any, state: Any) -> Any:
            output, state = layer(x, state=state)
            return ((output - target) ** 2).mean(), state

        (found, state), slopes = eqx.filter_value_and_grad(loss, has_aux=True)(layer, state)
        updates, kept = adam.update(slopes, kept)
        return eqx.apply_updates(layer, updates), state, kept, found

    losses = []
    for _ in range(steps):
        layer, state, kept, found = step(layer, state, kept)
        losses.append(float(found))
    return layer, state, losses


@pytest.mark.parametrize("normalization", ["layer", "batch"])
def test_loops_lower_the_loss_and_agree(normalization: str) -> None:
    x, target, linear = task()
    x, target = to_jax((x, target))
    config = LayerConfig(LayerSpec(8, 3, 8, CP(12)), Gate(normalization=normalization))
    arrays = tensormoe_jax.initialize(config, jax.random.key(0))
    arrays |= tensormoe_jax.initial_buffers(config)
    module = nnx_layer(config, arrays)
    layer, state = eqx_layer(config, arrays)
    losses = nnx_loop(module, x, target, 200)
    layer, state, others = eqx_loop(layer, state, x, target, 200)
    # one rounding grows over the steps
    np.testing.assert_allclose(losses[:50], others[:50], rtol=1e-4)
    assert_same(module.parameters, layer.parameters, 1e-2)
    for found in (losses, others):
        assert found[-1] < 0.5 * linear < found[0]
    module.eval()
    assert_same(module(x), layer(x, state=state, inference=True)[0], 1e-2)
    assert float(((module(x) - target) ** 2).mean()) < 0.6 * linear


def test_statistics_are_numpys() -> None:
    """Over several batches, in every form; calls outside training leave them."""
    with jax.enable_x64(True):
        config = config_of(gate=BATCH_NORM)
        arrays = values(config)
        twin, module = numpys(config, arrays), nnx_layer(config, arrays)
        layer, state = eqx_layer(config, arrays)
        parameters, buffers = split(config, to_jax(arrays))
        learn = jax.jit(
            lambda x, buffers: tensormoe_jax.train(config, parameters, x, buffers=buffers)
        )
        for seed in range(3):
            x = normal(7, 5, seed=seed)
            twin.vjp(x, training=True)
            nnx.jit(lambda module, x: module(x))(module, jnp.asarray(x))
            _, buffers = learn(jnp.asarray(x), buffers)
            _, state = eqx.filter_jit(layer)(jnp.asarray(x), state=state)
        before = jax.tree.map(jnp.copy, module.buffers)
        for found in (buffers, module.buffers, layer.buffers(state)):
            assert_same(found, twin.buffers)
        output = module(jnp.asarray(x), use_running_average=True)
        other, state = eqx.nn.inference_mode(layer)(jnp.asarray(x), state=state)
        assert_same([output, other], [twin(x)] * 2)
        assert_same(module.buffers, before, 0.0)
        assert_same(layer.buffers(state), before, 0.0)


def test_modes_of_flax() -> None:
    """``train``, ``eval``, ``nnx.view`` and arguments of a call, as for Flax's own layers."""
    block = in_nnx.MuMoEMLP(5, experts=3, rank=2, drop=0.5, gate=BATCH_NORM, rngs=0)
    assert (block.gate.use_running_average, block.dropout.deterministic) == (False, False)
    block.eval()
    assert (block.gate.use_running_average, block.dropout.deterministic) == (True, True)
    view = nnx.view(block, use_running_average=False, deterministic=False)
    assert (view.gate.use_running_average, view.dropout.deterministic) == (False, False)
    assert block.gate.use_running_average
    block.train()
    assert (block.gate.use_running_average, block.dropout.deterministic) == (False, False)
    assert "ExpertGate:\n  use_running_average" in nnx.view_info(block)


def dropped_between(output: Any, want: Any, drop: float) -> bool:
    """Whether entries that were kept at the end differ from the output without dropping."""
    kept = np.asarray(output) != 0
    return bool(np.abs(np.asarray(output) * (1 - drop) - np.asarray(want))[kept].max() > 0.1)


class TestDroppedEntries:
    drop = 0.4

    def test_nnx(self) -> None:
        config = block_of(Gate(), "relu", self.drop)
        arrays = values(config, dtype="float32")
        make = in_nnx.MuMoEMLP.restore
        block = make(config, to_jax(arrays), rngs=nnx.Rngs(dropout=0))
        x = jnp.asarray(normal(500, 5, dtype="float32"))
        run = nnx.jit(lambda block, x: block(x))
        first, second = run(block, x), run(block, x)
        assert np.abs(first - second).max() > 0.1
        again = make(config, to_jax(arrays), rngs=nnx.Rngs(dropout=0))
        assert_same(run(again, x), first, 0.0)
        assert abs(float((first == 0).mean()) - self.drop) < 0.05
        block.eval()
        want = numpys(config, arrays)(np.asarray(x))
        assert_same(run(block, x), want, 2e-5)
        assert dropped_between(first, want, self.drop)
        assert_same(block(x[:2], deterministic=False, rngs=nnx.Rngs(1)).shape, (2, 4))

    def test_equinox(self) -> None:
        config = block_of(Gate(), "relu", self.drop)
        arrays = values(config, dtype="float32")
        block, _ = eqx_layer(config, arrays)
        x = jnp.asarray(normal(500, 5, dtype="float32"))
        run = eqx.filter_jit(lambda block, x, key: block(x, key=key))
        first = run(block, x, jax.random.key(0))
        assert_same(run(block, x, jax.random.key(0)), first, 0.0)
        assert np.abs(first - run(block, x, jax.random.key(1))).max() > 0.1
        assert abs(float((first == 0).mean()) - self.drop) < 0.05
        want = numpys(config, arrays)(np.asarray(x))
        assert_same(run(eqx.nn.inference_mode(block), x, None), want, 2e-5)
        assert_same(block(x, inference=True), want, 2e-5)
        assert dropped_between(first, want, self.drop)
        more = eqx.tree_at(lambda block: block.dropout.p, block, 0.9)
        assert abs(float((run(more, x, jax.random.key(0)) == 0).mean()) - 0.9) < 0.05

    def test_functional(self) -> None:
        """Behind the activation and behind the second layer, and enlarged where kept."""
        config = block_of(Gate(), "relu", self.drop)
        arrays = to_jax(values(config, dtype="float32"))
        x = jnp.asarray(normal(1, 5, dtype="float32"))
        want = tensormoe_jax.apply(config, arrays, x)

        @jax.jit
        def mean(keys: Any) -> Any:
            run = jax.vmap(lambda key: tensormoe_jax.train(config, arrays, x, key=key)[0])
            return run(keys).mean(axis=0)

        found = mean(jax.random.split(jax.random.key(0), 20_000))
        assert_same(found, want, 0.05)
        once, _ = tensormoe_jax.train(config, arrays, x, key=jax.random.key(0))
        assert dropped_between(once, want, self.drop)

    def test_blocks_that_drop_nothing_keep_no_keys(self) -> None:
        block = in_nnx.MuMoEMLP(5, experts=3, rank=2, rngs=nnx.Rngs(params=0))
        assert {type(each) for _, each in nnx.to_flat_state(nnx.state(block))} == {nnx.Param}
        x = jnp.ones((2, 5))
        assert_same(block(x), block(x, deterministic=True), 0.0)
        other = in_equinox.MuMoEMLP(5, experts=3, rank=2, key=jax.random.key(0))
        assert_same(other(x), other(x, inference=True), 0.0)


def test_sequential_hands_states_on() -> None:
    """Layers with and without a state beside Equinox's own."""

    def make(key: Any) -> Any:
        first, second, third, last = jax.random.split(key, 4)
        return eqx.nn.Sequential(
            [
                in_equinox.MuMoE(5, 5, 3, rank=2, gate=BATCH_NORM, key=first),
                in_equinox.MuMoE(5, 5, 3, rank=2, key=second),
                eqx.nn.Lambda(jax.nn.relu),
                in_equinox.MuMoEMLP(5, experts=3, rank=2, drop=0.5, gate=BATCH_NORM, key=third),
                in_equinox.MuMoEMLP(5, experts=3, rank=2, key=last),
            ]
        )

    model, state = eqx.nn.make_with_state(make)(jax.random.key(0))
    x = jnp.asarray(normal(7, 5, dtype="float32"))
    output, after = eqx.filter_jit(model)(x, state, key=jax.random.key(1))
    assert output.shape == (7, 5)
    assert len(jax.tree.leaves(after)) == 4
    quiet = eqx.nn.inference_mode(model)
    assert_same(*(eqx.filter_jit(quiet)(x, after)[0] for _ in range(2)), 0.0)


def test_parts_may_be_frozen() -> None:
    """Of a layer, the gate alone learns."""
    x, target = to_jax(task()[:2])
    module = in_nnx.MuMoE(8, 3, 4, rank=3, rngs=0)
    before = jax.tree.map(jnp.copy, module.parameters)
    wanted = nnx.All(nnx.Param, nnx.PathContains("gate"))
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=wanted)
    slopes = nnx.grad(lambda m: ((m(x) - target) ** 2).mean(), argnums=nnx.DiffState(0, wanted))(
        module
    )
    optimizer.update(module, slopes)
    moved = {name for name, each in module.parameters.items() if np.any(each != before[name])}
    assert moved == {"gate.projection_0"}
