"""Costs of sparse mixtures: against PyTorch's counter, the baseline, and what is allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tensormoe import CP, Dense
from tensormoe.mixtures import sparse_config
from tensormoe.routing import Router
from tensormoe.selection import sparse_moe_cost
from tests.mixtures._forms import drawn, tokens, torch_layer

KINDS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear"},
    "mlp": {"kind": "mlp"},
    "swiglu": {},
    "shared": {"shared_features": 5},
    "mixed": {"shared_features": 5, "mix_shared": True},
}


def config_of(name: str, factorization: Any, **options: Any) -> Any:
    hidden = None if name == "linear" else 24
    options = {"experts": 6, "top_k": 2, "factorization": factorization} | options
    return sparse_config(16, hidden, 12, **KINDS[name], **options)


@pytest.mark.parametrize("batch", [1, 10, 64])
@pytest.mark.parametrize("factorization", [Dense(), CP(8)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_products_are_what_pytorch_counts(name: str, factorization: Any, batch: int) -> None:
    config = config_of(name, factorization)
    layer = torch_layer(config, drawn(config))
    x = torch.tensor(tokens(config, (batch,)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert layer.cost(batch).matmul_flops == counter.get_total_flops()


@pytest.mark.parametrize("experts", [2, 6, 64])
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_experts_are_the_baseline(bias: bool, batch: int, experts: int) -> None:
    """The baseline counts the weighted sum as a product; here it is elementwise work."""
    config = config_of("linear", Dense(), bias=bias, experts=experts)
    ours, theirs = config.cost(batch), sparse_moe_cost(16, 12, experts, 2, batch, bias=bias)
    assert ours.parameters == theirs.parameters
    assert ours.matmul_flops == theirs.matmul_flops - 2 * batch * 2 * 12
    assert ours.flops == theirs.flops


def test_routers_biases_and_shared_experts_count() -> None:
    plain, biased = (config_of("swiglu", CP(8), router=Router(bias=bias)) for bias in (False, True))
    shared = config_of("shared", CP(8))
    assert biased.cost(9).parameters == plain.cost(9).parameters + 6
    assert shared.cost(9).parameters - plain.cost(9).parameters == 16 * 10 + 5 * 12
    more = shared.cost(9).matmul_flops - plain.cost(9).matmul_flops
    # the coefficient of one meets the smaller side of each layer: outputs in a product, inputs not
    assert more == 2 * 9 * (16 * 10 + 10 + 5 * 12)


@pytest.mark.parametrize("name", KINDS)
def test_work_grows_with_choices_and_tokens(name: str) -> None:
    one, two = (config_of(name, Dense(), top_k=k) for k in (1, 2))
    assert two.cost(20).matmul_flops > one.cost(20).matmul_flops
    assert one.cost(40).matmul_flops == 2 * one.cost(20).matmul_flops
    trained = two.cost(64, training=True)
    # outer products of single rows are elementwise work
    assert 2.4 < trained.flops / two.cost(64).flops < 3.6
    assert two.cost(64).saved_memory == 0 < trained.saved_memory < trained.peak_memory
