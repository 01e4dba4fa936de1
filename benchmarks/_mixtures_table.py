"""All mixtures in one table: size, rank, work, time and memory, predicted beside measured.

Every row takes the place of an MLP of 256 → 512 → 256, on PyTorch, float32, one thread.

- ``--equal experts``: N experts each, as wide as the MLP (half as wide in each half of a Cartesian
  product, one neuron for product keys); a factorized layer has the rank whose factors have the
  parameters of one expert's layer, and its gate on top.
- ``--equal parameters``: at most the MLP's parameters in all, gate or router counted. Where these
  alone have more, or an expert would have no hidden unit, there is no such mixture, and no row.

FLOPs are per token of a batch; rank is the largest that a matrix of an expert can have. Times are
the processor's, the fastest of several forward calls, for one token and for a batch; in brackets
is measured over predicted. Memory is the peak of a call on the batch, in MiB. Peers have no
prediction. Layers of more than ``--most`` parameters are not made, and calls predicted to take more
than ``--longest`` seconds not run: their figures are
predictions, in square brackets.

    python benchmarks/bench_mixtures.py table
    python benchmarks/bench_mixtures.py table --equal parameters --compile
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from math import isqrt
from time import process_time
from typing import Any

import torch
from _mixtures_sparse import forward, others
from _predictions import fastest, profiled
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tensormoe import CP, Roofline
from tensormoe.cli.calibration import measure_roofline
from tensormoe.errors import BudgetError
from tensormoe.mixtures import MonetConfig, ProductConfig
from tensormoe.selection import Budget, mlp_cost
from tensormoe_torch import CartesianMoE, MuMoEMLP, ProductMoE, SoftMoE, SparseMoE

SIZE, HIDDEN, TOP_K, BATCH = 256, 512, 2, 512
MLP = 2 * SIZE * HIDDEN + SIZE + HIDDEN
NEURONS = 8

Make = Callable[[], nn.Module]


def equal_experts(count: int) -> dict[str, Make]:
    """N experts as wide as the MLP."""
    pair = _levels(count)
    options: dict[str, Any] = {"experts": count, "kind": "mlp", "bias": True}

    def block(kind: Any, experts: int | tuple[int, ...] = count) -> Make:
        return lambda: MuMoEMLP(SIZE, HIDDEN, experts=experts, factorization=kind)

    return {
        "dense MoE": block("dense"),
        "CPμMoE": block("cp"),
        "CPμMoE, two levels": block("cp", pair),
        "TRμMoE": block("tensor_ring"),
        "TRμMoE, two levels": block("tensor_ring", pair),
        "Hadamard": block("hadamard"),
        "SparseMoE": lambda: SparseMoE(SIZE, HIDDEN, top_k=TOP_K, **options),
        "SparseMoE, CP": lambda: SparseMoE(
            SIZE, HIDDEN, top_k=TOP_K, factorization="cp", **options
        ),
        "CartesianMoE": lambda: CartesianMoE(SIZE, HIDDEN // 2, top_k=TOP_K, **options),
        "SoftMoE": lambda: SoftMoE(SIZE, HIDDEN, **options),
        "ProductMoE": lambda: ProductMoE(SIZE, experts=pair, top_k=NEURONS),
        **{f"peer: {name}": _given(module) for name, module in _peers(count).items()},
    }


def equal_parameters(count: int) -> dict[str, Make]:
    """At most the MLP's parameters, the gate's or router's counted."""
    pair, budget = _levels(count), Budget(parameters=MLP)
    options: dict[str, Any] = {"experts": count, "kind": "mlp"}

    def block(kind: Any, experts: int | tuple[int, ...] = count) -> Make:
        return lambda: MuMoEMLP(SIZE, HIDDEN, experts=experts, factorization=kind, budget=budget)

    return {
        "CPμMoE": block("cp"),
        "CPμMoE, two levels": block("cp", pair),
        "TRμMoE": block("tensor_ring"),
        "TRμMoE, two levels": block("tensor_ring", pair),
        "SparseMoE": _widest(
            lambda width: SparseMoE(SIZE, width, top_k=TOP_K, device="meta", **options),
            lambda width: SparseMoE(SIZE, width, top_k=TOP_K, **options),
        ),
        "SparseMoE, CP": lambda: SparseMoE(
            SIZE, HIDDEN, top_k=TOP_K, factorization="cp", budget=budget, **options
        ),
        "CartesianMoE": _widest(
            lambda width: CartesianMoE(SIZE, width, top_k=TOP_K, device="meta", **options),
            lambda width: CartesianMoE(SIZE, width, top_k=TOP_K, **options),
        ),
        "SoftMoE": _widest(
            lambda width: SoftMoE(SIZE, width, device="meta", **options),
            lambda width: SoftMoE(SIZE, width, **options),
        ),
        "ProductMoE": lambda: ProductMoE(
            SIZE, experts=pair, top_k=min(NEURONS, pair[0]), factorization=CP(_neurons(pair))
        ),
    }


