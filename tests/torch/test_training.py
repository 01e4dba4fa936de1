"""Gradients of the PyTorch layers: differences, NumPy's, autograd's own, and a loss that falls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from tensormoe import CP, Gate, LayerSpec, TensorRing, TopK
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
from tensormoe.testing import batch_shapes, coefficients, gates, specs
from tensormoe_torch import MuMoE, MuMoEEmbedding, MuMoEMLP
from tests._kinds import ABLE, GATES, KINDS
from tests._task import task
from tests.numpy._helpers import build as numpys_layer
from tests.torch._helpers import build, gradients, normal, numpy_of, randomize, traced

# neither depends on the other
PAIRS = [*((kind, GATES[0]) for kind in KINDS), *((KINDS[0], gate) for gate in GATES[1:])]


def as_function(module: nn.Module, *data: Tensor, call: Callable[..., Any] | None = None) -> Any:
    """A pure function of data and parameters, and its arguments; buffers stay as they are."""
    names = [name for name, _ in module.named_parameters()]
    values = [each.detach().clone().requires_grad_() for each in module.parameters()]
    buffers = {name: each.clone() for name, each in module.named_buffers()}

    def run(*arguments: Tensor) -> Any:
        state = dict(zip(names, arguments[len(data) :], strict=True))
        state |= {name: each.clone() for name, each in buffers.items()}
        inputs = arguments[: len(data)] if call is None else call(*arguments[: len(data)])
        return functional_call(module, state, inputs)

    return run, (*data, *values)


class TestDifferences:
    """First and second derivatives in float64."""

    @pytest.mark.parametrize("experts", [(4,), (3, 2)], ids=str)
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_of_factorizations(self, kind: Any, experts: tuple[int, ...]) -> None:
        layer = build(LayerSpec(4, 3, experts, kind), Gate("softmax"))
        run, arguments = as_function(layer, normal(3, 4).requires_grad_())
        assert gradcheck(run, arguments)
        assert gradgradcheck(run, arguments, fast_mode=True)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        "gate", [*GATES, Gate(normalization=None), Gate("softmax", normalization="batch")], ids=str
    )
    def test_of_gates(self, gate: Gate, training: bool) -> None:
        layer = build(LayerSpec(4, 3, (5, 3), CP(3)), gate).train(training)
        run, arguments = as_function(layer, normal(4, 4, seed=3).requires_grad_())
        assert gradcheck(run, arguments)

    @pytest.mark.parametrize("gate", GATES, ids=str)
    def test_second_derivatives_of_gates(self, gate: Gate) -> None:
        layer = build(LayerSpec(4, 3, 5, CP(3)), gate)
        run, arguments = as_function(layer, normal(4, 4, seed=3).requires_grad_())
        assert gradgradcheck(run, arguments, fast_mode=True)

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_of_given_coefficients(self, kind: Any) -> None:
        layer = build(LayerSpec(4, 3, (3, 2), kind))
        made = [normal(3, count, seed=count).requires_grad_() for count in (3, 2)]
        data = (normal(3, 4).requires_grad_(), *made)
        run, arguments = as_function(layer, *data, call=lambda x, a, b: (x, [a, b]))
        assert gradcheck(run, arguments)
        assert gradgradcheck(run, arguments, fast_mode=True)

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_of_gathered_coefficients(self, kind: Any) -> None:
        """An expert that several inputs use, and one that none does."""
        layer = build(LayerSpec(4, 3, (4, 3), kind))
        indices = [torch.tensor([[0, 1], [1, 2], [2, 1]]), torch.tensor([[0, 1], [1, 0], [0, 1]])]
        data = (normal(3, 4), normal(3, 2, seed=1), normal(3, 2, seed=2))
        run, arguments = as_function(
            layer,
            *(each.requires_grad_() for each in data),
            call=lambda x, *made: (x, [TopK(*pair) for pair in zip(indices, made, strict=True)]),
        )
        assert gradcheck(run, arguments)
        assert gradgradcheck(run, arguments, fast_mode=True)

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_of_tables(self, kind: Any) -> None:
        table = randomize(MuMoEEmbedding(6, 3, (3, 2), kind, dtype=torch.float64))
        ids = torch.tensor([1, 5, 1, 0])
        made = [normal(4, count, seed=count).requires_grad_() for count in (3, 2)]
        run, arguments = as_function(table, *made, call=lambda a, b: (ids, [a, b]))
        assert gradcheck(run, arguments)
        assert gradgradcheck(run, arguments, fast_mode=True)

    @pytest.mark.parametrize("act_layer", ["gelu", "gelu_tanh", "relu", "silu", "tanh"])
    def test_of_blocks(self, act_layer: str) -> None:
        pair = (TensorRing(2), CP(3))
        block = randomize(
            MuMoEMLP(4, 5, 3, act_layer, experts=(3, 2), factorization=pair, dtype=torch.float64)
        )
        run, arguments = as_function(block, normal(3, 4, seed=1).requires_grad_())
        assert gradcheck(run, arguments)

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_of_single_experts(self, kind: Any) -> None:
        layer = build(LayerSpec(4, 3, (3, 2), kind))
        sources = dict(layer.named_parameters())
        weights, biases = layer.materialize()
        together = torch.cat([weights.flatten(), biases.flatten()])
        one_by_one = []
        for n in range(3):
            for m in range(2):
                one_by_one += [each.flatten() for each in layer.expert(n, m)]
        want, got = gradients(together, sources), gradients(torch.cat(one_by_one), sources)
        for name in sources:
            torch.testing.assert_close(got[name], want[name])


@settings(max_examples=60)
@given(data=st.data())
def test_every_way_gives_the_same_gradients(data: st.DataObject) -> None:
    """Closed forms in nodes, autograd through a traced call, and NumPy's way back."""
    spec = data.draw(specs(), "spec")
    gate = data.draw(gates(spec.experts, batch_norm=True), "gate")
    training = data.draw(st.booleans(), "training")
    lead = data.draw(st.sampled_from([(4,), (2, 2), (2, 1, 3)]), "batch shape")
    layer = build(spec, gate, seed=data.draw(st.integers(0, 99), "seed")).train(training)
    kept = {name: each.clone() for name, each in layer.state_dict().items()}
    twin = numpys_layer(spec, gate)
    for name, array in (twin.parameters | twin.buffers).items():
        array[...] = numpy_of(kept[name])
    x = normal(*lead, spec.in_features, seed=data.draw(st.integers(0, 99), "input seed"))
    sources = {**dict(layer.named_parameters()), "x": x.requires_grad_()}
    output = layer(x)
    found = gradients(output, sources)
    layer.load_state_dict(kept)
    with traced():
        again = gradients(layer(x), sources)
    numpys, pull = twin.vjp(numpy_of(x), training=training)
    back = pull(2 * numpys)
    np.testing.assert_allclose(numpy_of(output), numpys, rtol=0, atol=1e-8 * _size(numpys))
    for name, grad in found.items():
        want = back.input if name == "x" else back.parameters[name]
        for other in (numpy_of(again[name]), want):
            np.testing.assert_allclose(
                numpy_of(grad), other, rtol=0, atol=1e-7 * _size(other), err_msg=name
            )


