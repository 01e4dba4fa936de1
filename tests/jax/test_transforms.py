"""The JAX layers under jit, vmap, checkpoint, scan, export, in bfloat16 and without arrays."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tensormoe_jax
from tensormoe import CP, Gate, LayerSpec, TopK, Tucker
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe_jax import equinox as in_equinox
from tensormoe_jax import nnx as in_nnx
from tests.jax._helpers import (
    FORMS,
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
CONFIG = config_of(gate=Gate())
SEVERAL = config_of(Tucker(5), gate=Gate())
"""A layer that runs other programs at other batch sizes."""
HUGE = 10**8


@pytest.fixture(autouse=True)
def wide(request: pytest.FixtureRequest) -> Iterator[None]:
    """JAX's 64-bit mode, but for tests that ask for the usual one."""
    with jax.enable_x64("narrow" not in request.fixturenames):
        yield


@pytest.fixture
def narrow() -> None:
    """JAX as users get it."""


@pytest.mark.parametrize("form", FORMS)
def test_jit_compiles_once_a_shape(form: str) -> None:
    traces = []
    run = FORMS[form](CONFIG, values(CONFIG))

    @jax.jit
    def traced(x: Any) -> Any:
        traces.append(x.shape)
        return run(x)

    for seed, rows in ((0, 7), (1, 7), (2, 3), (3, 7), (4, 3)):
        traced(jnp.asarray(normal(rows, 5, seed=seed)))
    assert traces == [(7, 5), (3, 5)]


def test_a_config_is_a_static_argument() -> None:
    """Equal ones share a compiled function, whoever made them."""
    # a function of its own: those of one function share what was compiled
    run = jax.jit(
        lambda config, arrays, x: tensormoe_jax.apply(config, arrays, x), static_argnums=0
    )
    x = jnp.asarray(normal(7, 5))
    for config in (CONFIG, config_of(gate=Gate()), LayerConfig.from_dict(CONFIG.to_dict())):
        run(config, to_jax(values(CONFIG)), x)
    assert run._cache_size() == 1
    run(block_of(Gate()), to_jax(values(block_of(Gate()))), x)
    assert run._cache_size() == 2


@pytest.mark.parametrize("form", FORMS)
def test_vmap_over_inputs(form: str) -> None:
    run = FORMS[form](CONFIG, values(CONFIG))
    x = jnp.asarray(normal(7, 5))
    want = jax.jit(run)(x)
    assert_same(jax.jit(jax.vmap(run))(x), want)
    assert_same(jax.jit(jax.vmap(jax.vmap(run)))(x.reshape(7, 1, 5)), want[:, None])


def test_gradients_of_every_input_by_itself() -> None:
    parameters, x = to_jax(values(CONFIG)), jnp.asarray(normal(7, 5))

    def loss(parameters: Any, x: Any) -> Any:
        return (tensormoe_jax.apply(CONFIG, parameters, x) ** 2).sum()

    apart = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(parameters, x)
    together = jax.jit(jax.grad(loss))(parameters, x)
    assert apart["factors.input"].shape == (7, 5, 3)
    assert_same(jax.tree.map(lambda each: each.sum(axis=0), apart), together)


def test_a_batch_across_vmap() -> None:
    """Batch norm sees the whole of a batch whose inputs come one at a time."""
    config = config_of(gate=BATCH_NORM)
    arrays, x = values(config), normal(6, 5)
    twin = numpys(config, arrays)
    want, _ = twin.vjp(x, training=True)
    make = partial(in_equinox.MuMoE.restore, axis_name=("outer", "inner"))
    layer, state = eqx.nn.make_with_state(make)(config, to_jax(arrays))

    def one(row: Any, state: Any) -> Any:
        return layer(row, state=state)

    for name in ("inner", "outer"):
        one = jax.vmap(one, in_axes=(0, None), out_axes=(0, None), axis_name=name)
    output, state = jax.jit(one)(jnp.asarray(x).reshape(2, 3, 5), state)
    assert_same(output.reshape(6, 4), want)
    assert_same(layer.buffers(state), twin.buffers)


