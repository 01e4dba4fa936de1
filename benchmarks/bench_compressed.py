"""Speed and memory of factorized experts next to the dense ones of a Mixtral, on a CPU.

``MixtralExperts`` of transformers, in the fastest of its implementations (``eager``, ``grouped_mm``
and, for one token, ``batched_mm``), against :class:`FactorizedExperts` whose projections have 25 %
of the parameters, with random values; routes are random, k different experts per token.

- ``time`` and ``ratio``: medians of calls in turns, and of ratios to the dense experts in the same
  turn, since a machine that is shared is at times several times as slow;
- ``FLOPs``: multiply-adds of the products that ran, against those of the chosen dense experts;
- ``memory``: parameters, and tensors alive at the worst moment of a call, against those of dense
  experts.

    python benchmarks/bench_compressed.py [--dtype bfloat16] [--threads 2] [--only low_rank …]
"""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import torch
from _peers_measure import peak_memory
from _shared import Call
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from tensormoe import Budget, select_rank
from tensormoe_torch import MuMoE
from tensormoe_torch.compression import FactorizedExperts

SHARE = 4
"""Dense parameters per parameter of the factors."""

NAMES = (
    "low_rank",
    "shared_basis",
    "tucker",
    "base_delta",
    "shared_delta",
    "cp",
    "tensor_ring",
    "tensor_train",
)


@dataclass(frozen=True)
class Size:
    """Experts of one size."""

    experts: int
    features: int
    hidden: int
    top_k: int

    def __str__(self) -> str:
        sizes = f"{self.features} → {self.hidden} → {self.features}"
        return f"{self.experts} experts {sizes}, top {self.top_k}"


SIZES = (Size(8, 1024, 3584, 2), Size(32, 512, 1024, 4))


def dense_experts(size: Size, dtype: torch.dtype) -> MixtralExperts:
    """Dense experts, with random values."""
    config = MixtralConfig(
        hidden_size=size.features,
        intermediate_size=size.hidden,
        num_local_experts=size.experts,
        num_experts_per_tok=size.top_k,
    )
    experts = MixtralExperts(config).to(dtype)
    for each in experts.parameters():
        nn.init.normal_(each, std=each.shape[-1] ** -0.5)
    return experts.requires_grad_(False)


def factorized(size: Size, name: str, dtype: torch.dtype) -> FactorizedExperts:
    """Experts in factors with a quarter of the parameters, with random values."""
    sizes = {
        "gate_proj": (size.features, size.hidden),
        "up_proj": (size.features, size.hidden),
        "down_proj": (size.hidden, size.features),
    }
    layers = {}
    for role, (inner, outer) in sizes.items():
        budget = Budget(parameters=size.experts * inner * outer // SHARE, gate=False)
        rank = select_rank(name, inner, outer, size.experts, budget=budget, bias=False)
        layers[role] = MuMoE(
            inner, outer, size.experts, name, rank=rank, bias=False, gate=None, dtype=dtype
        )
    return FactorizedExperts(layers, nn.functional.silu).requires_grad_(False)


def routes(size: Size, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the experts of each, and their weights."""
    x = torch.randn(tokens, size.features, dtype=dtype)
    index = torch.rand(tokens, size.experts).topk(size.top_k).indices
    return x, index, torch.rand(tokens, size.top_k, dtype=dtype)


def dense_calls(experts: MixtralExperts, given: tuple[Tensor, ...]) -> dict[str, Call]:
    """Calls of the dense experts by implementation."""

    def call(name: str) -> Call:
        def run() -> object:
            experts.config._experts_implementation = name
            return experts(*given)

        return run

    # a matrix per choice would be gathered for every token
    names = ("eager", "grouped_mm") + (("batched_mm",) if len(given[0]) == 1 else ())
    return {name: call(name) for name in names}


def in_turns(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call in every turn; seven turns at least."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = perf_counter() + seconds
    while perf_counter() < end or len(next(iter(taken.values()))) < 7:
        for name, call in calls.items():
            start = perf_counter()
            call()
            taken[name].append(perf_counter() - start)
    return taken


def ratio(times: list[float], others: list[float]) -> float:
    """Median ratio of times in the same turns."""
    return median(one / other for one, other in zip(times, others, strict=True))


def flops(call: Call) -> int:
    """Multiply-adds, twice, of the products of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def nbytes(module: nn.Module) -> int:
    """Bytes of parameters."""
    return sum(each.nbytes for each in module.parameters())


def compare(size: Size, names: list[str], dtype: torch.dtype, seconds: float) -> None:
    """A row for each factorization and number of tokens."""
    dense = dense_experts(size, dtype)
    made = {name: factorized(size, name, dtype) for name in names}
    for tokens in (1, 512):
        given = routes(size, tokens, dtype)
        baseline = dense_calls(dense, given)
        calls: dict[str, Call] = {name: partial(experts, *given) for name, experts in made.items()}
        turns = in_turns(baseline | calls, seconds)
        by_name = {name: median(taken) for name, taken in turns.items()}
        best = min(baseline, key=lambda each: by_name[each])
        memory = nbytes(dense) + min(peak_memory(each)[0] for each in baseline.values())
        work = flops(baseline["eager"])
        head = f"{size}, {tokens} {'token' if tokens == 1 else 'tokens'}"
        print(f"{head}; dense {best} {by_name[best] * 1e3:.2f} ms", flush=True)
        for name, call in calls.items():
            held = nbytes(made[name]) + peak_memory(call)[0]
            rank = made[name].down_proj.spec.factorization
            print(
                f"{name:>13} {by_name[name] * 1e3:8.2f} ms {ratio(turns[name], turns[best]):6.2f} "
                f"{flops(call) / work:6.2f} {held / memory:7.2f}  {rank}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15.0, help="per size and tokens")
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--size", type=int, choices=range(len(SIZES)), help="one size alone")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(
        f"PyTorch {torch.__version__}, {options.dtype}, {options.threads} of {os.cpu_count()} "
        f"cores, {platform.machine()}\n"
        f"{'':>13} {'time':>11} {'ratio':>6} {'FLOPs':>6} {'memory':>7}",
        flush=True,
    )
    chosen = SIZES if options.size is None else SIZES[options.size : options.size + 1]
    with torch.no_grad():
        for size in chosen:
            compare(size, list(options.only), getattr(torch, options.dtype), options.seconds)


if __name__ == "__main__":
    main()
