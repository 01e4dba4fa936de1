"""The NumPy layers: what they return, keep, print and save."""

from __future__ import annotations

import copy
import math
import pickle
import tracemalloc
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Gate,
    Hadamard,
    LayerSpec,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    TopK,
    Tucker,
)
from tensormoe.errors import PlanError
from tensormoe.gates import Statistics, activate
from tensormoe.testing import (
    assert_output,
    batch_shapes,
    coefficients,
    dtypes,
    gates,
    reference_output,
    specs,
)
from tensormoe_numpy import MuMoE, MuMoEEmbedding, MuMoEMLP

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


def randomize(layer: Any, seed: int = 0) -> Any:
    """Random parameters, those of the gate included, which start at zero."""
    rng = np.random.default_rng(seed)
    for array in layer.parameters.values():
        array[...] = rng.standard_normal(array.shape)
    for name, array in layer.buffers.items():
        array[...] = rng.uniform(0.5, 2, array.shape) * (1 if "variance" in name else 0.1)
    return layer


def build(spec: LayerSpec, gate: Gate | None = None, dtype: str = "float64") -> MuMoE:
    return randomize(
        MuMoE(
            spec.in_features,
            spec.out_features,
            spec.experts,
            spec.factorization,
            bias=spec.bias,
            gate=gate,
            dtype=dtype,
            seed=0,
        )
    )


def draw_input(data: st.DataObject, features: int, lead: tuple[int, ...], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "input seed"))
    return rng.standard_normal((*lead, features)).astype(dtype)


@given(data=st.data())
def test_factorized_equals_unfactorized(data: st.DataObject) -> None:
    """Every factorization × level × bias × gate × batch shape, to 1e-10 in float64."""
    spec = data.draw(specs(), "spec")
    gate = data.draw(gates(spec.experts, batch_norm=True), "gate")
    dtype = data.draw(dtypes(), "dtype")
    layer = build(spec, gate, dtype)
    lead = data.draw(batch_shapes(), "batch shape")
    x = draw_input(data, spec.in_features, lead, dtype)
    output, found = layer(x), layer.coefficients(x)
    assert output.shape == (*lead, spec.out_features)
    assert output.dtype == x.dtype
    assert [each.shape for each in found] == [(*lead, count) for count in spec.experts]
    assert_output(output, spec.factorization, layer.factors, found, x)


@given(data=st.data())
def test_coefficients_are_the_gates(data: st.DataObject) -> None:
    spec = data.draw(specs(), "spec")
    gate = data.draw(gates(spec.experts, batch_norm=True), "gate")
    layer = build(spec, gate)
    x = draw_input(data, spec.in_features, data.draw(batch_shapes()), "float64")
    for level, got in enumerate(layer.coefficients(x)):
        logits = x @ layer.parameters[f"gate.projection_{level}"]
        if gate.bias:
            logits = logits + layer.parameters[f"gate.bias_{level}"]
        kept = None
        if gate.normalization == "batch":
            kept = Statistics(
                layer.buffers[f"gate.running_mean_{level}"],
                layer.buffers[f"gate.running_variance_{level}"],
            )
        want = activate(gate, logits, statistics=kept).coefficients
        # a product of one row rounds otherwise than one of many
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)
        np.testing.assert_allclose(got.sum(-1), 1.0, atol=1e-9)
        assert np.all(got >= 0)


@given(data=st.data())
def test_ready_made_coefficients(data: st.DataObject) -> None:
    spec = data.draw(specs(), "spec")
    layer = build(spec)
    lead = data.draw(batch_shapes(), "batch shape")
    x = draw_input(data, spec.in_features, lead, "float64")
    given_ones = data.draw(coefficients(spec.experts, lead))
    output = layer(x, given_ones)
    assert_output(output, spec.factorization, layer.factors, given_ones, x)
    if spec.levels == 1:
        np.testing.assert_array_equal(layer(x, given_ones[0]), output)
    np.testing.assert_array_equal(layer(x, coefficients=tuple(given_ones)), output)


