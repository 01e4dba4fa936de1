"""Cartesian products of experts beside sparse mixtures of equal size, in a small GPT.

    python benchmarks/study_cartesian.py
    python benchmarks/study_cartesian.py --quick

The feed-forward blocks of a GPT are a sparse mixture with a shared expert (top 2), one without
(top 3, wider), one of twice as many experts of half the size (top 4), and CartesianMoE with and
without shared sub-experts (Su et al. 2025, tables 1, 3 and 4); all with equally many parameters,
routers and norms counted, and a dense gated MLP of the size that a token runs. All balance the load
by biases. Perplexity is per piece of text: of a test text, as it is and when every token's most
probable expert is disabled in every router.

Each block's learning rate is the best of three on held-out text, of the first seed. Runs are
written to ``out/cartesian.jsonl`` as they end; a second call goes on from there. The text is the
King James Bible (Debian's package bible-kjv), else what ``help()`` shows of Python. The full study
takes about half an hour on one core, ``--quick`` some seconds.

Needs PyTorch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from math import exp
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _mxd_model import Parts, load_parts, score
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from _comparison.text import Text, batches
from _comparison.training import Recipe, train
from gpt_on_text import GPT, Sizes

from tensormoe.routing import Router
from tensormoe_torch import CartesianMoE, SparseMoE
from tensormoe_torch.mixtures import without_best_experts

SIZES = Sizes(depth=2, channels=64, context=64, experts=8)
RECIPE = Recipe(steps=800, batch=16, rate=0.0, scores=1)
RATES = (0.0015, 0.003, 0.01)
SEEDS = (0, 1, 2)
SCORED = 2**16
ROUTER = Router(balance=0.001)

Run = dict[str, float]


class Gated(nn.Module):
    """A dense gated MLP."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(features, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        made: Tensor = self.down(nn.functional.silu(gate) * up)
        return made


def _sparse(features: int, hidden: int, experts: int, **options: Any) -> nn.Module:
    return SparseMoE(features, hidden, experts=experts, router=ROUTER, **options)


def _cartesian(features: int, hidden: int, experts: int, **options: Any) -> nn.Module:
    return CartesianMoE(features, hidden, experts=experts, top_k=2, router=ROUTER, **options)


BLOCKS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "dense, as large as what a token runs": lambda i, h, n: Gated(i, 3 * h),
    "sparse, top 2 and a shared expert": lambda i, h, n: _sparse(
        i, h, n, top_k=2, shared_features=h
    ),
    "sparse, top 3": lambda i, h, n: _sparse(i, h * (n + 1) // n, n, top_k=3),
    "sparse, top 4 of halves and a shared expert": lambda i, h, n: _sparse(
        i, h // 2, 2 * n, top_k=4, shared_features=h
    ),
    "Cartesian, top 2 + 2, shared sub-experts": lambda i, h, n: _cartesian(
        i, h // 2, n, shared_features=h // 2
    ),
    "Cartesian, top 2 + 2": lambda i, h, n: _cartesian(i, h * (n + 1) // (2 * n), n),
}


def run(
    kind: str, rate: float, seed: int, parts: Parts, sizes: Sizes, recipe: Recipe, scored: int
) -> Run:
    """Scores of one trained model, in nats per piece."""
    torch.manual_seed(seed)
    hidden = 2 * sizes.channels
    model = GPT(
        sizes, parts.pieces, lambda features, _, experts: BLOCKS[kind](features, hidden, experts)
    )
    train(
        model,
        batches(Text(parts.name, parts.train, parts.held, ""), sizes.context, recipe.batch, seed),
        replace(recipe, rate=rate),
        lambda each: score(each, parts.held[:scored], sizes.context),
        lambda each: None,
    )
    model.eval()
    texts = {"held": parts.held[:scored], "test": parts.test[:scored]}
    found = {name: score(model, ids, sizes.context).loss for name, ids in texts.items()}
    if not kind.startswith("dense"):
        with without_best_experts(model):
            found["disabled"] = score(model, texts["test"], sizes.context).loss
    layers = model.layers
    found["parameters"] = sum(each.numel() for layer in layers for each in layer.mlp.parameters())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for runs")
    words = parser.parse_args()
    torch.set_num_threads(1)
    sizes, recipe, scored = SIZES, RECIPE, SCORED
    if words.quick:
        sizes = Sizes(depth=1, channels=16, heads=2, context=16, experts=4)
        recipe, scored = replace(RECIPE, steps=10), 2**10
    words.out.mkdir(parents=True, exist_ok=True)
    path = words.out / "cartesian.jsonl"
    known: dict[str, Run] = {}
    if path.exists():
        known = dict(map(json.loads, path.read_text("utf-8").splitlines()))
    parts = load_parts()
    print(f"{parts.name}: {len(parts.train):,} pieces; {recipe.steps} steps", file=sys.stderr)

    def result(kind: str, rate: float, seed: int) -> Run:
        key = json.dumps([kind, rate, seed, repr(sizes), repr(recipe), parts.name])
        if key not in known:
            known[key] = run(kind, rate, seed, parts, sizes, recipe, scored)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, known[key]]) + "\n")
        return known[key]

    print("| block | parameters | rate | perplexity | best expert disabled | rise |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for kind in BLOCKS:
        rate = min(RATES, key=lambda each: result(kind, each, SEEDS[0])["held"])
        runs = [result(kind, rate, seed) for seed in SEEDS]
        whole = [exp(each["test"]) for each in runs]
        cells = [f"{mean(whole):.2f} ({min(whole):.2f} – {max(whole):.2f})", "", ""]
        if "disabled" in runs[0]:
            less = [exp(each["disabled"]) for each in runs]
            cells[1] = f"{mean(less):.2f} ({min(less):.2f} – {max(less):.2f})"
            cells[2] = f"{mean(b / a for a, b in zip(whole, less, strict=True)):.2f} ×"
        print(
            f"| {kind} | {runs[0]['parameters']:,} | {rate:g} | {' | '.join(cells)} |", flush=True
        )


if __name__ == "__main__":
    main()