def test_checkpoints_change_nothing() -> None:
    run = FORMS["functional"](CONFIG, values(CONFIG))
    x = jnp.asarray(normal(7, 5))
    remembered = jax.jit(jax.grad(lambda x: (run(x) ** 2).sum()))(x)
    again = jax.jit(jax.grad(lambda x: (jax.checkpoint(run)(x) ** 2).sum()))(x)
    assert_same(again, remembered)


def test_remat_and_filter_checkpoint() -> None:
    x = jnp.asarray(normal(7, 5))
    module, (layer, _) = nnx_layer(CONFIG, values(CONFIG)), eqx_layer(CONFIG, values(CONFIG))
    call = nnx.remat(lambda module, x: module(x))
    slopes = nnx.jit(nnx.grad(lambda module, x: (call(module, x) ** 2).sum()))(module, x)
    want = eqx.filter_jit(
        eqx.filter_grad(lambda layer: (eqx.filter_checkpoint(layer)(x) ** 2).sum())
    )(layer)
    found = {".".join(map(str, path)): each[...] for path, each in nnx.to_flat_state(slopes)}
    assert_same(found, want.parameters)


class TestStackedLayers:
    """Five layers, one program: initial values under vmap, calls under scan."""

    config = config_of(gate=BATCH_NORM, out=5)

    def want(self, layers: list[Any], x: np.ndarray) -> Any:
        for arrays in layers:
            x = numpys(self.config, jax.tree.map(np.asarray, arrays))(x)
        return x

    def test_functional(self) -> None:
        keys = jax.random.split(jax.random.key(0), 5)
        stacked = jax.vmap(partial(tensormoe_jax.initialize, self.config))(keys)
        moved = jax.tree.map(lambda each: each + 0.1, stacked)
        buffers = tensormoe_jax.initial_buffers(self.config)

        @jax.jit
        def deep(stacked: Any, x: Any) -> Any:
            def body(x: Any, parameters: Any) -> Any:
                return tensormoe_jax.apply(self.config, parameters, x, buffers=buffers), None

            return jax.lax.scan(body, x, stacked)[0]

        x = normal(7, 5)
        layers = [jax.tree.map(lambda each, k=k: each[k], moved) | buffers for k in range(5)]
        assert_same(deep(moved, jnp.asarray(x)), self.want(layers, x))
        slopes = jax.jit(jax.grad(lambda *given: (deep(*given) ** 2).sum()))(moved, jnp.asarray(x))
        assert all(np.abs(each[0]).max() > 0 for each in jax.tree.leaves(slopes))

    def test_nnx(self) -> None:
        @nnx.split_rngs(splits=5)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> in_nnx.MuMoE:
            return in_nnx.MuMoE(5, 5, (3, 2), rank=3, gate=BATCH_NORM, rngs=rngs)

        @nnx.jit
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def deep(layer: Any, x: Any) -> Any:
            return layer(x)

        layers = make(nnx.Rngs(0))
        shift = nnx.state(layers, nnx.Param)
        nnx.update(layers, jax.tree.map(lambda each: each + 0.1, shift))
        assert layers.factors["input"].shape == (5, 5, 3)
        x = normal(7, 5)
        before = layers.buffers
        deep(layers, jnp.asarray(x))
        for name, each in layers.buffers.items():
            assert np.abs(each - before[name]).max(axis=-1).min() > 0  # of all five
        layers.eval()
        named = layers.parameters | layers.buffers
        apart = [jax.tree.map(lambda each, k=k: each[k], named) for k in range(5)]
        assert_same(deep(layers, jnp.asarray(x)), self.want(apart, x))

    def test_equinox(self) -> None:
        keys = jax.random.split(jax.random.key(0), 5)

        @eqx.filter_vmap
        def make(key: Any) -> Any:
            build = eqx.nn.make_with_state(in_equinox.MuMoE)
            return build(5, 5, (3, 2), rank=3, gate=BATCH_NORM, key=key)

        layers, states = make(keys)
        arrays, rest = eqx.partition(layers, eqx.is_array)
        arrays = jax.tree.map(lambda each: each + 0.1, arrays)

        @partial(jax.jit, static_argnums=3)
        def deep(arrays: Any, states: Any, x: Any, inference: bool) -> Any:
            def body(x: Any, given: Any) -> Any:
                layer = eqx.combine(given[0], rest)
                return layer(x, state=given[1], inference=inference)

            return jax.lax.scan(body, x, (arrays, states))

        x = normal(7, 5)
        _, states = deep(arrays, states, jnp.asarray(x), False)
        output, states = deep(arrays, states, jnp.asarray(x), True)
        layers = eqx.combine(arrays, rest)
        named = layers.parameters | layers.buffers(states)
        apart = [jax.tree.map(lambda each, k=k: each[k], named) for k in range(5)]
        assert_same(output, self.want(apart, x))


