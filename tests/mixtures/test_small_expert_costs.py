"""Costs of very many small experts: against PyTorch's counter, and what its profiler saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import tensormoe_torch
from tensormoe.mixtures import MixtureConfig, monet_config, product_config
from tests.mixtures._forms import of

CONFIGS: dict[str, MixtureConfig] = {
    "tables": product_config(64, None, None, experts=(64, 64), top_k=8),
    "tables of two units": product_config(64, 2, 48, experts=(64, 64), top_k=8, heads=2),
    "projected": product_config(64, None, None, experts=(64, 64), top_k=8, key_features=None),
    "cp": product_config(64, None, None, experts=(64, 64), top_k=8, factorization="cp", rank=16),
    **{
        f"{kind}, bias={bias}": monet_config(
            64, 4, None, experts=(64, 32), top_k=8, heads=2, kind=kind, bias=bias
        )
        for kind in ("horizontal", "vertical")
        for bias in (True, False)
    },
}


def layer_of(config: MixtureConfig) -> Any:
    torch.manual_seed(0)
    return of(tensormoe_torch, config).of(config)


def peak(call: Any) -> int:
    """Bytes that a call holds at its worst moment."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    del kept
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    events = [each for each in results.events() if each.name() == "[memory]"]
    alive = highest = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        alive += event.nbytes()
        highest = max(highest, alive)
    return highest


@pytest.mark.parametrize("batch", [1, 33])
@pytest.mark.parametrize("name", CONFIGS)
def test_products_are_what_pytorch_counts(name: str, batch: int) -> None:
    config = CONFIGS[name]
    layer, x = layer_of(config), torch.randn(batch, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert layer.cost(batch).matmul_flops == counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_of_a_call_is_what_the_profiler_saw(name: str) -> None:
    layer, x = layer_of(CONFIGS[name]), torch.randn(256, 64)

    def call() -> object:
        with torch.no_grad():
            return layer(x)

    # factorized experts are counted as if nothing were freed between their steps
    low = 0.7 if name == "cp" else 0.9
    assert low < peak(call) / layer.cost(256).peak_memory < 1.1
