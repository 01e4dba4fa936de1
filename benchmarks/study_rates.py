"""Whether one learning rate suits other ranks and numbers of experts.

    python benchmarks/study_rates.py
    python benchmarks/study_rates.py --quick

A classifier of Fashion-MNIST is one block, 64 → 256 → 64, between 64 principal components of the
images and a linear layer with a fixed learning rate. Three sizes of each factorization are trained
with every rate of a grid, once with one learning rate for all parameters of the block, and once
with ``parameter_groups(…, lr=…)``, which has multipliers. Then the best rate of each size is used
at the other sizes: the regret is what the loss on held-out images is above that of their own best.

Last, starts are compared at the largest number of experts: with and without a warm-up over a tenth
of the steps, projections of the gate that start at zero or at random, and experts that start closer
together or further apart than by default.

Runs are written to ``out/rates.jsonl`` as they end; a second call goes on from there. It takes some
three minutes of one core. Needs PyTorch, and scikit-learn where Fashion-MNIST is not installed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe import CP, Factorization, TensorRing
from tensormoe_torch import MuMoEMLP, parameter_groups

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from _comparison.images import FASHION, load_images

WIDTH, HIDDEN, BATCH, HELD = 64, 256, 128, 5000
STEPS, SEEDS = 150, 3
HEAD_RATE, DECAY = 0.003, 0.05
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
SIZES: dict[str, tuple[tuple[Factorization, int], ...]] = {
    "cp": ((CP(8), 16), (CP(256), 16), (CP(32), 256)),
    "tensor_ring": (
        (TensorRing((2, 2, 4)), 16),
        (TensorRing((4, 4, 64)), 16),
        (TensorRing((8, 8, 16)), 256),
    ),
}
MODES = ("one rate", "multipliers")
START_RATE = 0.003
STARTS = ("default", "no warm-up", "random projections", "noise x 0.3", "noise x 3")

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def load(folder: Path) -> Data:
    """Principal components of training and held-out images, turned at random, and the classes."""
    images = load_images(folder, holdout=True)
    train, held = (part.flatten(1) for part in (images.train, images.test[:HELD]))
    center = train.mean(0)
    _, _, turned = torch.linalg.svd(train[:10000] - center, full_matrices=False)
    torch.manual_seed(0)
    basis = turned[:WIDTH].T
    scale = ((train[:10000] - center) @ basis).std(0).mean()
    basis = basis @ torch.linalg.qr(torch.randn(basis.shape[1], basis.shape[1]))[0] / scale
    return (
        (train - center) @ basis,
        images.train_labels,
        (held - center) @ basis,
        images.test_labels[:HELD],
    )


@torch.no_grad()
def change(block: MuMoEMLP, start: str) -> None:
    """Other initial values: of projections, or of what tells experts apart."""
    for name, parameter in block.named_parameters():
        if start == "random projections" and "projection" in name:
            nn.init.normal_(parameter, std=0.1 / parameter.shape[0] ** 0.5)
        if start.startswith("noise") and "expert_" in name:
            middle = parameter.mean(0)
            parameter.copy_(middle + float(start.split()[-1]) * (parameter - middle))


def run(
    data: Data,
    factorization: Factorization,
    experts: int,
    mode: str,
    rate: float,
    seed: int,
    start: str = STARTS[0],
) -> float:
    """Train one model; returns its loss on the held-out images in nats."""
    train, labels, held, held_labels = data
    torch.manual_seed(seed)
    width = train.shape[1]
    block = MuMoEMLP(width, HIDDEN, WIDTH, experts=experts, factorization=factorization)
    change(block, start)
    head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))
    model = nn.Sequential(block, head)
    groups = parameter_groups(block, DECAY, lr=None if mode == MODES[0] else rate)
    fixed = [{**group, "lr": HEAD_RATE} for group in parameter_groups(head, DECAY)]
    optimizer = torch.optim.AdamW([*groups, *fixed], lr=rate, betas=(0.9, 0.98))
    warm = 0 if start == "no warm-up" else STEPS // 10

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (STEPS - warm))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for _ in range(STEPS):
        picked = torch.randint(len(train), (BATCH,))
        loss = F.cross_entropy(model(train[picked]), labels[picked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return F.cross_entropy(model(held), held_labels).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two rates")
    parser.add_argument("--data", type=Path, default=FASHION, help="folder of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the runs")
    words = parser.parse_args()
    torch.set_num_threads(1)
    rates, seeds = (RATES[1:3], 1) if words.quick else (RATES, SEEDS)
    words.out.mkdir(parents=True, exist_ok=True)
    path = words.out / "rates.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    known = {tuple(key): loss for key, loss in map(json.loads, lines)}
    data = load(words.data)

    def get(*call: Any) -> float:
        key = (repr(call[0]), *call[1:])
        if key not in known:
            known[key] = run(data, *call)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, known[key]]) + "\n")
            print(*key, f"{known[key]:.4f}", file=sys.stderr, flush=True)
        return known[key]

    # seeds outermost: an interrupted study is a smaller one
    for seed, sizes, mode, rate in product(range(seeds), SIZES.values(), MODES, rates):
        for factorization, experts in sizes:
            get(factorization, experts, mode, rate, seed)
    for name, mode in product(SIZES, MODES):
        report(name, mode, rates, seeds, known)
    print(f"\nstarts: loss at rate {START_RATE:g} with multipliers, each of {seeds} seeds")
    print("| size |" + "".join(f" {start} |" for start in STARTS))
    print("| --- |" + " ---: |" * len(STARTS))
    for sizes in SIZES.values():
        factorization, experts = max(sizes, key=lambda size: size[1])
        row = [
            " ".join(
                f"{get(factorization, experts, MODES[1], START_RATE, seed, start):.3f}"
                for seed in range(seeds)
            )
            for start in STARTS
        ]
        print(f"| {factorization}, N = {experts} |" + "".join(f" {each} |" for each in row))


def report(
    name: str, mode: str, rates: tuple[float, ...], seeds: int, known: dict[tuple, float]
) -> None:
    """Losses by size and rate, and the regret of rates that are best at another size."""
    print(f"\n{name}, {mode}: loss on held-out images, mean of {seeds} seeds")
    print("| size |" + "".join(f" {rate:g} |" for rate in rates) + " best |")
    print("| --- |" + " ---: |" * (len(rates) + 1))
    table = []
    for factorization, experts in SIZES[name]:
        losses = [
            mean(known[repr(factorization), experts, mode, rate, s] for s in range(seeds))
            for rate in rates
        ]
        table.append(losses)
        shown = "".join(f" {loss:.3f} |" for loss in losses)
        print(f"| {factorization}, N = {experts} |{shown} {rates[losses.index(min(losses))]:g} |")
    places = range(len(table))
    found = [
        there[here.index(min(here))] - min(there)
        for i, here in enumerate(table)
        for j, there in enumerate(table)
        if i != j
    ]
    print(f"regret over {len(places)} x {len(places) - 1} pairs: mean {mean(found):.4f}, ", end="")
    print(f"largest {max(found):.4f}; mean of the best losses {mean(map(min, table)):.4f}")


if __name__ == "__main__":
    main()