@pytest.mark.parametrize(
    ("config", "form"),
    [
        *((SEVERAL, form) for form in FORMS),
        (block_of(BATCH_NORM), "nnx"),
        (config_of(gate=Gate("top_k", k=2)), "equinox"),
    ],
)
def test_export_with_an_open_batch(config: Any, form: str) -> None:
    """Through bytes and back, one function serves every batch size."""
    assert len(SEVERAL.regimes.starts) > 2
    run = FORMS[form](config, values(config))
    (batch,) = jax.export.symbolic_shape("batch")
    open_shape = jax.ShapeDtypeStruct((batch, 5), jnp.float64)
    written = jax.export.export(jax.jit(lambda x: run(x)))(open_shape).serialize()
    exported = jax.export.deserialize(written)
    for rows in (1, 7, 40):
        x = normal(rows, 5)
        assert_same(exported.call(jnp.asarray(x)), numpys(config, values(config))(x))


def test_donated_parameters() -> None:
    """A step may write where its arguments were."""
    parameters, x = to_jax(values(CONFIG)), jnp.asarray(normal(7, 5))

    def step(parameters: Any, x: Any) -> Any:
        slopes = jax.grad(lambda p: (tensormoe_jax.apply(CONFIG, p, x) ** 2).sum())(parameters)
        return jax.tree.map(lambda each, slope: each - 0.1 * slope, parameters, slopes)

    want = jax.jit(step)(parameters, x)
    given = jax.tree.map(jnp.copy, parameters)
    assert_same(jax.jit(step, donate_argnums=0)(given, x), want)
    assert all(each.is_deleted() for each in given.values())


class TestPrecision:
    """JAX's default mode has no 64 bits, neither floats nor integers."""

    pytestmark = pytest.mark.usefixtures("narrow")

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("gate", [Gate(), Gate("top_k", k=2)], ids=["entmax", "top_k"])
    def test_float32(self, gate: Gate, form: str) -> None:
        config = config_of(gate=gate)
        arrays, x = values(config, dtype="float32"), normal(7, 5, dtype="float32")
        output = jax.jit(FORMS[form](config, arrays))(jnp.asarray(x))
        assert output.dtype == jnp.float32
        assert_same(output, numpys(config, arrays)(x), 2e-5)

    def test_narrow_ids(self) -> None:
        """Ids of any integer type, and ``TopK`` that the core makes."""
        config = LayerConfig(LayerSpec(9, 4, 3, CP(2), bias=False), None, True)
        parameters = to_jax(values(config, dtype="float32"))
        made = jnp.ones((2, 3), "float32")
        found = [
            tensormoe_jax.apply(config, parameters, jnp.array([8, 1], kind), made)
            for kind in ("int32", "uint8", "uint32")
        ]
        assert_same(found[1:], found[:1] * 2)

    @pytest.mark.parametrize("form", ["nnx", "equinox"])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_halves(self, dtype: str, form: str) -> None:
        """Experts in the layer's dtype; logits, coefficients and statistics in float32."""
        config = block_of(BATCH_NORM)
        rough = {
            name: np.asarray(jnp.asarray(each, dtype), "float32")
            for name, each in values(config, dtype="float32").items()
        }
        _, buffers = split(config, rough)
        parameters = {
            name: jnp.asarray(each, dtype) for name, each in split(config, rough)[0].items()
        }
        arrays = {**parameters, **buffers}
        x = jnp.asarray(normal(7, 5, dtype="float32"), dtype)
        run = jax.jit(FORMS[form](config, arrays))
        assert run(x).dtype == jnp.dtype(dtype)
        want = numpys(config, rough)(np.asarray(x, "float32"))
        assert_same(run(x), want, 0.1 if dtype == "bfloat16" else 0.02)
        made, _ = jax.eval_shape(
            lambda: tensormoe_jax.coefficients(config, parameters, x, buffers=to_jax(buffers))
        )
        assert {each.dtype for each in made} == {np.dtype("float32")}

        def loss(parameters: Any) -> Any:
            return tensormoe_jax.train(config, parameters, x, buffers=to_jax(buffers))[0].sum()

        slopes = jax.eval_shape(jax.grad(loss), parameters)
        assert {each.dtype.name for each in slopes.values()} == {dtype}

    def test_fresh_statistics_are_wide(self) -> None:
        layer = in_nnx.MuMoE(5, 4, 3, rank=2, gate=BATCH_NORM, dtype="bfloat16", rngs=0)
        assert layer.dtype == jnp.bfloat16
        assert {each.dtype.name for each in layer.buffers.values()} == {"float32"}


