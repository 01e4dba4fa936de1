"""The CuPy layers: what NumPy's layers are, on a strict stand-in or on the device that there is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tensormoe_numpy
from tensormoe import CP, Gate, TensorRing
from tensormoe.testing import assert_output, batch_shapes, dtypes, gates, specs
from tests._cupy_standin import (
    ADAPTER,
    ON_DEVICE,
    assert_same,
    device,
    host,
    installed,
    randomize,
    twin,
    waits,
)
from tests._kinds import UNEVEN
from tests.numpy._helpers import build, draw_input, layers

tensormoe_cupy = pytest.importorskip("tensormoe_cupy")

TOLERANCES = {"float16": 2e-2, "float32": 1e-4, "float64": 1e-10}


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    with installed():
        yield


@given(data=st.data())
def test_prepared_layers_are_numpys(data: st.DataObject) -> None:
    spec, dtype = data.draw(specs(), "spec"), data.draw(dtypes(), "dtype")
    layer = build(spec, data.draw(gates(spec.experts, batch_norm=True), "gate"), dtype)
    x = draw_input(data, spec.in_features, data.draw(batch_shapes(), "batch shape"), dtype)
    assert_same(twin(layer).prepare()(device(x)), layer.prepare()(x), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", UNEVEN, ids=str)
def test_dtypes_are_kept(kind: Any, dtype: str) -> None:
    layer = tensormoe_cupy.MuMoE(12, 9, (4, 3), kind, dtype=dtype, seed=0)
    x = device(np.random.default_rng(0).standard_normal((5, 12)).astype(dtype))
    output, pull = layer.vjp(x)
    gradients = pull(output)
    arrays = [output, gradients.input, layer(x), *gradients.parameters.values()]
    arrays += [*layer.parameters.values(), layer.prepare()(x), *layer.expert(1, 2)]
    arrays += layer.materialize()
    assert {array.dtype.name for array in arrays} == {dtype}
    assert all(ADAPTER.owns(array) for array in arrays)
    wide = dtype if dtype == "float64" else "float32"
    assert {array.dtype.name for array in layer.coefficients(x)} == {wide}
    found = host(layer.coefficients(x))
    assert_output(host(output), kind, host(layer.factors), found, host(x))


@pytest.mark.parametrize("act_layer", ["gelu", "gelu_tanh", "relu", "silu", "tanh"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_blocks_are_numpys(act_layer: str, dtype: str) -> None:
    block = tensormoe_numpy.MuMoEMLP(
        6, 7, 5, act_layer, experts=(3, 2), factorization=(TensorRing(2), CP(3)), dtype=dtype
    )
    if dtype != "float16":
        randomize(block)
    ours = twin(block)
    x = np.random.default_rng(1).standard_normal((2, 3, 6)).astype(dtype)
    made = block.coefficients(x)
    assert_same(ours.coefficients(device(x)), made, TOLERANCES[dtype])
    assert_same(ours(device(x)), block(x), TOLERANCES[dtype])
    assert_same(ours(device(x), device(made)), block(x, made), TOLERANCES[dtype])
    (want, pull), (got, our_pull) = block.vjp(x), ours.vjp(device(x))
    theirs, found = pull(want), our_pull(device(want))
    assert_same(got, want, TOLERANCES[dtype])
    assert_same(found.input, theirs.input, 10 * TOLERANCES[dtype])
    assert_same(found.parameters, theirs.parameters, 10 * TOLERANCES[dtype])


def test_memory_limits_cut_the_batch() -> None:
    layer = tensormoe_cupy.MuMoE(24, 16, 32, CP(12), dtype="float64", seed=0)
    x = device(np.random.default_rng(0).standard_normal((500, 24)))
    limit = layer.cost(500).peak_memory // 2
    assert_same(layer(x, memory_limit=limit), host(layer(x)))
    made = layer.coefficients(x)
    assert_same(layer(x, made, memory_limit=limit), host(layer(x)))


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: type(layer).__name__)
class TestEveryLayer:
    def test_copies_are_its_own(self, layer: Any) -> None:
        ours = twin(layer)
        for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert again.config == layer.config
            assert_same(again.arrays, layer.arrays, 0.0)
            for array in again.parameters.values():
                array += 1
            assert_same(ours.arrays, layer.arrays, 0.0)

    def test_it_prints_as_numpys(self, layer: Any) -> None:
        assert repr(twin(layer)) == repr(layer)
        assert twin(layer).num_parameters == layer.num_parameters


@pytest.mark.parametrize("init", ["variance", "paper"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_seeds_mean_one_thing(init: str, dtype: str) -> None:
    options: dict[str, Any] = {"rank": 3, "init": init, "dtype": dtype}
    for theirs, ours in (
        (tensormoe_numpy.MuMoE, tensormoe_cupy.MuMoE),
        (tensormoe_numpy.MuMoEEmbedding, tensormoe_cupy.MuMoEEmbedding),
    ):
        layer = theirs(6, 5, (3, 2), "tensor_ring", seed=7, **options)
        assert_same(ours(6, 5, (3, 2), "tensor_ring", seed=7, **options).arrays, layer.arrays, 0.0)
    block = tensormoe_numpy.MuMoEMLP(6, experts=3, seed=7, **options)
    assert_same(tensormoe_cupy.MuMoEMLP(6, experts=3, seed=7, **options).arrays, block.arrays, 0.0)


GATES = [
    Gate(),
    Gate(alpha=1.25, bias=True),
    Gate(alpha=3.0),
    Gate("sparsemax", normalization=None),
    Gate("softmax"),
    Gate("top_k", k=2),
    Gate("top_k", k=20),
    Gate("relu_top_k", k=2),
    Gate(normalization="batch"),
]


@pytest.mark.skipif(ON_DEVICE, reason="the stand-in counts what waits")
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("kind", [CP(3), TensorRing(3)], ids=str)
def test_nothing_waits_for_the_device(kind: Any, gate: Gate) -> None:
    layer = twin(randomize(tensormoe_numpy.MuMoE(6, 5, (24, 21), kind, gate=gate)))
    x = device(np.random.default_rng(0).standard_normal((7, 6)).astype("float32"))
    made = layer.coefficients(x)
    prepared = layer.prepare()
    block = tensormoe_cupy.MuMoEMLP(6, experts=24, factorization=kind, gate=gate, seed=0)
    table = tensormoe_cupy.MuMoEEmbedding(9, 5, (24, 21), kind, seed=0)
    ids = device(np.arange(7))
    adam = tensormoe_cupy.Adam(block.parameters)
    with waits() as found:
        layer(x)
        layer(x, made)
        prepared(x)
        output, pull = layer.vjp(x)
        pull(output)
        output, pull = block.vjp(x)
        adam.step(pull(output).parameters)
        output, pull = table.vjp(ids, made)
        pull(output)
    assert found == []
