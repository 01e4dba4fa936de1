"""The tables of the μMoE paper (Oldfield et al. 2024), for one layer of 768 → 768.

- ``parameters``: entries against the number of experts, at ranks that fit the linear layer with 16
  experts, and the largest rank of an expert where the linear layer's parameters are kept for any
  number of experts; the gate is counted.
- ``latency``: one input at 128 experts, ranks matched to the linear layer, the gate counted: time
  and memory of a forward call on PyTorch, one thread, beside those of the layers of other kinds,
  predicted and measured.
- ``flops``: one input at 512 experts: the network as one loop over all of its legs, with 𝒲 built
  first, with 𝒲 at hand, and as planned.

    python benchmarks/bench_mixtures.py paper
    python benchmarks/bench_mixtures.py paper flops
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from math import prod
from time import process_time

import torch
from _predictions import fastest, profiled
from torch import nn

from tensormoe import Budget, Factorization, LayerSpec, select_rank
from tensormoe.cli.calibration import measure_roofline
from tensormoe.errors import BudgetError
from tensormoe.factorizations import resolve_factorization
from tensormoe.selection import dense_moe_cost, linear_cost
from tensormoe_torch import MuMoE, SparseMoE

SIZE = 768
LINEAR = SIZE * SIZE + SIZE
RING = (4, 4, None)
"""The first bonds of the paper's tensor rings, where the budget leaves them."""


def run(arguments: Sequence[str]) -> None:
    """Print the tables that are asked for."""
    tables: dict[str, Callable[[], None]] = {
        "parameters": parameters,
        "latency": latency,
        "flops": flops,
    }
    parser = argparse.ArgumentParser("bench_mixtures paper")
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(tables)}; all by default")
    asked = parser.parse_args(arguments).tables or [*tables]
    if unknown := {*asked} - {*tables}:
        parser.error(f"tables must be of {', '.join(tables)}; got {', '.join(sorted(unknown))}.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for table in asked:
        tables[table]()


def matched(name: str, experts: int) -> Factorization:
    """The factorization with the parameters of the linear layer, the gate counted.

    Raises:
        BudgetError: a gate that has more by itself.
    """
    bonds = RING if name == "tensor_ring" else None
    budget = Budget(parameters=LINEAR)
    rank = select_rank(name, SIZE, SIZE, experts, budget=budget, bonds=bonds)
    return resolve_factorization(name, rank)


def parameters() -> None:
    """Print entries against experts, and ranks against experts."""
    kinds = {name: matched(name, 16) for name in ("cp", "tensor_ring")}
    print(f"\n{SIZE} → {SIZE}, with biases and gate; the linear layer has {LINEAR:,} parameters")
    print("| experts | dense or sparse MoE | " + " | ".join(map(repr, kinds.values())), end="")
    print(" | expert rank at the linear layer's parameters: CP | tensor ring |")
    print("| ---: " * 6 + "|")
    for experts in (2, 16, 64, 128, 256, 512, 1024, 4096):
        gate = SIZE * experts
        sizes = [experts * LINEAR + gate]
        sizes += [_spec(experts, kind).num_parameters + gate for kind in kinds.values()]
        ranks = []
        for name in kinds:
            try:
                ranks.append(str(_spec(experts, matched(name, experts)).expert_rank))
            except BudgetError:
                ranks.append("the gate has more")
        print(f"| {experts} | {' | '.join(f'{each:,}' for each in sizes)} | {' | '.join(ranks)} |")


def latency() -> None:
    """Print time and memory of one input at 128 experts."""
    experts = 128
    roofline = measure_roofline("torch", process_time)
    modules: dict[str, nn.Module] = {"linear": nn.Linear(SIZE, SIZE)}
    for name in ("cp", "tensor_ring"):
        kind = matched(name, experts)
        modules[repr(kind)] = MuMoE(SIZE, SIZE, experts, kind)
    modules["sparse MoE, top 2"] = SparseMoE(
        SIZE, experts=experts, top_k=2, kind="linear", bias=True
    )
    modules["dense MoE"] = MuMoE(SIZE, SIZE, experts, "dense")
    known = {
        "linear": linear_cost(SIZE, SIZE, 1),
        "dense MoE": dense_moe_cost(SIZE, SIZE, experts, 1),
    }
    print(f"\n{experts} experts, {SIZE} → {SIZE}, one input; PyTorch {torch.__version__}")
    print("| layer | parameters | ms | × linear | predicted ms | peak KiB | predicted KiB |")
    print("| --- " + "| ---: " * 6 + "|")
    x = torch.randn(1, SIZE)
    base = 0.0
    for name, module in modules.items():

        def call(module: nn.Module = module) -> object:
            with torch.no_grad():
                return module(x)

        taken = fastest(call, 1.0)
        base = base or taken
        cost = known[name] if name in known else module.cost(1)  # type: ignore[operator]
        count = sum(each.numel() for each in module.parameters())
        print(
            f"| {name} | {count:,} | {taken * 1e3:.3f} | {taken / base:.2f} "
            f"| {roofline.time(cost) * 1e3:.3f} | {profiled(call) / 2**10:.1f} "
            f"| {cost.peak_memory / 2**10:.1f} |"
        )


def flops() -> None:
    """Print the work of one input at 512 experts, directly and planned."""
    experts = 512
    print(f"\n{experts} experts, {SIZE} → {SIZE}, FLOPs of one input without biases and gate")
    print("| layer | one loop over all legs | 𝒲 built first | 𝒲 at hand | planned | 𝒲 ÷ planned |")
    print("| --- " + "| ---: " * 5 + "|")
    for name in ("cp", "tensor_ring"):
        spec = LayerSpec(SIZE, SIZE, experts, matched(name, experts), bias=False)
        sizes = spec.network.sizes
        whole = 2 * experts * SIZE * SIZE
        # of the ring, input and output are contracted first, over the bond of both
        bonds = [size for leg, size in sizes.items() if leg not in ("n0", "i", "o", "b")]
        last = bonds if name == "cp" else spec.factorization.rank[:2]
        built = whole * prod(last)
        loop = 2 * prod(sizes[leg] for leg in ("n0", "i", "o")) * prod(bonds)
        planned = spec.plan(1).cost().flops
        print(
            f"| {spec.factorization!r} | {loop:.3g} | {built + whole:.3g} | {whole:.3g} "
            f"| {planned:.3g} | {whole / planned:.0f} |"
        )


def _spec(experts: int, kind: Factorization) -> LayerSpec:
    return LayerSpec(SIZE, SIZE, experts, kind)
