"""PyTorch layers under autocast, ``torch.func``, gradient checkpointing and data parallelism."""

from __future__ import annotations

import copy
import socket
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Factorization,
    Gate,
    Hadamard,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe_torch import MuMoE, MuMoEMLP

# forward-mode differentiation loads what PyTorch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")

KINDS: list[Factorization] = [
    CP(3),
    TensorRing((2, 3, 2, 3)),
    TensorTrain(3),
    Tucker(2),
    SharedBasis((2, 3)),
    BaseDelta(2),
    SharedDelta(2),
    Hadamard(),
    Dense(),
]


def randomized(module: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return module


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
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


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_vmap_grad_and_functional_call(kind: Factorization) -> None:
    layer = randomized(MuMoE(6, 5, (3, 2), kind))
    # layer norm magnifies the rounding of two logits that nearly tie, so none may by chance
    x = torch.randn(7, 3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x), rtol=1e-4, atol=1e-4)
    parameters = dict(layer.named_parameters())

    def total(values: dict[str, Tensor], inputs: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(layer, values, (inputs,))
        return output.square().sum()

    found = torch.func.grad(total)(parameters, x)
    layer(x).square().sum().backward()
    per_sample = torch.vmap(torch.func.grad(total), in_dims=(None, 0))(parameters, x)
    for name, want in gradients(layer).items():
        size = float(want.abs().max()) + 1.0
        torch.testing.assert_close(found[name] / size, want / size, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            per_sample[name].sum(0) / size, want / size, rtol=1e-4, atol=1e-4
        )


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


def test_ensembles_and_jacobians() -> None:
    layers = [randomized(MuMoE(6, 5, (3, 2), CP(4)), seed) for seed in range(3)]
    x = torch.randn(2, 6)
    stacked = torch.func.stack_module_state(layers)
    outputs = torch.vmap(
        lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,)), in_dims=(0, 0)
    )(*stacked)
    for layer, found in zip(layers, outputs, strict=True):
        torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-4)
    backward, forward = torch.func.jacrev(layers[0])(x[0]), torch.func.jacfwd(layers[0])(x[0])
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


def _worker(rank: int, port: int, queue: Any) -> None:
    import os

    import torch.distributed as distributed
    from torch.nn.parallel import DistributedDataParallel

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = DistributedDataParallel(_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in _batches():
        optimizer.zero_grad()
        model(x[rank::2]).square().mean().backward()
        optimizer.step()
    if rank == 0:
        queue.put({name: p.detach().tolist() for name, p in model.module.named_parameters()})
    distributed.destroy_process_group()


def _model() -> nn.Module:
    return randomized(MuMoEMLP(6, 8, 5, experts=(3, 2), factorization="cp", rank=3))


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 6, generator=generator) for _ in range(3)]


def test_two_processes_train_as_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = queue.get(timeout=120)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in _batches():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for name, want in model.named_parameters():
        torch.testing.assert_close(torch.tensor(found[name]), want.detach(), rtol=1e-4, atol=1e-5)
