"""Cures for experts that end behind the dense MLP in a small GPT.

    python benchmarks/study_gpt.py
    python benchmarks/study_gpt.py --test
    python benchmarks/study_gpt.py --quick

The GPT of ``examples/gpt_on_text.py`` with MLPs of experts (other gates, initial values, hidden
sizes and learning rates) and two controls without a gate: an MLP of half the hidden size, and one
whose matrices are products of rank 44. No block has more parameters than the dense MLP. Scores are
of held-out training text, or of the test text.

Runs are written to ``out/gpt-study.jsonl`` as they end; a second call goes on from there. A run
takes one to two minutes of one core, ``--quick`` some seconds.

Needs PyTorch, and what the example needs.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from _comparison.text import batches, load_text
from _comparison.training import Recipe, train
from _comparison.variants import TENSOR_RING
from gpt_on_text import FULL, GATE, GPT, QUICK, RECIPE, Sizes, score

from tensormoe import CP, Factorization, Gate, TensorRing, select_rank
from tensormoe_torch import MuMoEMLP

SEEDS = (0, 1, 2)
PAPER = Gate.paper("layer")


@dataclass(frozen=True)
class Setting:
    """A kind of block, and how it is trained.

    Args:
        kind: "dense", "low rank", "cp" or "tensor_ring".
        rate: the highest learning rate.
        share: hidden size over the dense MLP's.
        gate: "default", "spread 1" or "paper".
        init: initial values.
    """

    kind: str
    rate: float
    share: float = 1.0
    gate: str = "default"
    init: str = "variance"


GATES = {"default": GATE, "spread 1": replace(GATE, spread=1.0), "paper": PAPER}
SETTINGS = (
    *(Setting("dense", rate) for rate in (0.003, 0.006, 0.01)),
    Setting("dense", 0.006, 0.5),
    Setting("low rank", 0.006),
    *(
        Setting("cp", rate, share, gate, init)
        for rate in (0.003, 0.006, 0.01)
        for share, gate, init in (
            (1.0, "default", "variance"),
            (1.0, "default", "paper"),
            (1.0, "paper", "paper"),
            (0.5, "default", "variance"),
            (0.5, "spread 1", "variance"),
            (0.5, "paper", "variance"),
            (0.5, "paper", "paper"),
        )
    ),
    *(
        Setting("tensor_ring", 0.006, 1.0, gate, init)
        for gate, init in (("default", "variance"), ("spread 1", "variance"), ("paper", "paper"))
    ),
)


def make(setting: Setting, features: int, dense_hidden: int, experts: int) -> nn.Module:
    """A block of at most the parameters of the dense MLP, the gate's included."""
    hidden = round(dense_hidden * setting.share)
    if setting.kind == "dense":
        return nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, features))
    if setting.kind == "low rank":
        rank = 11 * features // 16
        return nn.Sequential(
            nn.Linear(features, rank, bias=False),
            nn.Linear(rank, hidden),
            nn.GELU(),
            nn.Linear(hidden, rank, bias=False),
            nn.Linear(rank, features),
        )
    total = 2 * features * dense_hidden + features + dense_hidden
    half = (total - features * experts) // 2
    pair = [
        _factorization(setting.kind, rows, columns, experts, half)
        for rows, columns in ((features, hidden), (hidden, features))
    ]
    block = MuMoEMLP(
        features,
        hidden,
        experts=experts,
        factorization=(pair[0], pair[1]),
        gate=GATES[setting.gate],
        init=setting.init,
    )
    assert sum(each.numel() for each in block.parameters()) <= total
    return block


def _factorization(kind: str, rows: int, columns: int, experts: int, budget: int) -> Factorization:
    bonds = TENSOR_RING.bonds if kind == "tensor_ring" else None
    rank = select_rank(kind, rows, columns, experts, budget=budget, bonds=bonds, gate=None)
    return CP(rank) if kind == "cp" else TensorRing(rank)


def run(setting: Setting, seed: int, sizes: Sizes, recipe: Recipe, test: bool) -> float:
    """Loss of one trained model, nats a character."""
    text = load_text(holdout=not test)
    torch.manual_seed(seed)
    model = GPT(
        sizes,
        len(text.symbols),
        lambda features, hidden, experts: make(setting, features, hidden, experts),
    )
    found = train(
        model,
        batches(text, sizes.context, recipe.batch, seed),
        replace(recipe, rate=setting.rate, scores=1),
        lambda each: score(each, text, sizes.context),
        lambda each: None,
    )
    return found.scores[-1].loss


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--test", action="store_true", help="scores of the test text")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="runs of each setting")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for runs")
    words = parser.parse_args()
    torch.set_num_threads(1)
    sizes, recipe = (QUICK, replace(RECIPE, steps=10)) if words.quick else (FULL, RECIPE)
    words.out.mkdir(parents=True, exist_ok=True)
    path = words.out / "gpt-study.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    known: dict[str, float] = dict(map(json.loads, lines))
    print("| block | hidden size | gate | initial values | rate | loss, nats a character |")
    print("| --- | ---: | --- | --- | ---: | --- |")
    for setting in SETTINGS:
        losses = []
        for seed in SEEDS[: words.seeds]:
            key = json.dumps([asdict(setting), asdict(sizes), recipe.steps, words.test, seed])
            if key not in known:
                known[key] = run(setting, seed, sizes, recipe, words.test)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, known[key]]) + "\n")
            losses.append(known[key])
        experts = setting.kind in ("cp", "tensor_ring")
        print(
            f"| {setting.kind} | {round(4 * sizes.channels * setting.share)} "
            f"| {setting.gate if experts else ''} | {setting.init if experts else ''} "
            f"| {setting.rate:g} | {mean(losses):.4f} ({min(losses):.4f} – {max(losses):.4f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