class TestNothingIsAllocated:
    """Layers of sizes that no machine holds, built and called as shapes."""

    sizes = (HUGE, HUGE, 10**6, CP(10**5))
    config = LayerConfig(LayerSpec(*sizes), Gate())

    def test_functional(self) -> None:
        tracemalloc.start()
        shapes = jax.eval_shape(partial(tensormoe_jax.initialize, self.config), jax.random.key(0))
        x = jax.ShapeDtypeStruct((3, HUGE), shapes["factors.input"].dtype)
        output = jax.eval_shape(partial(tensormoe_jax.apply, self.config), shapes, x)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert {name: each.shape for name, each in shapes.items()} == self.config.parameter_shapes()
        assert output.shape == (3, HUGE)
        assert peak < 10**8

    def test_nnx(self) -> None:
        layer = nnx.eval_shape(lambda: in_nnx.MuMoE(*self.sizes, rngs=nnx.Rngs(0)))
        assert layer.factors["input"].shape == (HUGE, 10**5)
        assert (layer.config, layer.num_parameters) == (self.config, self.config.num_parameters)
        x = jax.ShapeDtypeStruct((3, HUGE), layer.dtype)
        assert nnx.eval_shape(lambda layer, x: layer(x), layer, x).shape == (3, HUGE)
        assert repr(layer).startswith("MuMoE(100000000, 100000000")

    def test_equinox(self) -> None:
        layer = eqx.filter_eval_shape(in_equinox.MuMoE, *self.sizes, key=jax.random.key(0))
        x = jax.ShapeDtypeStruct((3, HUGE), layer.dtype)
        assert eqx.filter_eval_shape(layer, x).shape == (3, HUGE)
        assert repr(layer).startswith("MuMoE(100000000, 100000000")

    def test_blocks(self) -> None:
        first = LayerConfig(LayerSpec(HUGE, 2 * HUGE, 10, CP(7)), Gate())
        config = BlockConfig(
            first, LayerConfig(LayerSpec(2 * HUGE, 5, 10, CP(7)), None), "relu", 0.1
        )
        shapes = jax.eval_shape(partial(tensormoe_jax.initialize, config), jax.random.key(0))
        x, key = jax.ShapeDtypeStruct((3, HUGE), jnp.float64), jax.random.key(0)
        run = partial(tensormoe_jax.train, config, key=key)
        assert jax.eval_shape(run, shapes, x)[0].shape == (3, 5)

    def test_indexed_coefficients(self) -> None:
        config = LayerConfig(LayerSpec(*self.sizes), None)
        shapes = jax.eval_shape(partial(tensormoe_jax.initialize, config), jax.random.key(0))
        x = jax.ShapeDtypeStruct((3, HUGE), jnp.float64)
        two = TopK(
            jax.ShapeDtypeStruct((3, 2), jnp.int32), jax.ShapeDtypeStruct((3, 2), jnp.float32)
        )
        found = jax.eval_shape(partial(tensormoe_jax.apply, config), shapes, x, two)
        assert found.shape == (3, HUGE)
