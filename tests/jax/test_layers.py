"""The JAX layers: outputs of every form against the oracle and NumPy's, and what they tell."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import tensormoe_jax
from tensormoe import CP, Gate, TensorRing, TopK
from tensormoe.functional import LayerConfig
from tensormoe.testing import assert_output, batch_shapes, coefficients, gates, specs
from tensormoe_jax import equinox as in_equinox
from tensormoe_jax import nnx as in_nnx
from tests._kinds import DELTAS
from tests.jax._helpers import (
    FORMS,
    assert_same,
    block_of,
    config_of,
    eqx_layer,
    eqx_run,
    functional_run,
    nnx_layer,
    normal,
    numpys,
    split,
    to_jax,
    values,
)

pytestmark = pytest.mark.usefixtures("wide")

BATCH_NORM = Gate(normalization="batch", bias=True)


def sparse(experts: tuple[int, ...], lead: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    """Coefficients that are random, sparse and different for each input."""
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((*lead, count)) * (rng.random((*lead, count)) < 0.7)
        for count in experts
    ]


@pytest.mark.parametrize("kind", [CP(3), *DELTAS], ids=str)
def test_the_oracle(kind: Any) -> None:
    """Factorized equals unfactorized, for given coefficients and for the gate's own."""
    config = config_of(kind, gate=Gate())
    arrays, x = values(config), normal(2, 3, 5)
    parameters = to_jax(arrays)
    factors = {name[8:]: array for name, array in arrays.items() if name.startswith("factors.")}
    run = jax.jit(functional_run(config, arrays))
    made = sparse((3, 2), (2, 3))
    assert_output(run(jnp.asarray(x), to_jax(made)), kind, factors, made, x)
    own, _ = tensormoe_jax.coefficients(config, parameters, jnp.asarray(x))
    assert_output(run(jnp.asarray(x)), kind, factors, own, x)


@pytest.mark.parametrize("act_layer", ["gelu", "gelu_tanh", "relu", "silu", "tanh"])
def test_numpys_block(act_layer: str) -> None:
    config = block_of(BATCH_NORM, act_layer)
    arrays, x = values(config), normal(7, 5)
    run = jax.jit(functional_run(config, arrays))
    assert_same(run(jnp.asarray(x)), numpys(config, arrays)(x))


@settings(max_examples=5)
@given(data=st.data())
def test_any_layer(data: st.DataObject) -> None:
    """Any factorization, levels, gate and leading shape, none and empty ones too."""
    with jax.enable_x64(True):
        spec = data.draw(specs(), "spec")
        gate = data.draw(gates(spec.experts, batch_norm=True), "gate")
        lead = data.draw(batch_shapes(3), "batch shape")
        made = data.draw(coefficients(spec.experts, lead))
        config = LayerConfig(spec, gate)
        arrays, x = values(config), normal(*lead, spec.in_features)
        twin = numpys(config, arrays)
        run = jax.jit(eqx_run(config, arrays))
        assert_same(run(jnp.asarray(x)), twin(x), 1e-8)
        assert_same(run(jnp.asarray(x), to_jax(made)), twin(x, made))


@pytest.mark.parametrize("form", FORMS)
def test_indexed_coefficients(form: str) -> None:
    """``TopK`` goes through jit and vmap as an argument, and means what dense ones mean."""
    config = config_of(experts=4)
    arrays, x = values(config), jnp.asarray(normal(6, 5))
    made = tensormoe_jax.coefficients(
        config_of(experts=4, gate=Gate("top_k", k=2)),
        to_jax(values(config_of(experts=4, gate=Gate("top_k", k=2)), 3)),
        x,
    )[0]
    order = jnp.argsort(-made[0], axis=-1)[:, :2]
    top = TopK(order, jnp.take_along_axis(made[0], order, axis=-1))
    run = FORMS[form](config, arrays)
    want = jax.jit(run)(x, made)
    assert_same(jax.jit(run)(x, top), want)
    assert_same(jax.jit(jax.vmap(run))(x, top), want)
    assert_same(jax.jit(lambda values: run(x, TopK(top.indices, values)))(top.values), want)
    slope = jax.jit(jax.grad(lambda each: run(x, TopK(top.indices, each)).sum()))(top.values)
    dense = jax.jit(jax.grad(lambda each: run(x, each).sum()))(made[0])
    assert_same(slope, jnp.take_along_axis(dense, order, axis=-1))


