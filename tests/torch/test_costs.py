"""PyTorch's own counters agree with the cost model: FLOPs exactly, saved memory closely."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from tensormoe import CP, Gate, TensorRing
from tensormoe_torch import MuMoE, MuMoEEmbedding, MuMoEMLP
from tests._kinds import LARGE
from tests.torch._helpers import normal, randomize

LEVELS = [(12,), (5, 4), (4, 3, 2)]


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def backward(output: Tensor) -> None:
    output.backward(torch.ones_like(output))


def given_to(layer: MuMoE, batch: int) -> list[Tensor] | None:
    """Coefficients for a layer that has no gate to make them."""
    if layer.gate is not None:
        return None
    experts = layer.spec.experts
    return [normal(batch, n, dtype=torch.float32) for n in experts]


@pytest.mark.parametrize("gate", [Gate(), None], ids=["gate", "given"])
@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("experts", LEVELS, ids=str)
@pytest.mark.parametrize("kind", LARGE, ids=str)
def test_flops(
    kind: Any, experts: tuple[int, ...], bias: bool, batch: int, gate: Gate | None
) -> None:
    """To the FLOP, on the matrix products."""
    layer = randomize(MuMoE(14, 9, experts, kind, bias=bias, gate=gate))
    x = normal(batch, 14, dtype=torch.float32)
    made = given_to(layer, batch)
    with torch.no_grad():
        assert counted(lambda: layer(x, made)) == layer.cost(batch).matmul_flops
    for each in (x, *(made or ())):
        each.requires_grad_()
    assert counted(lambda: layer(x, made)) == layer.cost(batch).matmul_flops
    total = layer.cost(batch, training=True).matmul_flops
    assert counted(lambda: backward(layer(x, made))) == total


@pytest.mark.parametrize(
    "gate", [Gate("softmax", bias=True), Gate("top_k", k=3), Gate(normalization="batch")], ids=str
)
def test_flops_of_other_gates(gate: Gate) -> None:
    layer = randomize(MuMoE(14, 9, (5, 4), CP(12), gate=gate))
    x = normal(16, 14, dtype=torch.float32).requires_grad_()
    total = layer.cost(16, training=True).matmul_flops
    assert counted(lambda: backward(layer(x))) == total


@pytest.mark.parametrize("batch", [1, 64])
def test_flops_of_blocks_and_tables(batch: int) -> None:
    block = randomize(MuMoEMLP(14, 20, 9, experts=(5, 4), factorization=TensorRing(4)))
    x = normal(batch, 14, dtype=torch.float32).requires_grad_()
    assert counted(lambda: block(x)) == block.cost(batch).matmul_flops
    total = block.cost(batch, training=True).matmul_flops
    assert counted(lambda: backward(block(x))) == total
    table = randomize(MuMoEEmbedding(30, 9, (5, 4), TensorRing(4)))
    ids = torch.arange(batch) % 30
    made = [normal(batch, n, dtype=torch.float32).requires_grad_() for n in (5, 4)]
    assert counted(lambda: table(ids, made)) == table.cost(batch).matmul_flops
    total = table.cost(batch, training=True).matmul_flops
    assert counted(lambda: backward(table(ids, made))) == total


def test_frozen_parts_cost_nothing_on_the_way_back() -> None:
    """Gradients that nobody wants are not computed."""
    layer = randomize(MuMoE(64, 48, 32, CP(16)))
    x = normal(128, 64, dtype=torch.float32)
    whole = counted(lambda: backward(layer(x.clone().requires_grad_())))
    without_input = counted(lambda: backward(layer(x)))
    assert without_input < whole
    layer.factors.requires_grad_(False)
    only_gate = counted(lambda: backward(layer(x)))
    assert only_gate < without_input
    layer.requires_grad_(False)
    layer.factors["output"].requires_grad_()
    forward = layer.cost(128).matmul_flops
    # one product of the hidden values and the cotangent
    assert counted(lambda: backward(layer(x))) == forward + 2 * 128 * 16 * 48


def saved_bytes(module: nn.Module, *inputs: Any) -> int:
    """Bytes that stay alive for the backward pass, beyond parameters and inputs."""
    known = {each.untyped_storage().data_ptr() for each in module.parameters()}
    flat = [each for given in inputs for each in (given if isinstance(given, list) else [given])]
    known |= {each.untyped_storage().data_ptr() for each in flat}
    found: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(tensor)  # so that no other tensor takes its place
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*inputs)
    assert output.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("gate", [Gate(), None], ids=["gate", "given"])
@pytest.mark.parametrize("batch", [256, 1000])
@pytest.mark.parametrize("experts", LEVELS, ids=str)
@pytest.mark.parametrize("kind", LARGE, ids=str)
def test_saved_memory(kind: Any, experts: tuple[int, ...], batch: int, gate: Gate | None) -> None:
    """What a call keeps for its way back is what the cost model says, and no more."""
    layer = randomize(MuMoE(28, 18, experts, kind, gate=gate))
    x = normal(batch, 28, dtype=torch.float32).requires_grad_()
    made = given_to(layer, batch)
    for each in made or ():
        each.requires_grad_()
    found = saved_bytes(layer, x) if made is None else saved_bytes(layer, x, made)
    want = layer.cost(batch, training=True).saved_memory
    assert 0.95 * want <= found <= want


@pytest.mark.parametrize("normalization", ["layer", "batch", None])
@pytest.mark.parametrize("activation", ["entmax", "sparsemax", "softmax"])
def test_memory_saved_by_gates(activation: str, normalization: str | None) -> None:
    """Logits and coefficients, whichever the activation."""
    gate = Gate(activation, normalization=normalization, bias=True)
    layer = randomize(MuMoE(28, 18, 100, CP(12), gate=gate))
    x = normal(256, 28, dtype=torch.float32).requires_grad_()
    want = layer.cost(256, training=True).saved_memory
    assert 0.95 * want <= saved_bytes(layer, x) <= want


def test_nothing_is_kept_without_gradients() -> None:
    """No memory is left but the output's, neither after inference nor after training."""
    layer = randomize(MuMoE(28, 18, 100, CP(12)))
    x = normal(1000, 28, dtype=torch.float32)
    with torch.no_grad():
        assert layer(x).grad_fn is None
    layer.requires_grad_(False)
    output = layer(x)
    assert output.grad_fn is None
    assert output.untyped_storage().nbytes() == output.nbytes


def test_memory_alive_between_forward_and_backward() -> None:
    """As PyTorch's profiler measures it, for a layer whose parts are all large."""
    layer = randomize(MuMoE(64, 48, 128, CP(96)))
    x = normal(2048, 64, dtype=torch.float32).requires_grad_()
    backward(layer(x))  # so that gradients exist before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        output = layer(x)
    alive = sum(event.self_cpu_memory_usage for event in profile.events()) - output.nbytes
    want = layer.cost(2048, training=True).saved_memory
    assert 0.95 * want <= alive <= 1.01 * want
