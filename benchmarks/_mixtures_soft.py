"""Soft mixtures beside soft-moe-pytorch, on PyTorch: forward, and forward with backward.

MLPs of 64 → 128 → 64 with biases, batches of 64 sets of 16 tokens, float32, one thread; processor
time, ratios in one run. Both have the same weights, and outputs are compared. The other package
runs experts in a loop; moving unused experts to the CPU is switched off there. It averages tokens
of normalized length, which ours is given for the comparison of outputs. Above 1, the other one
takes longer.

    python benchmarks/bench_mixtures.py soft
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from _shared import interleaved
from torch import Tensor, nn

from tensormoe_torch import SoftMoE

SETS, TOKENS, FEATURES, HIDDEN = 64, 16, 64, 128
EXPERTS = (8, 16, 32, 64, 128, 256)
Call = Callable[[], object]


def peer(ours: SoftMoE) -> nn.Module:
    """The other package's module with the weights of ours."""
    from soft_moe_pytorch import SoftMoE as Peer

    config = ours.config
    module: Any = Peer(
        FEATURES,
        num_experts=config.num_experts,
        num_slots=config.slots,
        expert_mult=HIDDEN / FEATURES,
        offload_unused_experts_to_cpu=False,
    )
    up, down = (dict(each.factors.items()) for each in ours.experts.projections.values())  # type: ignore[union-attr,operator]
    with torch.no_grad():
        # both lengths are the root of the features there
        ours.router.get_parameter("scale").fill_(FEATURES)
        module.slot_embeds.copy_(ours.router.get_parameter("projection").permute(1, 2, 0))
        for place, expert in enumerate(module.experts.experts):
            for layer, factors in ((expert[0], up), (expert[3], down)):
                layer.weight.copy_(factors["weight"][place].T)
                layer.bias.copy_(factors["bias"][place])
    return module  # type: ignore[no-any-return]


def forward(module: nn.Module, x: Tensor) -> Call:
    """A call that records nothing for gradients."""

    def call() -> object:
        with torch.no_grad():
            return module(x)

    return call


def step(module: nn.Module, x: Tensor) -> Call:
    """Forward and backward, with gradients of parameters and input."""
    given = x.clone().requires_grad_()

    def call() -> object:
        module.zero_grad()
        given.grad = None
        return module(given).square().mean().backward()

    return call


def run(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each figure")
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    words = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{SETS} × {TOKENS} tokens, {FEATURES} → {HIDDEN} → {FEATURES}, one thread")
    print(f"PyTorch {torch.__version__}\n")
    print("| experts | slots of each | ours, forward, ms | other | step, ms | other |")
    print("|" + " ---: |" * 6)
    for experts in words.experts:
        slots = max(1, TOKENS // experts)
        ours = SoftMoE(FEATURES, HIDDEN, experts=experts, slots=slots, bias=True)
        other, x = peer(ours), torch.randn(SETS, TOKENS, FEATURES)
        with torch.no_grad():
            normalized = FEATURES**0.5 * F.normalize(x, dim=-1)
            torch.testing.assert_close(ours(normalized), other(x), rtol=1e-4, atol=1e-5)
        cells = []
        for make in (forward, step):
            mine, theirs = interleaved([make(ours, x), make(other, x)], words.seconds, process_time)
            cells.append(f"{1e3 * mine:.2f} | × {theirs / mine:.2f}")
        print(f"| {experts} | {slots} | {' | '.join(cells)} |", flush=True)
