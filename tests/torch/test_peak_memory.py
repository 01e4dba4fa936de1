"""Peak memory against PyTorch's own allocator, as its profiler sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tensormoe import CP, Hadamard, SharedBasis, SharedDelta, TensorRing, TensorTrain, Tucker
from tensormoe_torch import MuMoE, MuMoEMLP
from tests.torch._helpers import randomize


def peak(call: Callable[[], object]) -> int:
    """Bytes of tensors alive at the worst moment of a call, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    del kept
    assert recorded.profiler is not None
    results: Any = recorded.profiler.kineto_results
    events = [each for each in results.events() if each.name() == "[memory]"]
    alive = found = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        alive += event.nbytes()
        found = max(found, alive)
    return found


def check(module: Any, features: int, outputs: int, batch: int = 800) -> None:
    """Within 10 %, for inference and for training with the gradient by the input."""
    x = torch.randn(batch, features)
    cotangent = torch.ones(batch, outputs)

    def forward() -> object:
        with torch.no_grad():
            return module.eval()(x)

    def train() -> object:
        output = module.train()(x)
        output.backward(cotangent)
        return output

    forward()
    got, want = module.cost(batch).peak_memory, peak(forward)
    assert abs(got - want) <= 0.1 * want, f"forward: {got / want:.3f}"
    x.requires_grad_()
    train()
    module.zero_grad(set_to_none=True)
    x.grad = None
    got, want = module.cost(batch, training=True).peak_memory, peak(train)
    assert abs(got - want) <= 0.1 * want, f"training: {got / want:.3f}"


@pytest.mark.parametrize("drop", [0.0, 0.25])
@pytest.mark.parametrize("act", ["gelu", "relu", "silu", "tanh"])
@pytest.mark.parametrize("sizes", [(256, 1024, 256), (96, 192, 384), (384, 128, 96)], ids=str)
def test_of_blocks(sizes: tuple[int, int, int], act: str, drop: float) -> None:
    block = MuMoEMLP(*sizes, act_layer=act, drop=drop, experts=64, factorization=CP(64))
    check(randomize(block), sizes[0], sizes[2])


@pytest.mark.parametrize("drop", [0.0, 0.25])
def test_of_gated_blocks(drop: float) -> None:
    options = {"act_layer": "silu", "gated": True, "drop": drop}
    block = MuMoEMLP(128, 256, 192, experts=64, factorization=CP(64), **options)
    check(randomize(block), 128, 192)


@pytest.mark.parametrize("kind", [TensorRing((4, 4, 16)), Hadamard()], ids=str)
def test_of_blocks_of_other_kinds(kind: Any) -> None:
    check(randomize(MuMoEMLP(256, 512, 256, experts=32, factorization=kind)), 256, 256)


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        (CP(256), 32),
        (CP(256), 512),
        (Hadamard(), 512),
        (TensorRing((4, 4, 64)), 32),
        (Hadamard(), 32),
        (CP(256), (16, 32)),
        (TensorRing((4, 4, 4, 64)), (16, 32)),
        (Tucker((8, 8, 64, 64)), (16, 32)),
        (SharedDelta(4), (16, 32)),
    ],
    ids=str,
)
def test_of_layers(kind: Any, experts: Any) -> None:
    check(randomize(MuMoE(384, 256, experts, kind)), 384, 256)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="other kernels pack other blocks"
)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "kind", [TensorRing((4, 4, 64)), TensorTrain((16, 64)), SharedBasis((4, 32))], ids=str
)
def test_of_columns_that_are_packed(kind: Any, threads: int) -> None:
    """oneDNN copies 64 columns at a time on every thread where their entries lie apart."""
    layer, x = randomize(MuMoE(384, 256, 32, kind)), torch.randn(64, 384)

    def forward() -> object:
        with torch.no_grad():
            return layer(x)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        forward()
        got, want = layer.cost(64).peak_memory, peak(forward)
    finally:
        torch.set_num_threads(before)
    assert abs(got - want) <= 0.05 * want
