"""The cost of a block: memory against Python's own allocator, work against what runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensormoe import CP, Hadamard, LayerSpec, TensorRing, Tucker
from tensormoe.planning import block_cost
from tensormoe_numpy import MuMoEMLP
from tests.planning.test_costs import peak

SIZES = [(256, 1024, 256), (96, 192, 384), (384, 128, 96)]


def make_block(*sizes: int, **options: Any) -> MuMoEMLP:
    """A block whose gate has been trained: at the start all logits are equal, a case of its own."""
    block = MuMoEMLP(*sizes, seed=0, **options)
    rng = np.random.default_rng(1)
    for name, array in block.parameters.items():
        if name.startswith("gate."):
            array[...] = rng.standard_normal(array.shape)
    return block


@pytest.mark.parametrize("drop", [0.0, 0.25])
@pytest.mark.parametrize("act", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("kind", "experts"), [(CP(64), 128), (TensorRing((4, 4, 4, 16)), (12, 8)), (Hadamard(), 32)]
)
def test_peak_memory_is_tracemallocs(
    kind: Any, experts: Any, sizes: tuple[int, ...], act: str, drop: float
) -> None:
    """Within 10 %; the hidden array and the activation are most of it."""
    options = {"act_layer": act, "drop": drop}
    assert_memory(make_block(*sizes, experts=experts, factorization=kind, **options))


def assert_memory(block: MuMoEMLP) -> None:
    """Predicted within 10 %, for inference and for training."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((800, block.in_features), dtype="float32")
    cotangent = np.ones((800, block.out_features), "float32")

    def train() -> object:
        output, pull = block.vjp(x)
        return output, pull(cotangent)

    for training, call in ((False, lambda: block(x)), (True, train)):
        got, want = block.cost(800, training=training).peak_memory, peak(call)
        # random numbers are drawn in float64, some of them while others are being compared
        bound = 0.15 if block.config.drop else 0.1
        assert abs(got - want) <= bound * want, f"training={training}: {got / want:.3f}"


@pytest.mark.parametrize("drop", [0.0, 0.25])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_peak_memory_of_gated_blocks(sizes: tuple[int, ...], drop: float) -> None:
    options = {"act_layer": "silu", "gated": True, "drop": drop}
    assert_memory(make_block(*sizes, experts=64, factorization=CP(64), **options))


@pytest.mark.parametrize("training", [False, True])
def test_work_is_that_of_both_layers_and_the_activation(training: bool) -> None:
    block = MuMoEMLP(48, 96, 40, experts=(6, 5), factorization=Tucker(4), seed=0)
    layers = [each.cost(50, training=training).matmul_flops for each in (block.first, block.second)]
    cost = block.cost(50, training=training)
    assert cost.matmul_flops == sum(layers)
    assert cost.parameters == block.num_parameters
    between = [step for step in cost.steps if step.label.startswith("activation")]
    assert len(between) == 1 + training
    assert all(step.elementwise_flops >= 50 * 96 for step in between)
    assert between[0].bytes_written == 4 * 50 * 96


def test_gated_blocks_hold_both_halves() -> None:
    """The first layer gives twice the hidden size; its halves are multiplied."""
    second = LayerSpec(512, 64, 8, CP(4)).plan(1000)
    plain = block_cost(LayerSpec(64, 512, 8, CP(4)).plan(1000), second)
    gated = block_cost(LayerSpec(64, 1024, 8, CP(4)).plan(1000), second, gated=True)
    hidden = 4 * 1000 * 512
    # before and behind the activation; both halves, the activation of one, and the product
    assert 2 * hidden <= plain.peak_memory <= 2.3 * hidden
    assert 4 * hidden <= gated.peak_memory <= 4.3 * hidden
    assert [step.label for step in gated.steps if "gated" in step.label] == ["gated: multiply"]
