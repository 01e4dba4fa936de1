"""What the NumPy layers return, for inputs and coefficients of every kind."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe import CP, BaseDelta, Gate, LayerSpec, SharedBasis, TensorTrain, TopK
from tensormoe.errors import PlanError
from tensormoe.gates import Statistics, activate
from tensormoe.testing import assert_output, batch_shapes, coefficients, dtypes, gates, specs
from tensormoe_numpy import MuMoE
from tests._kinds import KINDS
from tests.numpy._helpers import build, draw_input


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
        if gate.sums_to_one:
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


@pytest.mark.parametrize(
    "kind", [SharedBasis((6, 24)), BaseDelta(6), TensorTrain((12, 96))], ids=str
)
def test_buffers_of_repeated_operands_are_planned(kind: Any) -> None:
    layer = build(LayerSpec(640, 768, 256, kind), Gate(), "float32")
    x = np.random.default_rng(0).standard_normal((4, 640), dtype="float32")
    layer(x)
    tracemalloc.start()
    base = tracemalloc.get_traced_memory()[0]
    kept = layer(x)
    used = tracemalloc.get_traced_memory()[1] - base
    tracemalloc.stop()
    assert kept.shape == (4, 768)
    assert abs(layer.cost(4).peak_memory - used) <= max(0.05 * used, 2**13)


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