@given(data=st.data())
def test_top_k_coefficients_are_gathered(data: st.DataObject) -> None:
    spec = data.draw(specs(), "spec")
    layer = build(spec)
    lead = data.draw(batch_shapes(), "batch shape")
    k = data.draw(st.integers(1, min(spec.experts)), "k")
    x = draw_input(data, spec.in_features, lead, "float64")
    chosen, dense = [], []
    rng = np.random.default_rng(0)
    for count in spec.experts:
        order = np.argsort(rng.random((*lead, count)), axis=-1)[..., :k]
        values = rng.standard_normal((*lead, k))
        full = np.zeros((*lead, count))
        np.put_along_axis(full, order, values, axis=-1)
        chosen.append(TopK(order, values))
        dense.append(full)
    assert_output(layer(x, chosen), spec.factorization, layer.factors, dense, x)


@given(data=st.data())
def test_nothing_is_written_to(data: st.DataObject) -> None:
    """Inputs, coefficients, cotangents and parameters may be read-only, and stay as they are."""
    spec = data.draw(specs(), "spec")
    gate = data.draw(gates(spec.experts), "gate")
    layer = build(spec, gate)
    x = draw_input(data, spec.in_features, (3, 2), "float64")
    made = list(layer.coefficients(x))
    arrays = [x, *made, *layer.parameters.values()]
    for array in arrays:
        array.flags.writeable = False
    before = [array.copy() for array in arrays]
    for given_ones in (None, made):
        output, pull = layer.vjp(x, given_ones)
        output.flags.writeable = False
        np.testing.assert_array_equal(layer(x, given_ones), output)
        first, second = pull(output), pull(output)
        # and a pullback may be called twice
        for name, array in first.parameters.items():
            np.testing.assert_array_equal(array, second.parameters[name])
        np.testing.assert_array_equal(first.input, second.input)
    layer.prepare()(x)
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_inputs_of_any_layout() -> None:
    layer = build(LayerSpec(6, 5, (3, 2), CP(4)), Gate())
    x = np.random.default_rng(0).standard_normal((4, 3, 6))
    want = layer(x)
    for view in (
        np.asfortranarray(x),
        np.repeat(x, 2, axis=-1)[..., ::2],
        np.flip(np.flip(x, 0).copy(), 0),
        np.broadcast_to(x, x.shape),
    ):
        np.testing.assert_allclose(layer(view), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dtypes_are_kept(kind: Any, dtype: str) -> None:
    layer = MuMoE(12, 9, (4, 3), kind, dtype=dtype, seed=0)
    x = np.random.default_rng(0).standard_normal((5, 12)).astype(dtype)
    output, pull = layer.vjp(x)
    gradients = pull(output)
    arrays = [output, gradients.input, layer(x), *gradients.parameters.values()]
    arrays += [*layer.parameters.values(), layer.prepare()(x), *layer.expert(1, 2)]
    arrays += layer.materialize()
    assert {array.dtype.name for array in arrays} == {dtype}
    # coefficients are float32 at least, whatever the layer is
    wide = dtype if dtype == "float64" else "float32"
    assert {array.dtype.name for array in layer.coefficients(x)} == {wide}
    assert_output(output, kind, layer.factors, layer.coefficients(x), x)


def test_memory_limits_cut_the_batch() -> None:
    layer = build(LayerSpec(96, 64, 128, CP(48)), Gate(), "float64")
    x = np.random.default_rng(0).standard_normal((2000, 96))
    whole, free = layer(x), layer.cost(2000).peak_memory
    with pytest.raises(PlanError, match=r"at least \d+ bytes for 2000 inputs"):
        layer(x, memory_limit=10_000)
    for limit in (free // 2 + 400_000, free - 1, free):
        tracemalloc.start()
        base = tracemalloc.get_traced_memory()[0]
        parts = layer(x, memory_limit=limit)
        used = tracemalloc.get_traced_memory()[1] - base
        tracemalloc.stop()
        assert used <= 1.05 * limit
        np.testing.assert_allclose(parts, whole, rtol=1e-10, atol=1e-10)
    made = layer.coefficients(x)
    np.testing.assert_allclose(
        layer(x, made, memory_limit=free // 2 + 400_000), whole, rtol=1e-10, atol=1e-10
    )
    chosen = TopK(np.zeros((2000, 1), int), np.ones((2000, 1)))
    np.testing.assert_allclose(
        layer(x, chosen, memory_limit=free // 2 + 400_000), layer(x, chosen), rtol=1e-10, atol=1e-10
    )
    assert layer(x[:0], memory_limit=free).shape == (0, 64)


@given(data=st.data())
def test_prepared_layers_give_the_same(data: st.DataObject) -> None:
    spec = data.draw(specs(), "spec")
    layer = build(spec, data.draw(gates(spec.experts, batch_norm=True), "gate"))
    prepared = layer.prepare()
    x = draw_input(data, spec.in_features, data.draw(batch_shapes()), "float64")
    found = layer.coefficients(x)
    assert_output(prepared(x), spec.factorization, layer.factors, found, x)
    assert_output(prepared(x, found), spec.factorization, layer.factors, found, x)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_prepared_layers_keep_their_values(kind: Any) -> None:
    layer = build(LayerSpec(6, 5, (3, 2), kind), Gate(normalization="batch"))
    prepared = layer.prepare()
    x = np.random.default_rng(0).standard_normal((4, 6))
    before = prepared(x)
    layer.vjp(x)  # moves the running statistics
    randomize(layer, 1)
    np.testing.assert_array_equal(prepared(x), before)
    assert not np.allclose(layer(x), before)


def same(left: Any, right: Any) -> bool:
    """The same arrays under the same names."""
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in ((left.parameters, right.parameters), (left.buffers, right.buffers))
    )


def layers() -> list[Any]:
    """Layers of every class, every option away from its default."""
    gate = Gate("top_k", k=2, normalization="batch", bias=True, momentum=0.3)
    return [
        MuMoE(6, 5, 4, "cp", rank=3, seed=0),
        MuMoE(6, 5, (3, 4), TensorRing((2, 3, 4, 5)), bias=False, gate=gate, dtype="float64"),
        MuMoE(6, 5, (3, 2, 2), "hadamard", gate=None, dtype="float16"),
        MuMoEMLP(6, 8, 5, experts=(3, 2), factorization="tucker", rank=2, gate=gate, seed=0),
        MuMoEMLP(6, experts=3, factorization=(CP(2), Dense()), act_layer="silu", drop=0.5),
        MuMoEEmbedding(9, 5, (3, 2), "tensor_train", rank=(2, 3, 4), dtype="float64"),
    ]


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: type(layer).__name__)
class TestEveryLayer:
    def run(self, layer: Any, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        spec = layer.config.spec if not isinstance(layer, MuMoEMLP) else layer.config.first.spec
        made = [rng.random((4, count)).astype(layer.dtype) for count in spec.experts]
        if isinstance(layer, MuMoEEmbedding):
            return layer(rng.integers(spec.in_features, size=4), made)
        x = rng.standard_normal((4, spec.in_features)).astype(layer.dtype)
        gateless = isinstance(layer, MuMoE) and layer.gate is None
        return layer(x, made if gateless else None)

    def test_repr_rebuilds_it(self, layer: Any) -> None:
        names = (MuMoE, MuMoEMLP, MuMoEEmbedding, CP, TensorRing, TensorTrain, Tucker)
        known = {each.__name__: each for each in (*names, Hadamard, Dense, Gate)}
        again = eval(repr(layer), known)
        assert type(again) is type(layer)
        assert again.config == layer.config
        assert again.dtype == layer.dtype
        assert repr(again) == repr(layer)

    def test_copies_are_its_own(self, layer: Any) -> None:
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert same(again, layer)
            assert again.config == layer.config
            np.testing.assert_array_equal(self.run(again), self.run(layer))
            for name, array in again.parameters.items():
                assert not np.shares_memory(array, layer.parameters[name])
                array += 1
            assert not same(again, layer)

    def test_saved_and_loaded_it_is_the_same(self, layer: Any, tmp_path: Path) -> None:
        randomize(layer)
        layer.save(tmp_path / "layer.safetensors")
        again = type(layer).load(tmp_path / "layer.safetensors")
        assert same(again, layer)
        assert again.config == layer.config
        assert again.dtype == layer.dtype
        np.testing.assert_array_equal(self.run(again), self.run(layer))

    def test_parameters_are_counted(self, layer: Any) -> None:
        assert layer.num_parameters == sum(array.size for array in layer.parameters.values())

    def test_costs_are_known(self, layer: Any) -> None:
        cost, training = layer.cost(64), layer.cost(64, training=True)
        assert 0 < cost.matmul_flops < training.matmul_flops
        assert 0 < cost.peak_memory < training.peak_memory
        assert cost.parameters == layer.num_parameters


def test_seeds_mean_one_thing() -> None:
    first, second, other = (
        MuMoE(6, 5, (3, 2), TensorRing(3), seed=seed, dtype=dtype)
        for seed, dtype in ((7, "float32"), (7, "float64"), (8, "float32"))
    )
    for name, array in first.parameters.items():
        np.testing.assert_allclose(array, second.parameters[name], rtol=1e-6)
    assert not same(first, other)
    assert same(first, MuMoE(6, 5, (3, 2), TensorRing(3), seed=np.random.default_rng(7)))


def test_experts_start_with_equal_shares() -> None:
    layer = MuMoE(6, 5, (3, 2), CP(3), seed=0)
    x = np.random.default_rng(0).standard_normal((4, 6)).astype("float32")
    for level, found in enumerate(layer.coefficients(x)):
        np.testing.assert_allclose(found, 1 / layer.spec.experts[level], rtol=1e-6)


@pytest.mark.parametrize("name", ["cp", "tensor_ring", "tensor_train", "tucker"])
def test_a_layer_is_as_large_as_the_linear_layer_by_default(name: str) -> None:
    """The budget is never exceeded, and not left unused."""
    layer = MuMoE(128, 96, 64, name)
    linear = 128 * 96 + 96
    assert 0.9 * linear <= layer.spec.num_parameters <= linear
    assert MuMoE(128, 96, 64, name, budget=5000).spec.num_parameters <= 5000


class TestBatchNorm:
    def layer(self) -> MuMoE:
        return build(LayerSpec(6, 5, (3, 4), CP(4)), Gate(normalization="batch", momentum=0.25))

    def test_statistics_follow_the_batches(self) -> None:
        layer = self.layer()
        x = np.random.default_rng(0).standard_normal((50, 6)) + 1
        old = copy.deepcopy(layer.buffers)
        layer.vjp(x)
        for level in range(2):
            logits = x @ layer.parameters[f"gate.projection_{level}"]
            for name, new in (("mean", logits.mean(0)), ("variance", logits.var(0, ddof=1))):
                key = f"gate.running_{name}_{level}"
                np.testing.assert_allclose(layer.buffers[key], 0.75 * old[key] + 0.25 * new)

    def test_inference_leaves_them_and_sees_one_input_at_a_time(self) -> None:
        layer = self.layer()
        x = np.random.default_rng(0).standard_normal((5, 6))
        old = copy.deepcopy(layer.buffers)
        whole = layer(x)
        layer.vjp(x, training=False)
        layer.coefficients(x)
        assert all(np.array_equal(old[name], layer.buffers[name]) for name in old)
        for row, output in zip(x, whole, strict=True):
            np.testing.assert_allclose(layer(row), output, atol=1e-12)

    def test_training_sees_the_batch(self) -> None:
        x = np.random.default_rng(0).standard_normal((5, 6))
        first, _ = self.layer().vjp(x)
        second, _ = self.layer().vjp(np.concatenate([x, 3 * x]))
        assert not np.allclose(first, second[:5])


@given(data=st.data())
def test_a_token_alone_decides_on_its_output(data: st.DataObject) -> None:
    """With layer norm or none, nothing leaks from one input of a batch to another."""
    spec = data.draw(specs(), "spec")
    layer = build(spec, data.draw(gates(spec.experts), "gate"))
    x = draw_input(data, spec.in_features, (6,), "float64")
    whole = layer(x)
    changed = x.copy()
    changed[3:] = 7.0
    np.testing.assert_allclose(layer(changed)[:3], whole[:3], rtol=1e-7, atol=1e-9)


class TestMLP:
    ACTIVATIONS: ClassVar = {
        "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda x: (
            0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        ),
        "relu": lambda x: max(x, 0.0),
        "silu": lambda x: x / (1 + math.exp(-x)),
        "tanh": math.tanh,
    }

    @pytest.mark.parametrize("name", ACTIVATIONS)
    @pytest.mark.parametrize("lead", [(), (0,), (4,), (2, 3)])
    def test_it_is_two_mixtures_with_one_gate(self, name: str, lead: tuple[int, ...]) -> None:
        block = randomize(
            MuMoEMLP(
                6,
                7,
                5,
                act_layer=name,
                experts=(3, 2),
                factorization=(TensorRing(2), CP(3)),
                dtype="float64",
            )
        )
        x = np.random.default_rng(1).standard_normal((*lead, 6))
        made = block.coefficients(x)
        first, second = (
            np.concatenate([w, b[..., None, :]], axis=-2)
            for w, b in (block.first.materialize(), block.second.materialize())
        )
        middle = reference_output(first, made, x)
        middle = np.vectorize(self.ACTIVATIONS[name], otypes=[float])(middle)
        want = reference_output(second, made, middle)
        got = block(x)
        assert got.shape == (*lead, 5)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(block(x, made), want, rtol=1e-9, atol=1e-9)

    def test_sizes_default_to_the_inputs(self) -> None:
        block = MuMoEMLP(6, experts=3, factorization="cp", rank=2)
        assert (block.first.spec.out_features, block.second.spec.out_features) == (6, 6)
        assert block.second.gate is None

    def test_dropout(self) -> None:
        """Half of the entries are dropped in training, the others doubled; none in inference."""
        block = randomize(MuMoEMLP(6, 50, 40, experts=3, rank=8, drop=0.5, seed=0, dtype="float64"))
        plain = copy.deepcopy(block)
        plain.config = type(block.config)(block.first.config, block.second.config, "gelu", 0.0)
        x = np.random.default_rng(0).standard_normal((200, 6))
        np.testing.assert_array_equal(block(x), plain(x))
        np.testing.assert_array_equal(block.vjp(x, training=False)[0], plain(x))
        output, _ = block.vjp(x)
        assert 0.45 < np.mean(output == 0) < 0.55
        assert not np.array_equal(block.vjp(x)[0], output)


@given(data=st.data())
def test_embeddings_are_mixtures_of_rows(data: st.DataObject) -> None:
    spec = data.draw(specs(bias=False), "spec")
    lead = data.draw(batch_shapes(), "batch shape")
    table = randomize(
        MuMoEEmbedding(
            spec.in_features, spec.out_features, spec.experts, spec.factorization, dtype="float64"
        )
    )
    ids = np.random.default_rng(0).integers(spec.in_features, size=lead)
    made = data.draw(coefficients(spec.experts, lead))
    output = table(ids, made)
    one_hot = np.eye(spec.in_features)[ids]
    assert output.shape == (*lead, spec.out_features)
    assert_output(output, spec.factorization, table.factors, made, one_hot)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_embeddings_start_with_variance_one(kind: Any) -> None:
    """As rows of ``torch.nn.Embedding``: each is used alone."""
    samples = []
    for seed in range(300):
        table = MuMoEEmbedding(20, 8, (4, 2), kind, seed=seed, dtype="float64")
        weights, bias = table.materialize()
        assert bias is None
        samples.append(np.mean(weights**2))
    error = np.std(samples) / np.sqrt(len(samples))
    assert error < 0.2
    assert abs(np.mean(samples) - 1) < 5 * error