class TestWhatLayersTell:
    """Attributes, experts and text, the same in Flax and Equinox."""

    config = config_of(TensorRing(2), gate=BATCH_NORM)

    def both(self) -> list[Any]:
        arrays = values(self.config)
        return [nnx_layer(self.config, arrays), eqx_layer(self.config, arrays)[0]]

    def test_sizes_and_costs(self) -> None:
        twin = numpys(self.config, values(self.config))
        for layer in self.both():
            assert (layer.config, layer.spec) == (self.config, self.config.spec)
            assert layer.dtype == np.dtype("float64")
            assert layer.num_parameters == twin.num_parameters
            assert sum(each.size for each in layer.parameters.values()) == layer.num_parameters
            assert layer.plan(32) == twin.plan(32)
            assert layer.cost(8, training=True).flops == twin.cost(8, training=True).flops
            assert layer.cost(8).parameters == twin.num_parameters

    def test_names_are_canonical(self) -> None:
        shapes = {**self.config.parameter_shapes(), **self.config.buffer_shapes()}
        module, other = self.both()
        named = nnx.to_flat_state(nnx.state(module))
        found = {".".join(map(str, path)): each.shape for path, each in named}
        assert found == shapes
        assert {name: each.shape for name, each in module.parameters.items()} == dict(
            self.config.parameter_shapes()
        )
        assert [*other.parameters] == [*module.parameters]
        assert {*other.factors} == {*self.config.spec.shapes}
        assert [each.shape for each in other.gate.projections] == [(5, 3), (5, 2)]
        kinds = {type(module.factors["input"]), type(module.gate.projection_0)}
        assert kinds == {nnx.Param}
        assert type(module.gate.running_mean_1) is nnx.BatchStat

    def test_experts(self) -> None:
        twin = numpys(self.config, values(self.config))
        for layer in self.both():
            assert_same(layer.expert(2, 1), twin.expert(2, 1))
            assert_same(layer.materialize(), twin.materialize())

    def test_text_rebuilds_the_layer(self) -> None:
        for module, extra in ((in_nnx, "rngs=0"), (in_equinox, "key=jax.random.key(0)")):
            names = {**vars(module), "CP": CP, "TensorRing": TensorRing, "Gate": Gate, "jax": jax}
            for layer in (
                module.MuMoE.restore(self.config, to_jax(values(self.config))),
                module.MuMoEMLP.restore(
                    block_of(Gate(), "relu", 0.25), to_jax(values(block_of(Gate())))
                ),
                module.MuMoEEmbedding(9, 4, (3, 2), rank=2, **eval(f"dict({extra})", names)),
            ):
                again = eval(f"{repr(layer)[:-1]}, {extra})", names)
                assert (again.config, again.dtype) == (layer.config, layer.dtype)
                assert repr(again) == repr(layer)

    def test_copies(self) -> None:
        x = jnp.asarray(normal(7, 5))
        module, other = self.both()
        module.eval()
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), nnx.clone(module)):
            assert_same(twin(x), module(x))
            twin.factors["bias"][...] += 1.0
            assert np.abs(np.asarray(twin(x) - module(x))).max() > 0.1
        for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
            assert eqx.tree_equal(twin, other)


class TestCheckpoints:
    def test_bfloat16(self, tmp_path: Path) -> None:
        layer = in_nnx.MuMoE(5, 4, 3, rank=2, dtype="bfloat16", rngs=0)
        layer.save(tmp_path / "layer")
        again = in_equinox.MuMoE.load(tmp_path / "layer")
        assert again.dtype == jnp.bfloat16
        x = jnp.ones((2, 5), "bfloat16")
        assert again(x).dtype == jnp.bfloat16
        assert_same(again(x), layer(x), 0.0)

    def test_a_block_goes_on_dropping(self, tmp_path: Path) -> None:
        block = in_nnx.MuMoEMLP(5, experts=3, rank=2, drop=0.5, rngs=0)
        block.save(tmp_path / "block")
        again = in_nnx.MuMoEMLP.load(tmp_path / "block", rngs=nnx.Rngs(dropout=1))
        assert again.dropout.rate == 0.5
        x = jnp.ones((2, 5), "float64")
        assert not np.array_equal(again(x), again(x))

    def test_the_functional_form_of_a_module(self) -> None:
        """``config`` and ``parameters`` of either module are what the functions take."""
        config = config_of(gate=Gate())
        x = jnp.asarray(normal(7, 5))
        for layer in (nnx_layer(config, values(config)), eqx_layer(config, values(config))[0]):
            made = tensormoe_jax.apply(layer.config, layer.parameters, x)
            assert_same(made, layer(x))


def test_layers_of_both_frameworks_start_alike() -> None:
    """One key means the same initial values in all forms."""
    key = jax.random.key(3)
    layer = in_equinox.MuMoEMLP(5, 6, 4, experts=(3, 2), rank=2, key=key)
    drawn = tensormoe_jax.initialize(layer.config, key)
    assert_same(layer.parameters, drawn, 0.0)
    rngs = nnx.Rngs(params=key)
    want = tensormoe_jax.initialize(layer.config, nnx.Rngs(params=key).params())
    assert_same(in_nnx.MuMoEMLP(5, 6, 4, experts=(3, 2), rank=2, rngs=rngs).parameters, want, 0.0)
    assert split(layer.config, drawn)[1] == {}
