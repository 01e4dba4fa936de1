"""Sparse mixtures beside those of others, on PyTorch: forward, and forward with backward.

256 → 512 → 256, two experts per token, float32, one thread; ratios in one run. ``Mixtral`` is the
block of transformers with ``grouped_mm``, the same function with the same weights (the outputs are
compared); ``st-moe`` and ``mixture-of-experts`` have experts of as many parameters, and drop
choices above a capacity and small second ones, which this one does not. ``, all`` are the same with
both choices of every token and the least capacity that drops none of them. Above 1, the other one
takes longer.

    python benchmarks/bench_mixtures.py sparse
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _shared import interleaved
from torch import Tensor, nn

from tensormoe_torch import SparseMoE

FEATURES, HIDDEN, TOP_K = 256, 512, 2
Call = Callable[[], object]


def mixtral(ours: SparseMoE) -> nn.Module:
    """The block of transformers with the weights of ours."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    count = ours.config.experts.num_experts
    config = MixtralConfig(
        hidden_size=FEATURES,
        intermediate_size=HIDDEN,
        num_local_experts=count,
        num_experts_per_tok=TOP_K,
    )
    config._experts_implementation = "grouped_mm"
    block: Any = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        up, down = (each.factors["weight"] for each in ours.experts.projections.values())  # type: ignore[union-attr]
        block.experts.gate_up_proj.copy_(up.mT)
        block.experts.down_proj.copy_(down.mT)
        block.gate.weight.copy_(ours.router.projection.T)  # type: ignore[operator]
    return block  # type: ignore[no-any-return]


def others(count: int, x: Tensor | None = None) -> dict[str, nn.Module]:
    """Mixtures of packages that are installed, with experts of as many parameters.

    Args:
        count: number of experts.
        x: tokens of which no choice may be dropped; with the packages' own capacities for None.
    """
    found: dict[str, nn.Module] = {}
    try:
        from st_moe_pytorch import MoE as StMoE

        sizes = {"num_experts": count, "gating_top_n": TOP_K, "expert_hidden_mult": 3}
        every = {"threshold_train": 0.0, "threshold_eval": 0.0}
        found["st-moe"] = _keeping(lambda **more: StMoE(dim=FEATURES, **sizes, **more), every, x)
    except ImportError:
        pass
    try:
        from mixture_of_experts import MoE

        # two matrices instead of three
        sizes = {"num_experts": count, "hidden_dim": HIDDEN * 3 // 2}
        every = {"second_policy_train": "all", "second_policy_eval": "all"}
        made = _keeping(lambda **more: MoE(dim=FEATURES, **sizes, **more), every, x)
        found["mixture-of-experts"] = made
    except ImportError:
        pass
    return found


def _keeping(make: Callable[..., nn.Module], every: dict[str, Any], x: Tensor | None) -> nn.Module:
    """A mixture with the least capacity, in quarters, that keeps all choices of tokens."""
    if x is None:
        return make()
    for quarters in range(8, 4 * 256):
        torch.manual_seed(1)
        module = make(
            **every, capacity_factor_train=quarters / 4, capacity_factor_eval=quarters / 4
        )
        with torch.no_grad():
            gate: Any = module.gate
            kept = gate(x)[0].count_nonzero()
        if kept == TOP_K * x.shape[0] * x.shape[1]:
            return module
    raise SystemExit("no capacity keeps all choices")


def forward(module: nn.Module, x: Tensor) -> Tensor:
    """The output, whatever else the module returns."""
    made = module(x)
    output: Tensor = made if isinstance(made, Tensor) else made[0]
    return output


def calls_of(module: nn.Module, x: Tensor) -> tuple[Call, Call]:
    """A forward call without gradients, and a step with all of them."""
    cotangent = torch.randn(x.shape)
    source = x.clone().requires_grad_()

    def run() -> None:
        with torch.no_grad():
            forward(module, x)

    def step() -> None:
        module.zero_grad(set_to_none=True)
        source.grad = None
        forward(module, source).backward(cotangent)

    return run, step


def run(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each comparison")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128, 256])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{FEATURES} → {HIDDEN} → {FEATURES}, top {TOP_K}; PyTorch {torch.__version__}")
    head = f"{'experts':>7} {'tokens':>6} {'peer':>24} {'ours ms':>8} {'ratio':>6}"
    print(f"{head} {'step ms':>8} ratio")
    for count in options.experts:
        ours = SparseMoE(FEATURES, HIDDEN, experts=count, top_k=TOP_K)
        for tokens in (64, 1024):
            x = torch.randn(4, tokens // 4, FEATURES)
            peers = {"Mixtral": mixtral(ours)} | others(count)
            peers |= {f"{name}, all": module for name, module in others(count, x).items()}
            with torch.no_grad():
                if not torch.allclose(ours(x), forward(peers["Mixtral"], x), atol=1e-5):
                    raise SystemExit("the mixture and transformers' block disagree")
            own = calls_of(ours, x)
            for name, peer in peers.items():
                rows = []
                for mine, theirs in zip(own, calls_of(peer, x), strict=True):
                    taken, other = interleaved([mine, theirs], options.seconds)
                    rows += [taken * 1e3, other / taken]
                print(
                    f"{count:7} {tokens:6} {name:>24} {rows[0]:8.2f} {rows[1]:6.2f} "
                    f"{rows[2]:8.2f} {rows[3]:5.2f}",
                    flush=True,
                )
