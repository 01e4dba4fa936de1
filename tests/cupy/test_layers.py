"""The CuPy layers: what NumPy's layers are, on a strict stand-in or on the device that there is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tensormoe_numpy
from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Gate,
    Hadamard,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    TopK,
    Tucker,
)
from tensormoe.testing import assert_output, batch_shapes, coefficients, dtypes, gates, specs
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

tensormoe_cupy = pytest.importorskip("tensormoe_cupy")

KINDS = [
    CP(3),
    TensorRing(3),
    TensorTrain((2, 3, 4)),
    Tucker(2),
    SharedBasis((2, 3)),
    BaseDelta(2),
    SharedDelta(2),
    Hadamard(),
    Dense(),
]
TOLERANCES = {"float16": 2e-2, "float32": 1e-4, "float64": 1e-10}


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    with installed():
        yield


def drawn(data: st.DataObject, batch_norm: bool = True) -> tuple[Any, np.ndarray, str]:
    """A layer of NumPy's, an input, and the name of their dtype."""
    spec = data.draw(specs(), "spec")
    gate = data.draw(gates(spec.experts, batch_norm=batch_norm), "gate")
    dtype = data.draw(dtypes(), "dtype")
    layer = tensormoe_numpy.MuMoE(
        spec.in_features,
        spec.out_features,
        spec.experts,
        spec.factorization,
        bias=spec.bias,
        gate=gate,
        dtype=dtype,
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    lead = data.draw(batch_shapes(), "batch shape")
    x = rng.standard_normal((*lead, spec.in_features)).astype(dtype)
    return randomize(layer, data.draw(st.integers(0, 99))), x, dtype


@given(data=st.data())
def test_factorized_equals_unfactorized(data: st.DataObject) -> None:
    layer, x, _ = drawn(data)
    ours = twin(layer)
    output, found = ours(device(x)), ours.coefficients(device(x))
    assert output.shape == (*x.shape[:-1], layer.spec.out_features)
    assert_output(host(output), ours.spec.factorization, host(ours.factors), host(found), x)
    prepared = host(ours.prepare()(device(x)))
    assert_output(prepared, ours.spec.factorization, host(ours.factors), host(found), x)


@given(data=st.data())
def test_gradients_are_numpys(data: st.DataObject) -> None:
    """Those of NumPy's layers are proved against finite differences."""
    layer, x, dtype = drawn(data, batch_norm=False)
    made = None
    if data.draw(st.booleans(), "ready-made"):
        made = data.draw(coefficients(layer.spec.experts, x.shape[:-1], dtype))
    ours = twin(layer)
    want, pull = layer.vjp(x, made)
    got, our_pull = ours.vjp(device(x), None if made is None else device(made))
    cotangent = np.random.default_rng(0).standard_normal(want.shape).astype(dtype)
    theirs, found = pull(cotangent), our_pull(device(cotangent))
    # a top-k gate may choose otherwise where logits are as good as equal
    tolerance = 10 * TOLERANCES[dtype]
    assert_same(got, want, tolerance, "output")
    assert_same(found.input, theirs.input, tolerance, "input")
    assert_same(found.parameters, theirs.parameters, tolerance, "parameters")
    assert_same(found.coefficients, theirs.coefficients, tolerance, "coefficients")


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_follows_the_batches(training: bool) -> None:
    gate = Gate(normalization="batch", bias=True, momentum=0.25)
    layer = randomize(tensormoe_numpy.MuMoE(6, 5, (3, 4), CP(4), gate=gate, dtype="float64"))
    ours = twin(layer)
    x = np.random.default_rng(0).standard_normal((20, 6))
    for _ in range(2):
        want, pull = layer.vjp(x, training=training)
        got, our_pull = ours.vjp(device(x), training=training)
        assert_same(got, want)
        assert_same(our_pull(got).parameters, pull(want).parameters)
        assert_same(ours.buffers, layer.buffers)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gathered_coefficients(kind: Any) -> None:
    layer = randomize(tensormoe_numpy.MuMoE(5, 4, (4, 3), kind, gate=None, dtype="float64"))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5))
    indices = [np.array([[0, 1], [1, 2], [2, 1]]), np.array([[0, 1], [1, 0], [0, 1]])]
    made = [TopK(each, rng.standard_normal(each.shape)) for each in indices]
    there = [TopK(device(each.indices), device(each.values)) for each in made]
    want, pull = layer.vjp(x, made)
    got, our_pull = twin(layer).vjp(device(x), there)
    assert_same(got, want)
    assert_same(our_pull(got).parameters, pull(want).parameters)
    assert_same(our_pull(got).coefficients, pull(want).coefficients)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
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


@given(data=st.data())
def test_embeddings_are_numpys(data: st.DataObject) -> None:
    spec = data.draw(specs(bias=False), "spec")
    lead = data.draw(batch_shapes(), "batch shape")
    table = tensormoe_numpy.MuMoEEmbedding(
        spec.in_features, spec.out_features, spec.experts, spec.factorization, dtype="float64"
    )
    ours = twin(randomize(table))
    ids = np.random.default_rng(0).integers(spec.in_features, size=lead)
    made = data.draw(coefficients(spec.experts, lead))
    (want, pull), (got, our_pull) = table.vjp(ids, made), ours.vjp(device(ids), device(made))
    assert_same(got, want)
    assert_same(ours(device(ids), device(made)), want)
    assert our_pull(got).input is None
    assert_same(our_pull(got).parameters, pull(want).parameters)
    assert_same(our_pull(got).coefficients, pull(want).coefficients)


def test_memory_limits_cut_the_batch() -> None:
    layer = tensormoe_cupy.MuMoE(24, 16, 32, CP(12), dtype="float64", seed=0)
    x = device(np.random.default_rng(0).standard_normal((500, 24)))
    limit = layer.cost(500).peak_memory // 2
    assert_same(layer(x, memory_limit=limit), host(layer(x)))
    made = layer.coefficients(x)
    assert_same(layer(x, made, memory_limit=limit), host(layer(x)))


def layers() -> list[Any]:
    """Layers of NumPy's, of every class, every option away from its default."""
    gate = Gate("top_k", k=2, normalization="batch", bias=True, momentum=0.3)
    return [
        tensormoe_numpy.MuMoE(6, 5, 4, "cp", rank=3, seed=0),
        tensormoe_numpy.MuMoE(6, 5, (3, 4), TensorRing(3), bias=False, gate=gate, dtype="float64"),
        tensormoe_numpy.MuMoE(6, 5, (3, 2, 2), "hadamard", gate=None, dtype="float16"),
        tensormoe_numpy.MuMoEMLP(6, 8, 5, experts=(3, 2), rank=2, gate=gate, seed=0),
        tensormoe_numpy.MuMoEMLP(6, experts=3, rank=2, act_layer="silu", drop=0.5),
        tensormoe_numpy.MuMoEEmbedding(9, 5, (3, 2), "cp", rank=2, dtype="float64"),
    ]


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: type(layer).__name__)
class TestEveryLayer:
    def test_checkpoints_go_both_ways(self, layer: Any, tmp_path: Path) -> None:
        randomize(layer)
        layer.save(tmp_path / "numpy")
        ours = getattr(tensormoe_cupy, type(layer).__name__).load(tmp_path / "numpy")
        assert ours.config == layer.config
        assert_same(ours.arrays, layer.arrays, 0.0)
        ours.save(tmp_path / "cupy")
        assert (tmp_path / "cupy").read_bytes() == (tmp_path / "numpy").read_bytes()

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
