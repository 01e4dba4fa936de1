"""Factorized convolutions in the place of convolutions, on scikit-learn's digits.

Three layers 3 × 3 (1 → 16 → 32 → 32 channels), a mean and a linear head; the last two layers are
``nn.Conv2d``, or ``ConvMoE`` with no more parameters than these, gates included. Adam at the best
of three learning rates, chosen by the loss on a part of the training images; 300 training images,
so that there is something to lose, the rest for the test.

    python benchmarks/study_conv.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tensormoe_torch import ConvMoE

EXPERTS, EPOCHS, BATCH = 8, 40, 50
TRAIN, HELD = 300, 100
RATES = (3e-3, 1e-2, 3e-2)
Make = Callable[[int, int], nn.Module]


def conv(channels: int, out: int) -> nn.Module:
    """The control."""
    return nn.Conv2d(channels, out, 3, padding=1)


def mixture(per: str) -> Make:
    """A mixture of no more parameters."""

    def make(channels: int, out: int) -> nn.Module:
        limit = channels * out * 9 + out
        return ConvMoE(channels, out, 3, experts=EXPERTS, padding=1, experts_per=per, budget=limit)

    return make


VARIANTS: dict[str, Make] = {
    "`nn.Conv2d`": conv,
    "`ConvMoE`, per image": mixture("image"),
    "`ConvMoE`, per position": mixture("position"),
}


def model(make: Make) -> nn.Module:
    """The network."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        make(16, 32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        make(32, 32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def trained(make: Make, x: Tensor, y: Tensor, rate: float, seed: int) -> nn.Module:
    """A network after all epochs."""
    torch.manual_seed(seed)
    net = model(make)
    optimizer = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return net.eval()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    results: dict[str, list[float]] = {name: [] for name in VARIANTS}
    counts = {
        name: sum(each.numel() for each in model(make).parameters())
        for name, make in VARIANTS.items()
    }
    chosen: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in range(seeds):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        x, y = images[order], labels[order]
        for name, make in VARIANTS.items():
            losses = []
            for rate in RATES:
                fresh = trained(make, x[: TRAIN - HELD], y[: TRAIN - HELD], rate, seed)
                held = slice(TRAIN - HELD, TRAIN)
                with torch.no_grad():
                    losses.append(float(F.cross_entropy(fresh(x[held]), y[held])))
            rate = RATES[losses.index(min(losses))]
            net = trained(make, x[:TRAIN], y[:TRAIN], rate, seed)
            with torch.no_grad():
                right = net(x[TRAIN:]).argmax(1) == y[TRAIN:]
            results[name].append(100 * float(right.float().mean()))
            chosen[name].append(rate)
        print(seed, {name: found[-1] for name, found in results.items()}, file=sys.stderr)
    print(f"{seeds} seeds, {TRAIN} training images, {len(images) - TRAIN} for the test\n")
    print("| layers | parameters | accuracy, % | better than the control | rates |")
    print("| --- | ---: | ---: | ---: | --- |")
    control = results["`nn.Conv2d`"]
    for name, found in results.items():
        better = sum(one > other for one, other in zip(found, control, strict=True))
        share = "" if found is control else f"{better} of {seeds}"
        rates = ", ".join(f"{rate:g}: {chosen[name].count(rate)}" for rate in RATES)
        spread = stdev(found) if seeds > 1 else 0.0
        print(f"| {name} | {counts[name]} | {mean(found):.2f} ± {spread:.2f} | {share} | {rates} |")


if __name__ == "__main__":
    main()
