"""PyTorch layers under autocast, ``torch.func``, gradient checkpointing and data parallelism."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensormoe import CP, Factorization, Gate
from tensormoe_torch import MuMoE, MuMoEMLP
from tests._kinds import UNEVEN
from tests.torch._helpers import randomized
from tests.torch._ranks import Ranks

# forward-mode differentiation loads what PyTorch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", UNEVEN, ids=str)
def test_autocast_narrows_the_experts_alone(kind: Factorization, dtype: torch.dtype) -> None:
    block = randomized(MuMoEMLP(6, 8, 5, experts=(3, 2), factorization=kind))
    x = torch.randn(4, 6, requires_grad=True)
    want_weights = block.coefficients(x)
    with torch.autocast("cpu", dtype=dtype):
        output = block(x)
        assert block(x.detach().to(dtype)).dtype == dtype
        for weights, wide in zip(block.coefficients(x), want_weights, strict=True):
            assert weights.dtype == torch.float32
            torch.testing.assert_close(weights, wide)
    assert output.dtype == dtype
    output.float().sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in block.parameters())
    want = block(x)
    assert (output.float() - want).abs().max() <= 0.05 * want.abs().max()


def test_autocast_leaves_float64_alone() -> None:
    layer = randomized(MuMoE(6, 5, 4, CP(3), dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 6, dtype=torch.float64)).dtype == torch.float64


def test_every_parameter_may_be_the_one_that_is_mapped() -> None:
    layer = randomized(MuMoE(6, 5, (3, 2), CP(4), gate=Gate(bias=True)))
    parameters, x = dict(layer.named_parameters()), torch.randn(4, 6)
    for name, value in parameters.items():
        many = torch.randn(3, *value.shape)

        def one(array: Tensor, name: str = name) -> Tensor:
            output: Tensor = torch.func.functional_call(layer, {**parameters, name: array}, (x,))
            return output

        found = torch.vmap(one)(many)
        for place, array in enumerate(many):
            torch.testing.assert_close(found[place], one(array), rtol=1e-4, atol=1e-4)


def test_jacobians() -> None:
    layer, x = randomized(MuMoE(6, 5, (3, 2), CP(4))), torch.randn(6)
    backward, forward = torch.func.jacrev(layer)(x), torch.func.jacfwd(layer)(x)
    torch.testing.assert_close(backward, forward, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    block = randomized(MuMoEMLP(6, 8, 5, experts=(3, 2), factorization="tensor_ring", rank=3))
    twin = copy.deepcopy(block)
    x = torch.randn(4, 6, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    block(x).square().sum().backward()
    checkpoint(twin, y, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(gradients(twin), gradients(block))


def test_checkpointing_keeps_nothing_of_the_layer() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = randomized(MuMoE(16, 16, 32, CP(8)))
    x = torch.randn(64, 16, requires_grad=True)
    kept: list[int] = []

    def pack(array: Tensor) -> Tensor:
        kept.append(array.numel())
        return array

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda array: array):
        checkpoint(layer, x, use_reentrant=False)
    assert sum(kept) == x.numel(), "the input alone"


def _train(rank: int) -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in _batches():
        optimizer.zero_grad()
        model(x[rank::2]).square().mean().backward()
        optimizer.step()
    return {name: p.detach().tolist() for name, p in model.module.named_parameters()}


def _model() -> nn.Module:
    return randomized(MuMoEMLP(6, 8, 5, experts=(3, 2), factorization="cp", rank=3))


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 6, generator=generator) for _ in range(3)]


def test_two_processes_train_as_one(ranks: Ranks) -> None:
    found, _ = ranks(_train)
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in _batches():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for name, want in model.named_parameters():
        torch.testing.assert_close(torch.tensor(found[name]), want.detach(), rtol=1e-4, atol=1e-5)
