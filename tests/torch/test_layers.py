"""What the PyTorch layers return, whichever way a call runs: eager, differentiated, traced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tensormoe import CP, Gate, LayerSpec, TensorRing, TopK
from tensormoe.gates import Statistics, activate
from tensormoe.testing import (
    assert_output,
    batch_shapes,
    coefficients,
    gates,
    specs,
)
from tensormoe_torch import MuMoE
from tests._torch_helpers import (
    GATES,
    KINDS,
    WAYS,
    assert_mixture,
    build,
    factors_of,
    normal,
    numpy_of,
    randomize,
)

DTYPES = st.sampled_from([torch.float32, torch.float64])
AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-9}


def draw_normal(data: st.DataObject, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(*shape, seed=data.draw(st.integers(0, 2**32 - 1), "input seed"), dtype=dtype)


@given(data=st.data())
def test_factorized_equals_unfactorized(data: st.DataObject) -> None:
    """Every factorization × level × bias × gate × batch shape, every way."""
    spec = data.draw(specs(), "spec")
    gate = data.draw(gates(spec.experts, batch_norm=True), "gate")
    dtype = data.draw(DTYPES, "dtype")
    layer = build(spec, gate, dtype).eval()
    lead = data.draw(batch_shapes(), "batch shape")
    x = draw_normal(data, *lead, spec.in_features, dtype=dtype)
    outputs = []
    for name, way in WAYS.items():
        with way():
            output, found = layer(x), layer.coefficients(x)
        assert output.shape == (*lead, spec.out_features), name
        assert output.dtype == dtype, name
        assert output.requires_grad == (name in ("with gradients", "traced")), name
        assert [each.shape for each in found] == [(*lead, count) for count in spec.experts]
        assert_mixture(output, layer, found, x)
        outputs.append([numpy_of(each) for each in (*found, output)])
    for other in outputs[1:]:
        for got, want in zip(other, outputs[0], strict=True):
            size = max(1.0, float(np.max(np.abs(want), initial=0.0)))
            np.testing.assert_allclose(got, want, rtol=0, atol=AGREEMENT[dtype] * size)


@given(data=st.data())
def test_coefficients_are_the_gates(data: st.DataObject) -> None:
    """As the core computes them on NumPy from logits that NumPy multiplied."""
    spec = data.draw(specs(), "spec")
    gate = data.draw(gates(spec.experts, batch_norm=True), "gate")
    layer = build(spec, gate).eval()
    x = draw_normal(data, *data.draw(batch_shapes()), spec.in_features)
    parts = {name: numpy_of(array) for name, array in layer.gate.state_dict().items()}
    for level, got in enumerate(layer.coefficients(x)):
        logits = numpy_of(x) @ parts[f"projection_{level}"]
        if gate.bias:
            logits = logits + parts[f"bias_{level}"]
        kept = None
        if gate.normalization == "batch":
            kept = Statistics(parts[f"running_mean_{level}"], parts[f"running_variance_{level}"])
        want = activate(gate, logits, statistics=kept).coefficients
        # a product of one row rounds otherwise than one of many
        np.testing.assert_allclose(numpy_of(got), want, rtol=0, atol=1e-7)
        np.testing.assert_allclose(numpy_of(got.sum(-1)), 1.0, atol=1e-9)
        assert torch.all(got >= 0)


@pytest.mark.parametrize("gate", [*GATES[:2], *GATES[3:5]], ids=str)
def test_many_experts_for_many_inputs(gate: Gate) -> None:
    """Sizes at which a gate works in blocks, and sees rows unlike the others."""
    layer = randomize(MuMoE(16, 8, 700, CP(12), gate=gate, dtype=torch.float32))
    x = normal(2000, 16, dtype=torch.float32)
    x[::7] *= 100.0
    x[5] = 0.0
    parts = {name: numpy_of(array) for name, array in layer.gate.state_dict().items()}
    logits = numpy_of(x).astype("float64") @ parts["projection_0"] + parts.get("bias_0", 0.0)
    want = activate(gate, logits).coefficients
    for way in ("without gradients", "with gradients", "traced"):
        with WAYS[way]():
            (found,) = layer.coefficients(x)
            output = layer(x)
        off = np.abs(numpy_of(found) - want)
        assert np.max(off) < 2e-3, way
        assert np.mean(off) < 1e-6, way
        assert_mixture(output[:50], layer, [found[:50]], x[:50])


@given(data=st.data())
def test_ready_made_coefficients(data: st.DataObject) -> None:
    spec = data.draw(specs(), "spec")
    layer = build(spec)
    lead = data.draw(batch_shapes(), "batch shape")
    x = draw_normal(data, *lead, spec.in_features)
    given_ones = [torch.tensor(each) for each in data.draw(coefficients(spec.experts, lead))]
    for way in WAYS.values():
        with way():
            output = layer(x, given_ones)
            assert_mixture(output, layer, given_ones, x)
            assert torch.equal(layer(x, coefficients=tuple(given_ones)), output)
            if spec.levels == 1:
                assert torch.equal(layer(x, given_ones[0]), output)


@given(data=st.data())
def test_top_k_coefficients_are_gathered(data: st.DataObject) -> None:
    spec = data.draw(specs(), "spec")
    layer = build(spec)
    lead = data.draw(batch_shapes(), "batch shape")
    k = data.draw(st.integers(1, min(spec.experts)), "k")
    x = draw_normal(data, *lead, spec.in_features)
    index = data.draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]), "index")
    chosen, dense = [], []
    for level, count in enumerate(spec.experts):
        order = torch.argsort(normal(*lead, count, seed=level), dim=-1)[..., :k]
        values = normal(*lead, k, seed=10 + level)
        chosen.append(TopK(order.to(index), values))
        dense.append(torch.zeros(*lead, count, dtype=x.dtype).scatter(-1, order, values))
    for way in WAYS.values():
        with way():
            assert_mixture(layer(x, chosen), layer, dense, x)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (5,), (2, 3)])
def test_ready_made_coefficients_take_the_gates_place(lead: tuple[int, ...]) -> None:
    layer = build(LayerSpec(6, 5, (3, 2), TensorRing(3)), Gate())
    x = normal(*lead, 6)
    torch.testing.assert_close(layer(x, layer.coefficients(x)), layer(x))
    other = [torch.rand(*lead, count, dtype=x.dtype) for count in (3, 2)]
    assert_mixture(layer(x, other), layer, other, x)


@pytest.mark.parametrize("way", ["without gradients", "with gradients"])
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_written_to(gate: Gate, way: str, training: bool) -> None:
    """Inputs, coefficients, parameters and cotangents stay as they are."""
    for kind in KINDS:
        layer = build(LayerSpec(5, 4, (3, 2), kind), gate).train(training)
        x = normal(6, 5).requires_grad_()
        made = [each.detach() for each in layer.coefficients(x)]
        arrays = [x, *made, *layer.parameters()]
        before = [(array.detach().clone(), array._version) for array in arrays]
        for given_ones in (None, made):
            with WAYS[way]():
                output = layer(x, given_ones)
            if output.requires_grad:
                cotangent = normal(*output.shape)
                arrays.append(cotangent)
                before.append((cotangent.clone(), cotangent._version))
                first = torch.autograd.grad(
                    output, [x, *layer.factors.values()], cotangent, retain_graph=True
                )
                second = torch.autograd.grad(output, [x, *layer.factors.values()], cotangent)
                assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        for array, (old, version) in zip(arrays, before, strict=True):
            assert torch.equal(array, old)
            assert array._version == version


def test_inputs_of_any_layout() -> None:
    layer = build(LayerSpec(6, 5, (3, 2), CP(4)), Gate())
    x = normal(4, 3, 6)
    want = layer(x)
    for view in (
        x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        x.repeat_interleave(2, dim=-1)[..., ::2],
        torch.cat([x, x])[:4],
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        torch.testing.assert_close(layer(view), want, rtol=0, atol=1e-12)
    row = normal(1, 6)
    spread = layer(row.expand(4, 6))
    torch.testing.assert_close(spread, layer(row).expand(4, 5), rtol=0, atol=1e-12)
    made = [each.permute(2, 0, 1).contiguous().permute(1, 2, 0) for each in layer.coefficients(x)]
    torch.testing.assert_close(layer(x, made), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dtypes_are_kept(kind: Any, dtype: torch.dtype) -> None:
    """Output and gradients in the layer's dtype, coefficients in float32 at least."""
    torch.manual_seed(0)
    layer = MuMoE(12, 9, (4, 3), kind, gate=Gate(normalization="batch", bias=True), dtype=dtype)
    x = normal(5, 12, dtype=dtype).requires_grad_()
    output = layer(x)
    output.sum().backward()
    grads = [parameter.grad for parameter in layer.parameters()]
    tensors = [output, x.grad, *layer.parameters(), *grads, *layer.expert(1, 2)]
    assert {each.dtype for each in (*tensors, *layer.materialize())} == {dtype}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {each.dtype for each in layer.eval().coefficients(x)} == {wide}
    assert {buffer.dtype for buffer in layer.buffers()} == {wide}
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(dtype, 1e-5)
    made = [numpy_of(each) for each in layer.coefficients(x)]
    values = numpy_of(layer(x)).astype("float64")
    assert_output(values, kind, factors_of(layer), made, numpy_of(x), tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_layers_route_in_float32(dtype: torch.dtype) -> None:
    narrow = randomize(MuMoE(16, 8, 64, CP(4), dtype=dtype))
    wide = MuMoE(16, 8, 64, CP(4), dtype=torch.float32)
    wide.load_state_dict(narrow.state_dict())
    x = normal(20, 16, dtype=dtype)
    (got,), (want,) = narrow.coefficients(x), wide.coefficients(x.float())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@given(data=st.data())
def test_single_experts_and_all_of_them(data: st.DataObject) -> None:
    spec = data.draw(specs(), "spec")
    layer = build(spec)
    x = normal(spec.in_features)
    weights, biases = layer.materialize()
    assert weights.shape == (*spec.experts, spec.in_features, spec.out_features)
    index = tuple(data.draw(st.integers(0, count - 1)) for count in spec.experts)
    matrix, bias = layer.expert(*index)
    torch.testing.assert_close(matrix, weights[index], rtol=1e-9, atol=1e-9)
    one_hot = [torch.eye(count)[k].double() for k, count in zip(index, spec.experts, strict=True)]
    want = x @ matrix if bias is None else x @ matrix + bias
    torch.testing.assert_close(layer(x, one_hot), want, rtol=1e-9, atol=1e-9)
    assert (bias is None) == (biases is None) == (not spec.bias)
    if bias is not None:
        torch.testing.assert_close(bias, biases[index], rtol=1e-9, atol=1e-9)
    assert matrix.requires_grad
    assert weights.requires_grad


@given(data=st.data())
def test_a_token_alone_decides_on_its_output(data: st.DataObject) -> None:
    """With layer norm or none, nothing leaks from one input of a batch to another."""
    spec = data.draw(specs(), "spec")
    layer = build(spec, data.draw(gates(spec.experts), "gate"))
    x = draw_normal(data, 6, spec.in_features)
    whole = layer(x)
    x[3:] = 7.0
    torch.testing.assert_close(layer(x)[:3], whole[:3], rtol=1e-7, atol=1e-9)
