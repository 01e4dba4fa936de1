"""Modules of Flax and Equinox on eight devices, and their files."""

from __future__ import annotations

import copy
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as orbax
from flax import nnx as flax
from jax.sharding import NamedSharding

import tensormoe_numpy
from tensormoe import Gate
from tensormoe.errors import SpecError
from tensormoe_jax import equinox as in_equinox
from tensormoe_jax import nnx
from tests.jax._eight import P, check, exchanged, mesh_of, predicted, random, refused, same

HIDDEN = {"hidden": "model"}
X, TARGET = random((8, 12), 80), random((8, 5), 81)
SOFTMAX, NORM = Gate("softmax"), Gate("softmax", normalization="batch")


class Model(flax.Module):
    def __init__(self, rngs: flax.Rngs) -> None:
        options: Any = {"experts": 4, "rank": 12, "rngs": rngs}
        self.first = flax.Linear(12, 12, rngs=rngs)
        self.block = nnx.MuMoEMLP(12, 24, drop=0.1, gated=True, gate=NORM, **options)
        self.last = nnx.MuMoE(12, 5, gate=SOFTMAX, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.block(jnp.tanh(self.first(x))))


def ten(model: Any, x: jax.Array) -> list[jax.Array]:
    optimizer = flax.Optimizer(model, optax.adam(1e-2), wrt=flax.Param)

    @flax.jit
    def step(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            return ((model(x) - TARGET) ** 2).mean()

        value, slope = flax.value_and_grad(loss)(model)
        optimizer.update(model, slope)
        return value

    return [step(model, optimizer, x) for _ in range(10)]


@flax.jit
def run(model: Any, x: jax.Array) -> jax.Array:
    return model(x)


def quiet(model: Any) -> jax.Array:
    model.eval()
    return run(model, X)


def leaves(model: Any) -> dict[str, jax.Array]:
    states = flax.state(model, flax.Param, flax.BatchStat)
    return {
        ".".join(map(str, path)): each.get_value()
        for state in states
        for path, each in flax.to_flat_state(state)
    }


@check("a model of Flax")
def _() -> None:
    whole, mesh = Model(flax.Rngs(0)), mesh_of(data=2, model=4)
    want, text = ten(whole, X), repr(whole.last)
    with jax.set_mesh(mesh):
        model = nnx.parallelize(Model(flax.Rngs(0)), HIDDEN)
        assert nnx.parallelize(model, {"r": "model"}) is model
        assert (model.block.legs, model.last.legs) == (HIDDEN, {"r": "model"})
        found = ten(model, jax.device_put(X, NamedSharding(mesh, P("data"))))
        same(found, want, 1e-5)
        same(leaves(model), leaves(whole), 1e-5)
        specs = flax.get_partition_spec(flax.state(model))
        assert specs["block"]["second"]["factors"]["input"].get_value() == P("model")
        assert specs["last"]["factors"]["input"].get_value() == P(None, "model")
        factor = model.block.first.factors["output"].get_value()
        assert {each.data.shape for each in factor.addressable_shards} == {(12, 12)}
        again = copy.deepcopy(model)
        same(quiet(again), quiet(model))
    assert repr(model.last) == text
    # the layers are those of one device
    # a layer is what it was, on one device too
    arrays = jax.tree.map(jnp.asarray, jax.device_get(model.last.parameters))
    last = nnx.MuMoE.restore(model.last.config, arrays)
    assert last.legs is None
    same(last(X), whole.last(X), 1e-4)


@check("a model of Flax, made under jit, on explicit axes")
def _() -> None:
    for explicit in (False, True):
        mesh = mesh_of(explicit, data=2, model=4)

        @flax.jit
        def make() -> Any:
            return nnx.parallelize(
                nnx.MuMoEMLP(12, 24, 5, experts=4, rank=4, gate=SOFTMAX, rngs=flax.Rngs(0)), HIDDEN
            )

        with jax.set_mesh(mesh):
            block = make()
            factor = block.second.factors["input"].get_value()
            assert {each.data.shape for each in factor.addressable_shards} == {(6, 4)}
            x = jax.device_put(X, NamedSharding(mesh, P("data")))
            found = flax.jit(lambda block, x: block(x))(block, x)
        same(
            found,
            nnx.MuMoEMLP(12, 24, 5, experts=4, rank=4, gate=SOFTMAX, rngs=flax.Rngs(0))(X),
            1e-5,
        )


def small(key: Any) -> Any:
    one, two = jax.random.split(key)
    return eqx.nn.Sequential(
        [
            eqx.nn.Lambda(lambda x: 2 * x),
            in_equinox.MuMoEMLP(12, 24, experts=4, rank=4, gate=SOFTMAX, key=one),
            in_equinox.MuMoE(12, 5, experts=4, rank=4, gate=SOFTMAX, key=two),
        ]
    )


@check("a model of Equinox")
def _() -> None:
    whole, mesh = small(jax.random.key(0)), mesh_of(data=2, model=4)

    @eqx.filter_jit
    def step(model: Any, x: jax.Array) -> Any:
        def loss(model: Any) -> Any:
            return ((model(x) - TARGET) ** 2).mean()

        value, slope = eqx.filter_value_and_grad(loss)(model)
        return eqx.apply_updates(model, jax.tree.map(lambda each: -0.1 * each, slope)), value

    def run(model: Any, x: jax.Array) -> Any:
        values = []
        for _ in range(10):
            model, value = step(model, x)
            values.append(value)
        return model, values

    want, values = run(whole, X)
    with jax.set_mesh(mesh):
        cut = in_equinox.parallelize(whole, HIDDEN)
        assert whole[1].legs is None
        assert cut[1].legs == HIDDEN
        found, losses = run(cut, jax.device_put(X, NamedSharding(mesh, P("data"))))
        same(losses, values, 1e-5)
        specs = in_equinox.partition_specs(whole, HIDDEN)
        assert specs[1].second.factors["input"] == P("model")
        assert specs[2].factors["input"] == P()
        assert specs[0].fn is None
        placements = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        placed = eqx.filter_shard(whole, placements)
        assert placed[1].second.factors["input"].sharding.spec == P("model")

        @eqx.filter_jit
        def make(key: Any) -> Any:
            return in_equinox.parallelize(small(key), HIDDEN)

        made = make(jax.random.key(0))
        factor = made[1].second.factors["input"]
        assert {each.data.shape for each in factor.addressable_shards} == {(6, 4)}
    arrays = eqx.filter(found, eqx.is_array)
    same(jax.tree.leaves(arrays), jax.tree.leaves(eqx.filter(want, eqx.is_array)), 1e-5)


@check("one sum in a block of each framework")
def _() -> None:
    options: Any = {"experts": 4, "rank": 4, "gate": SOFTMAX}
    with jax.set_mesh(mesh_of(model=4)):
        block = nnx.parallelize(nnx.MuMoEMLP(12, 24, 5, rngs=0, **options), HIDDEN)
        graph, state = flax.split(block)
        first = jax.jit(lambda state, x: flax.merge(graph, state)(x)).lower(state, X)
        made = in_equinox.MuMoEMLP(12, 24, 5, key=jax.random.key(0), **options)
        arrays, rest = eqx.partition(in_equinox.parallelize(made, HIDDEN), eqx.is_array)
        second = jax.jit(lambda arrays, x: eqx.combine(arrays, rest)(x)).lower(arrays, X)
        wanted = predicted(block.config.shard(4).cost(8))
        for lowered in (first, second):
            text = lowered.compile().as_text()
            assert exchanged(text) == wanted == [("all-reduce", 4 * 8 * 5)], exchanged(text)


@check("embeddings of each framework")
def _() -> None:
    ids, given = jnp.array([0, 11, 4, 7]), jnp.eye(4)
    tables = (
        (nnx.MuMoEEmbedding(12, 5, experts=4, rank=4, rngs=0), nnx.parallelize),
        (
            in_equinox.MuMoEEmbedding(12, 5, experts=4, rank=4, key=jax.random.key(0)),
            in_equinox.parallelize,
        ),
    )
    for table, cut in tables:
        want = table(ids, given)
        with jax.set_mesh(mesh_of(model=4)):
            same(cut(table, {"i": "model"})(ids, given), want)


@check("orbax")
def _() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        with jax.set_mesh(mesh_of(model=4)):
            model = nnx.parallelize(Model(flax.Rngs(0)), HIDDEN)
            nnx.parallelize(model, {"r": "model"})
            want = quiet(model)
            checkpointer = orbax.StandardCheckpointer()
            checkpointer.save(path, flax.state(model))
            checkpointer.wait_until_finished()
        for devices in (2, 3):
            with jax.set_mesh(mesh_of(model=devices)):
                # other values, which are replaced
                other = nnx.parallelize(Model(flax.Rngs(1)), HIDDEN)
                nnx.parallelize(other, {"r": "model"})
                state = flax.state(other)
                shapes = jax.tree.map(orbax.utils.to_shape_dtype_struct, state)
                flax.update(other, checkpointer.restore(path, shapes))
                factor = other.last.factors["input"].get_value()
                assert {each.data.shape for each in factor.addressable_shards} == {
                    (12, 12 // devices)
                }
                same(quiet(other), want, 1e-5)
        # without any mesh
        plain = Model(flax.Rngs(1))
        shapes = jax.tree.map(orbax.utils.to_shape_dtype_struct, flax.state(plain))
        flax.update(plain, checkpointer.restore(path, shapes))
        same(quiet(plain), want, 1e-5)


@check("files")
def _() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        with jax.set_mesh(mesh_of(model=4)):
            block = nnx.MuMoEMLP(12, 24, 5, gated=True, experts=4, rank=4, rngs=0)
            block.save(path)
            plain = path.read_bytes()
            nnx.parallelize(block, HIDDEN).save(path)
            # the whole layer, byte by byte
            assert path.read_bytes() == plain
            want = quiet(block)
            again = nnx.parallelize(nnx.MuMoEMLP.load(path), HIDDEN)
            same(quiet(again), want)
            other = in_equinox.parallelize(in_equinox.MuMoEMLP.load(path), HIDDEN)
            same(eqx.filter_jit(other)(X), want, 1e-5)
            other.save(path)
            assert path.read_bytes() == plain
        same(tensormoe_numpy.MuMoEMLP.load(path)(jax.device_get(X)), want, 1e-5)


@check("models that are refused")
def _() -> None:
    model = Model(flax.Rngs(0))
    pair = small(jax.random.key(0))
    for cut, given in ((nnx.parallelize, model), (in_equinox.parallelize, pair)):
        for devices, legs, message in (
            (0, HIDDEN, "a mesh must be set for legs"),
            (4, {"hidden": "rows"}, "must have the axis that leg 'hidden' is cut over"),
            (4, {"r9": "model"}, "legs must name a leg of a layer in the model; got 'r9'"),
            (5, HIDDEN, "hidden_features must be a multiple of the 5 devices; got 24"),
            (8, {"r": "model"}, "multiple of the 8 devices"),
            (4, {"r": "model", "hidden": "model"}, "legs must be one"),
        ):

            def run(cut: Any = cut, given: Any = given, legs: Any = legs, n: int = devices) -> None:
                with jax.set_mesh(mesh_of(model=n)) if n else nullcontext():
                    cut(given, legs)

            refused(SpecError, message, run)
    # nothing was changed
    assert model.block.legs is None
    assert model.last.legs is None
    with jax.set_mesh(mesh_of(model=2)):
        plain = flax.Linear(2, 3, rngs=flax.Rngs(0))
        for cut in (nnx.parallelize, in_equinox.parallelize):
            refused(SpecError, "no layer of tensormoe", partial(cut, plain, HIDDEN))