def _neurons(pair: tuple[int, int]) -> int:
    """The rank of neurons in factors that the MLP's parameters leave beside the router."""
    router = ProductMoE(SIZE, experts=pair, top_k=1, factorization=CP(1), device="meta")
    one = router.num_parameters
    two = ProductMoE(SIZE, experts=pair, top_k=1, factorization=CP(2), device="meta").num_parameters
    return max(1, 1 + (MLP - one) // (two - one))


def _widest(shape: Callable[[int], Any], make: Callable[[int], nn.Module]) -> Make:
    """The mixture with the most hidden units per expert within the MLP's parameters."""

    def made() -> nn.Module:
        one, two = (shape(width).num_parameters for width in (1, 2))
        width = 1 + (MLP - one) // (two - one)
        if width < 1:
            raise BudgetError("router and experts of one hidden unit have more parameters.", {}, {})
        return make(width)

    return made


def _levels(count: int) -> tuple[int, int]:
    root = isqrt(count)
    while count % root:
        root -= 1
    return root, count // root


def _given(module: nn.Module) -> Make:
    return lambda: module


def _peers(count: int) -> dict[str, nn.Module]:
    if count > 256:
        return {}
    found = others(count)
    try:
        from soft_moe_pytorch import SoftMoE as Soft

        found["soft-moe"] = Soft(dim=SIZE, seq_len=count, num_experts=count, expert_mult=2)
    except ImportError:
        pass
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=SIZE,
            intermediate_size=HIDDEN * 2 // 3 // 4 * 4,  # grouped_mm wants rows of 16 bytes
            num_local_experts=count,
            num_experts_per_tok=TOP_K,
        )
        config._experts_implementation = "grouped_mm"
        found["Mixtral block"] = MixtralSparseMoeBlock(config)
        for parameter in found["Mixtral block"].parameters():
            nn.init.normal_(parameter, std=0.02)
    except ImportError:
        pass
    return found