def _size(array: np.ndarray) -> float:
    return max(1.0, float(np.max(np.abs(array), initial=0.0)))


@settings(max_examples=40)
@given(data=st.data())
def test_gradients_of_given_coefficients_and_ids(data: st.DataObject) -> None:
    """For any leading shape, the empty ones too."""
    spec = data.draw(specs(bias=False), "spec")
    lead = data.draw(batch_shapes(3), "batch shape")
    table = MuMoEEmbedding(
        spec.in_features, spec.out_features, spec.experts, spec.factorization, dtype=torch.float64
    )
    layer = build(spec)
    table.load_state_dict(layer.state_dict())
    ids = torch.tensor(np.random.default_rng(0).integers(spec.in_features, size=lead))
    x = nn.functional.one_hot(ids, spec.in_features).double()
    made = [
        torch.tensor(each, requires_grad=True)
        for each in data.draw(coefficients(spec.experts, lead))
    ]
    given_ones = {f"level {level}": each for level, each in enumerate(made)}
    want = gradients(layer(x, made), dict(layer.named_parameters()) | given_ones)
    got = gradients(table(ids, made), dict(table.named_parameters()) | given_ones)
    with traced():
        other = gradients(table(ids, made), dict(table.named_parameters()) | given_ones)
    for name, expected in want.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other[name], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "gate"), PAIRS, ids=str)
def test_parts_may_be_frozen(kind: Any, gate: Gate) -> None:
    """What is wanted gets the gradient that it gets when all is wanted; the rest gets none."""
    layer = build(LayerSpec(5, 4, (3, 2), kind), gate).eval()
    x = normal(4, 5)
    everything = {**dict(layer.named_parameters()), "x": x.clone().requires_grad_()}
    whole = gradients(layer(everything["x"]), everything)
    names = list(everything)
    subsets = [[name] for name in names]
    subsets += [[name for name in names if name != other] for other in names]
    subsets.append([name for name in names if name.startswith("gate.")])
    subsets.append([name for name in names if name.startswith("factors.")])
    for wanted in subsets:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name in wanted)
            parameter.grad = None
        given_x = x.clone().requires_grad_("x" in wanted)
        (layer(given_x) ** 2).sum().backward()
        for name in names:
            grad = (given_x if name == "x" else dict(layer.named_parameters())[name]).grad
            if name in wanted:
                torch.testing.assert_close(grad, whole[name], msg=f"{name} of {wanted}")
            else:
                assert grad is None, f"{name} beside {wanted}"


