"""Routers in PyTorch: hooks on logits, nodes of the graph, compilation, and training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

from tensormoe import CP, Gate
from tensormoe.gates import (
    activate,
    entmax,
    entropy_loss,
    expert_load,
    importance_loss,
    load_balance_loss,
    z_loss,
)
from tensormoe_torch import MuMoE, MuMoEMLP, synchronize_gates

BUSY = Gate("top_k", k=2, noise=0.5, balance=0.01)


def layer_of(gate: Gate, dtype: torch.dtype = torch.float64) -> MuMoE:
    torch.manual_seed(0)
    return MuMoE(6, 4, 5, CP(3), gate=gate, dtype=dtype)


def inputs(count: int = 7) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("gate", [Gate(), BUSY], ids=str)
def test_hooks_see_logits_with_their_gradient(gate: Gate) -> None:
    layer, seen = layer_of(gate), []
    handle = layer.gate.logits.register_forward_hook(lambda _, given, made: seen.append(made))
    layer(inputs())
    ((logits,),) = seen
    torch.testing.assert_close(logits, inputs() @ layer.gate.projection_0)
    z_loss(logits).backward()
    want = torch.autograd.grad(z_loss(inputs() @ layer.gate.projection_0), layer.gate.projection_0)[
        0
    ]
    torch.testing.assert_close(layer.gate.projection_0.grad, want)
    handle.remove()
    layer(inputs())
    assert len(seen) == 1


def test_hooks_on_the_gate_see_a_call_that_returns_logits() -> None:
    layer, seen = layer_of(Gate()), []
    layer.gate.register_forward_hook(lambda _, given, made: seen.append(made))
    coefficients, logits = layer.route(inputs())
    assert [each is other for each, other in zip(seen[0], (*coefficients, *logits), strict=True)]
    assert len(seen[0]) == 2


def test_a_block_routes_once() -> None:
    block = MuMoEMLP(6, 8, 4, experts=5, rank=2, gate=BUSY, dtype=torch.float64)
    torch.manual_seed(3)
    coefficients, logits = block.route(inputs())
    made = block(inputs(), coefficients)
    with torch.no_grad():
        block.gate.choice_bias_0.zero_()
    torch.manual_seed(3)
    torch.testing.assert_close(block(inputs()), made)
    assert logits[0].shape == (7, 5)


@pytest.mark.parametrize("synchronized", [False, True])
def test_second_derivatives_of_coefficients_and_logits(synchronized: bool) -> None:
    """The same choice again, though noise is drawn and biases moved in between."""
    layer, x = layer_of(BUSY), inputs().requires_grad_()
    with torch.no_grad():
        layer.gate.choice_bias_0.uniform_(-1, 1)
    if synchronized:
        synchronize_gates(layer)
    state = layer.gate.choice_bias_0.clone()

    def run(x: Tensor, projection: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(4)
        with torch.no_grad():
            layer.gate.choice_bias_0.copy_(state)
        found: Any = torch.func.functional_call(
            layer.gate, {"projection_0": projection}, (x,), {"logits": True}
        )
        return tuple(found)

    arguments = (x, layer.gate.projection_0.detach().requires_grad_())
    assert torch.autograd.gradcheck(run, arguments)
    assert torch.autograd.gradgradcheck(run, arguments)
    # a graph of the backward pass makes the same choice, and so has the same gradients
    plain, graphed = (
        torch.autograd.grad(
            [each.sin().sum() for each in run(*arguments)], arguments, create_graph=graph
        )
        for graph in (False, True)
    )
    torch.testing.assert_close(graphed, plain)
    assert not torch.equal(layer.gate.choice_bias_0, state)


def test_compiled_and_eager_agree() -> None:
    """Biases move, and logits come out, without a break in the graph."""
    gate = Gate("top_k", k=2, balance=0.01)
    eager, compiled = layer_of(gate), layer_of(gate)
    run = torch.compile(compiled.route, backend="eager", fullgraph=True)
    for _ in range(2):
        for got, want in zip(run(inputs()), eager.route(inputs()), strict=True):
            torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled.gate.choice_bias_0, eager.gate.choice_bias_0)
    assert compiled.gate.choice_bias_0.abs().sum() > 0


def test_states_hold_the_biases(tmp_path: Any) -> None:
    layer = layer_of(BUSY)
    layer(inputs())
    assert "gate.choice_bias_0" in layer.state_dict()
    layer.save(tmp_path / "layer.safetensors")
    again = MuMoE.load(tmp_path / "layer.safetensors").eval()
    torch.testing.assert_close(again(inputs()), layer.eval()(inputs()))
    layer.reset_parameters()
    assert not layer.gate.choice_bias_0.any()


def test_writing_to_logits_that_are_saved_is_noticed() -> None:
    layer = layer_of(Gate())
    coefficients, logits = layer.route(inputs())
    with torch.no_grad():
        logits[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        coefficients[0].sum().backward()


def digits() -> tuple[Tensor, Tensor]:
    images, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    return x - x.mean(0), torch.tensor(labels)


def trained(how: str, gate: Gate) -> tuple[float, np.ndarray]:
    """Accuracy on what was held back, and each expert's share of the tokens."""
    x, labels = digits()
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    known, held = order[:1400], order[1400:]
    block = MuMoEMLP(64, 32, 10, experts=16, rank=16, gate=gate)
    if how == "from zero":
        torch.nn.init.zeros_(block.gate.projection_0)
    optimizer = torch.optim.Adam(block.parameters(), lr=5e-3)
    for _ in range(200):
        batch = known[torch.randint(len(known), (128,))]
        coefficients, logits = block.route(x[batch])
        loss = torch.nn.functional.cross_entropy(block(x[batch], coefficients), labels[batch])
        if how == "loss":
            probabilities = [activate(gate.uncut, each).coefficients for each in logits]
            loss = loss + 0.05 * load_balance_loss(probabilities, coefficients)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    block.eval()
    with torch.no_grad():
        (made,) = block.coefficients(x[known])
        right = (block(x[held]).argmax(-1) == labels[held]).double().mean()
    return float(right), (made > 0).double().mean(0).numpy()


def test_no_expert_of_sixteen_dies_on_digits() -> None:
    plain = Gate("top_k", k=2)
    before, unused = trained("from zero", plain)
    assert unused.min() < 0.005
    for how, gate in (("loss", plain), ("balance", Gate("top_k", k=2, balance=0.003))):
        accuracy, share = trained(how, gate)
        assert share.min() > 0.01
        assert accuracy > before - 0.015
        assert accuracy > 0.94


@pytest.mark.parametrize(
    "measure", [load_balance_loss, importance_loss, entropy_loss, z_loss, entmax, expert_load]
)
def test_losses_and_measures_compile_whole(measure: Any) -> None:
    x = torch.randn(6, 4).softmax(-1)
    torch._dynamo.reset()
    found = torch.compile(measure, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, measure(x))


def test_gates_of_other_numbers_compile_one_after_the_other() -> None:
    """A compiler takes a number that has changed for a variable."""
    torch._dynamo.reset()
    for gate in (Gate("top_k", k=2), BUSY, Gate("top_k", k=2, noise=0.1, balance=0.1)):
        layer = layer_of(gate).train()
        torch.compile(layer, backend="eager", fullgraph=True)(inputs()).sum().backward()
        assert layer.gate.projection_0.grad is not None