def run(arguments: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser("bench_mixtures table")
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--equal", choices=("experts", "parameters"), default="experts")
    parser.add_argument("--compile", action="store_true", help="measure compiled calls instead")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each measure")
    parser.add_argument(
        "--most", type=float, default=3e8, help="parameters of a layer that is made"
    )
    parser.add_argument("--longest", type=float, default=3.0, help="seconds of a call that is run")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    roofline = measure_roofline("torch", process_time)
    way = "compiled" if options.compile else "eager"
    print(
        f"{SIZE} → {HIDDEN} → {SIZE}, batch {BATCH}, {way}, equal {options.equal}; "
        f"PyTorch {torch.__version__}"
    )
    print(
        "| N | mixture | parameters | FLOPs per token | rank | gradient | one token, ms "
        f"| {BATCH}, ms | MiB |"
    )
    print("| ---: | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    _print_row("", "linear", _Plain(nn.Linear(SIZE, SIZE), None), roofline, options)
    plain = nn.Sequential(nn.Linear(SIZE, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, SIZE))
    _print_row("", "MLP", _Plain(plain, mlp_cost), roofline, options)
    rows = equal_experts if options.equal == "experts" else equal_parameters
    for count in options.experts:
        for name, make in rows(count).items():
            row = _row(make, options.most)
            if row is not None:
                _print_row(str(count), name, row, roofline, options)


class _Plain:
    """A module, and its cost if it is known."""

    def __init__(self, module: nn.Module, cost: Callable[..., Any] | None) -> None:
        self.module, self.known = module, cost
        self.made = True

    @property
    def parameters(self) -> int:
        return sum(each.numel() for each in self.module.parameters())

    def cost(self, batch: int) -> Any:
        if isinstance(self.module, nn.Linear | nn.Sequential):
            return None if self.known is None else self.known(SIZE, HIDDEN, SIZE, batch)
        return getattr(self.module, "cost", lambda batch: None)(batch)


def _row(make: Make, most: float) -> _Plain | None:
    """A mixture; on the meta device if it is too large; None if there is none of these sizes."""
    try:
        with torch.device("meta"):
            shape = _Plain(make(), None)
    except BudgetError:
        return None
    if shape.parameters > most:
        shape.made = False
        return shape
    return _Plain(make(), None)


def _print_row(count: str, name: str, row: _Plain, roofline: Roofline, options: Any) -> None:
    cells = [count, name, f"{row.parameters:,}", _flops(row), _rank(row.module), _soft(name)]
    cells += [_time(row, batch, roofline, options) for batch in (1, BATCH)]
    cells.append(_memory(row, options))
    print(f"| {' | '.join(cells)} |", flush=True)


def _flops(row: _Plain) -> str:
    cost = row.cost(BATCH)
    if cost is not None:
        return f"{cost.flops / BATCH:,.0f}"
    config = getattr(getattr(row.module, "experts", None), "config", None)
    grouped = getattr(config, "_experts_implementation", None) == "grouped_mm"
    if grouped:
        # the counter knows no grouped products
        config._experts_implementation = "eager"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(row.module, _tokens(BATCH))
    if grouped:
        config._experts_implementation = "grouped_mm"
    return f"{counter.get_total_flops() / BATCH:,.0f}"


def _rank(module: nn.Module) -> str:
    """The largest rank of a matrix of an expert; of neurons, their number."""
    config = getattr(module, "config", None)
    if isinstance(config, ProductConfig | MonetConfig):
        return str(config.hidden_features)
    if isinstance(module, MuMoEMLP):
        return str(min(module.config.first.spec.expert_rank, module.config.second.spec.expert_rank))
    if config is not None and hasattr(config, "layers"):
        return str(min(layer.spec.expert_rank for layer in config.layers.values()))
    return str(SIZE)


def _soft(name: str) -> str:
    """Whether outputs are continuous in the input, so that all that routes has a gradient."""
    hard = ("SparseMoE", "CartesianMoE", "ProductMoE", "Mixtral", "st-moe", "mixture-of")
    return "of weights" if any(each in name for each in hard) else "of all"


def _tokens(batch: int) -> Tensor:
    return torch.randn(1, batch, SIZE)


def _time(row: _Plain, batch: int, roofline: Roofline, options: Any) -> str:
    cost = row.cost(batch)
    predicted = None if cost is None else roofline.time(cost)
    slow = predicted is not None and predicted > options.longest
    if not row.made or slow:
        return "" if predicted is None else f"[{_ms(predicted)}]"
    taken = fastest(_call(row.module, batch, options.compile), options.seconds)
    return _ms(taken) + ("" if predicted is None else f" ({taken / predicted:.2f} ×)")


def _memory(row: _Plain, options: Any) -> str:
    cost = row.cost(BATCH)
    predicted = None if cost is None else cost.peak_memory
    if not row.made:
        return "" if predicted is None else f"[{predicted / 2**20:.1f}]"
    call = _call(row.module, BATCH, options.compile)
    call()
    found = profiled(call)
    return f"{found / 2**20:.1f}" + ("" if not predicted else f" ({found / predicted:.2f} ×)")


def _call(module: nn.Module, batch: int, compiled: bool) -> Callable[[], object]:
    x = _tokens(batch)
    called: Any = torch.compile(module) if compiled else module

    def call() -> object:
        with torch.no_grad():
            return forward(called, x)

    return call


def _ms(seconds: float | None) -> str:
    assert seconds is not None
    return f"{seconds * 1e3:.3g}"