@pytest.mark.parametrize(("kind", "gate"), PAIRS, ids=str)
def test_gradients_with_a_graph_are_the_same(kind: Any, gate: Gate) -> None:
    layer = build(LayerSpec(5, 4, (3, 2), kind), gate).eval()
    x = normal(4, 5).requires_grad_()
    sources = [x, *layer.parameters()]
    want = torch.autograd.grad((layer(x) ** 2).sum(), sources)
    got = torch.autograd.grad((layer(x) ** 2).sum(), sources, create_graph=True)
    for each, other in zip(got, want, strict=True):
        torch.testing.assert_close(each.detach(), other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("frozen", ["", "factors", "gate", "gate.projection_1", "factors.input"])
def test_gradient_penalties(frozen: str) -> None:
    """A loss of gradients, with parts that are not trained."""
    layer = build(LayerSpec(5, 4, (3, 2), CP(3)), Gate("softmax"))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    sources = {name: each for name, each in layer.named_parameters() if each.requires_grad}
    x = normal(4, 5).requires_grad_()

    def penalty() -> dict[str, Tensor]:
        (slope,) = torch.autograd.grad((layer(x) ** 2).sum(), x, create_graph=True)
        return gradients(slope, sources)

    got = penalty()
    with traced():
        want = penalty()
    for name in sources:
        size = float(want[name].abs().max())
        assert size > 0
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-9 * size)


def test_gradients_add_up_over_calls() -> None:
    """A layer may be used twice in a graph, and batches accumulate."""
    layer = build(LayerSpec(5, 5, (3, 2), TensorRing(3)), Gate())
    x = normal(4, 5)
    sources = dict(layer.named_parameters())
    with traced():
        want = gradients(layer(layer(x)), sources)
    got = gradients(layer(layer(x)), sources)
    for name in sources:
        torch.testing.assert_close(got[name], want[name])
    (layer(x[:1]) ** 2).sum().backward()
    (layer(x[1:]) ** 2).sum().backward()
    whole = gradients(layer(x), sources)
    for name, parameter in sources.items():
        torch.testing.assert_close(parameter.grad, whole[name])


def test_the_graph_is_freed_like_any_other() -> None:
    layer = build(LayerSpec(5, 4, 3, CP(2)), Gate())
    loss = layer(normal(4, 5)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_writing_to_what_is_saved_is_noticed() -> None:
    layer = build(LayerSpec(5, 4, 3, CP(2)), Gate())
    loss = layer(normal(4, 5)).sum()
    with torch.no_grad():
        layer.factors["input"] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class TestLosses:
    @pytest.mark.parametrize("gate", GATES, ids=str)
    @pytest.mark.parametrize("loss", [load_balance_loss, entropy_loss])
    def test_they_reach_the_gate_alone(self, loss: Callable[[Tensor], Tensor], gate: Gate) -> None:
        layer = build(LayerSpec(5, 4, (6, 3), CP(2)), gate)
        run, arguments = as_function(layer.gate, normal(7, 5).requires_grad_())
        assert gradcheck(lambda *given_ones: sum(map(loss, run(*given_ones))), arguments)
        total = sum(map(loss, layer.coefficients(normal(7, 5))))
        total.backward()
        assert all(each.grad is not None for each in layer.gate.parameters())
        assert all(each.grad is None for each in layer.factors.values())

    @pytest.mark.parametrize(
        ("loss", "vjp"),
        [
            (load_balance_loss, load_balance_loss_vjp),
            (entropy_loss, entropy_loss_vjp),
            (importance_loss, importance_loss_vjp),
            (z_loss, z_loss_vjp),
        ],
    )
    def test_they_are_the_closed_forms(self, loss: Any, vjp: Any) -> None:
        weights = torch.rand(5, 4, dtype=torch.float64).softmax(-1)
        weights[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
        weights.requires_grad_()
        (got,) = torch.autograd.grad(3 * loss(weights), weights)
        torch.testing.assert_close(got, vjp(weights.detach(), 3.0))


@pytest.mark.parametrize(
    ("kind", "normalization"), [*((kind, "layer") for kind in ABLE), (ABLE[0], "batch")], ids=str
)
def test_training_lowers_the_loss(kind: Any, normalization: str) -> None:
    torch.manual_seed(0)
    *data, linear = task()
    x, target = map(torch.from_numpy, data)
    layer = MuMoE(8, 3, 8, kind, gate=Gate(normalization=normalization))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = ((layer(x) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * linear < losses[0]
    with torch.no_grad():
        assert float(((layer.eval()(x) - target) ** 2).mean()) < 0.6 * linear
