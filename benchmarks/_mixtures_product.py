"""Product routing and its experts: time and memory, beside the linear layer that they replace."""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from _shared import interleaved, settings
from torch import Tensor, nn

from tensormoe_torch import MonetMoE, ProductMoE, SparseMoE

SIZE, BATCH = 768, 256
"""Of the linear layer that is replaced, and tokens per call."""

MANY = (1000, 1000)


def run(arguments: Sequence[str]) -> None:
    """Print the tables that ``python benchmarks/bench_mixtures.py product`` is asked for."""
    parser = argparse.ArgumentParser("bench_mixtures product")
    parser.add_argument("tables", nargs="*", default=["million", "growth", "monet"])
    parser.add_argument("--seconds", type=float, default=8.0, help="per table")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"PyTorch {torch.__version__}, {settings()}, one thread")
    for table in given.tables:
        {"million": million, "growth": growth, "monet": monet}[table](given.seconds)


def million(seconds: float) -> None:
    """Forward and backward of a million experts, relative to the linear layer."""
    modules: dict[str, nn.Module] = {"linear": nn.Linear(SIZE, SIZE)}
    kinds: dict[str, dict[str, Any]] = {
        "tables, k = 4": {"top_k": 4, "sparse": True},
        "tables, k = 8": {"top_k": 8, "sparse": True},
        "tables, k = 16": {"top_k": 16, "sparse": True},
        "cp of rank 32, k = 8": {"top_k": 8, "factorization": "cp", "rank": 32},
        "cp of rank 32, k = 16": {"top_k": 16, "factorization": "cp", "rank": 32},
        "cp of rank 128, k = 8": {"top_k": 8, "factorization": "cp", "rank": 128},
    }
    tables = None
    for name, options in kinds.items():
        layer = ProductMoE(SIZE, experts=MANY, **options, device="meta").to_empty(device="cpu")
        if "factorization" not in options and tables is not None:
            # two tables are six gigabytes: all layers that have them share them
            layer.experts = tables
        elif "factorization" not in options:
            tables = layer.experts
            tables.config = layer.config
        layer.router.reset_parameters()
        if "factorization" in options or layer.experts is tables:
            _draw(layer)
        if options.get("sparse"):
            layer.sparse_gradients()
        modules[name] = layer
    _table(f"{MANY[0] * MANY[1]} experts, batch {BATCH}, {SIZE} → {SIZE}", modules, seconds)


def growth(seconds: float) -> None:
    """Forward and backward of ever more experts at fixed k and rank."""
    modules: dict[str, nn.Module] = {"linear": nn.Linear(SIZE, SIZE)}
    for root in (8, 32, 128):
        modules[f"ProductMoE, cp, {root * root}"] = ProductMoE(
            SIZE, experts=(root, root), top_k=4, factorization="cp", rank=32
        )
    for experts in (64, 1024, 16384):
        modules[f"SparseMoE, cp, {experts}"] = SparseMoE(
            SIZE, experts=experts, top_k=4, kind="linear", factorization="cp", rank=32
        )
    _table(f"experts at k = 4 and rank 32, batch {BATCH}, {SIZE} → {SIZE}", modules, seconds)
    experts_alone = {name: _Experts(module) for name, module in modules.items() if name != "linear"}
    _table("the same without their routers", {"linear": modules["linear"]} | experts_alone, seconds)


def monet(seconds: float) -> None:
    """Both kinds of composed experts, beside an MLP with as many hidden units as halves have."""
    hidden = 512 * 4
    mlp = nn.Sequential(nn.Linear(SIZE, hidden), nn.GELU(), nn.Linear(hidden, SIZE))
    modules: dict[str, nn.Module] = {"MLP of the same width": mlp}
    for kind in ("horizontal", "vertical"):
        modules[f"MonetMoE, {kind}"] = MonetMoE(
            SIZE, 4, experts=512, top_k=16, heads=2, kind=kind, act_layer="gelu"
        )
    _table(f"512² composed experts of 4 units, batch {BATCH}, {SIZE} → {SIZE}", modules, seconds)


class _Experts(nn.Module):
    """A mixture whose tokens are routed already."""

    def __init__(self, mixture: Any) -> None:
        super().__init__()
        self.mixture = mixture
        with torch.no_grad():
            self.routes = mixture.route(torch.randn(BATCH, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.mixture(x, self.routes)
        return made


def _draw(layer: ProductMoE) -> None:
    """Small values in place: which ones makes no difference to the time."""
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.fill_(0.01)


def _table(title: str, modules: dict[str, nn.Module], seconds: float) -> None:
    names = [*modules]
    forward = interleaved([_forward(modules[name]) for name in names], seconds / 2)
    both = interleaved([_training(modules[name]) for name in names], seconds / 2)
    print(f"\n{title}\n{'':28}{'forward':>10}{'and backward':>14}{'relative':>10}")
    for name, first, second in zip(names, forward, both, strict=True):
        relative = second / both[0]
        print(f"{name:28}{1e3 * first:8.2f}ms{1e3 * second:12.2f}ms{relative:10.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process so far: {peak:.1f} GiB")


def _tokens() -> Iterator[Tensor]:
    """Batches in turn, so that the rows of a table are not in the cache from the last call."""
    return cycle([torch.randn(BATCH, SIZE) for _ in range(16)])


def _forward(module: nn.Module) -> Callable[[], object]:
    batches = _tokens()

    def call() -> None:
        with torch.no_grad():
            module(next(batches))

    return call


def _training(module: nn.Module) -> Callable[[], object]:
    batches = _tokens()

    def call() -> None:
        module.zero_grad()
        module(next(batches).clone().requires_grad_()).sum().backward()

    return call
