"""Adapters on a small trained model: mixtures of low-rank experts against LoRA.

    python benchmarks/study_residual.py
    python benchmarks/study_residual.py --quick

An MLP learns upright images. Then it is frozen, and adapters on its linear layers learn the same
images turned by 0, 90, 180 or 270 degrees, each at random; nothing says which. LoRA adds one
low-rank matrix to each layer, a residual mixture one that depends on the input. Both have the same
number of parameters per layer at most, gates included: those of LoRA of rank r. The rate of Adam is
chosen for each on a sixth of the training images; then it is trained on all, and tested, three
times. LoRA is PEFT's.

Runs are written to ``out/residual.jsonl`` as they end; a second call goes on from there. The images
are Fashion-MNIST (Debian's package dataset-fashion-mnist, or ``--data FOLDER``), else the digits of
scikit-learn. The full study takes about 10 minutes on one core, ``--quick`` some seconds.

Needs PyTorch, PEFT and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from tensormoe_torch import ResidualExperts
from tensormoe_torch.adapters import freeze

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from _comparison.images import FASHION, Images, batches, load_images

RANKS = (8, 32)
EXPERTS = 4
RATES = (3e-3, 1e-2, 3e-2)
METHODS = ("LoRA", "mixture")
HIDDEN, BATCH, EPOCHS, SEEDS = 256, 128, 5, 3
IMAGES = 20_000

Run = dict[str, Any]


def network(images: Images) -> nn.Sequential:
    """A model of three linear layers."""
    pixels = images.train[0].numel()
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(pixels, HIDDEN), nn.ReLU()),
        *(nn.Linear(HIDDEN, HIDDEN), nn.ReLU()),
        nn.Linear(HIDDEN, 10),
    )


def adapted(model: nn.Sequential, method: str, rank: int) -> nn.Module:
    """The model with adapters on all linear layers but the last."""
    places = ["1", "3"]
    if method == "LoRA":
        # all that PEFT adds is trained, and nothing else
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=places)
        found: nn.Module = inject_adapter_in_model(config, model)
        return found
    for place in places:
        linear: Any = model.get_submodule(place)
        budget = rank * (linear.in_features + linear.out_features)
        layer = ResidualExperts(linear, experts=EXPERTS, budget=budget)
        model.register_module(place, layer)
    return freeze(model)


def turned(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images, each turned by a random multiple of 90 degrees."""
    every = torch.stack([torch.rot90(x, k, (1, 2)) for k in range(4)])
    quarter = torch.randint(4, (len(x),), generator=generator)
    return every[quarter, torch.arange(len(x))]


def fit(
    model: nn.Module, images: Images, rate: float, epochs: int, seed: int, turn: bool
) -> nn.Module:
    """Train what is to be trained."""
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(trained, rate)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * max(len(images.train) // BATCH, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _, (x, labels) in zip(range(steps), batches(images, BATCH, seed), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(turned(x, generator) if turn else x), labels).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, turns: range) -> float:
    """Share of the test images that get their class, turned in all ways."""
    right = 0
    for k in turns:
        x = torch.rot90(images.test, k, (1, 2))
        for rows, labels in zip(x.split(500), images.test_labels.split(500), strict=True):
            right += int((model(rows).argmax(-1) == labels).sum())
    return right / (len(turns) * len(images.test))


class Study:
    """The trained model, and runs that are kept in a file, a line each."""

    def __init__(self, folder: Path, images: tuple[Images, Images], epochs: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.epochs = folder / "residual.jsonl", epochs
        self.images = images
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        self.known: dict[tuple[Any, ...], Run] = {
            tuple(key): value for key, value in map(json.loads, lines)
        }
        self.bases: dict[int, Any] = {}

    def base(self, seed: int) -> nn.Sequential:
        """The model after its training on upright images."""
        model = network(self.images[0])
        if seed not in self.bases:
            torch.manual_seed(seed)
            fresh = network(self.images[0])
            # what is held out to choose rates by is not seen here either
            fit(fresh, self.images[1], 1e-3, self.epochs, seed, turn=False)
            self.bases[seed] = fresh.state_dict()
        model.load_state_dict(self.bases[seed])
        return model

    def get(self, method: str, rank: int, rate: float, seed: int, held_out: bool) -> Run:
        images = self.images[held_out]
        key = images.name, len(images.train), method, rank, rate, seed, self.epochs
        if key not in self.known:
            start, model = perf_counter(), self.base(seed)
            torch.manual_seed(seed)
            if method != "none":
                # "all" trains the model itself
                model = model if method == "all" else adapted(model, method, rank)  # type: ignore[assignment]
                fit(model, images, rate, self.epochs, seed, turn=True)
            trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
            found = {"accuracy": accuracy(model, images, range(4)), "trained": trained}
            found["upright"] = accuracy(model, images, range(1))
            found["seconds"] = perf_counter() - start
            self.known[key] = found
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, found]) + "\n")
            print(*key, found, file=sys.stderr, flush=True)
        return self.known[key]

    def best(self, method: str, rank: int, rates: tuple[float, ...], seeds: int) -> tuple[Any, ...]:
        """The rate that is best on held-out images, and the runs with it."""
        rate = max(
            rates,
            key=lambda rate: mean(
                self.get(method, rank, rate, seed, True)["accuracy"] for seed in range(seeds)
            ),
        )
        return rate, [self.get(method, rank, rate, seed, False) for seed in range(seeds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, one seed, few images")
    parser.add_argument("--data", type=Path, default=FASHION, help="folder of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the runs")
    words = parser.parse_args()
    torch.set_num_threads(1)
    images = load_images(words.data), load_images(words.data, holdout=True)
    count = 600 if words.quick else IMAGES
    # a sixth is held out of either
    images = images[0].part(count), images[1].part(count * 5 // 6)
    ranks, seeds, epochs = (RANKS[:1], 1, 2) if words.quick else (RANKS, SEEDS, EPOCHS)
    rates = RATES[:2] if words.quick else RATES
    study = Study(words.out, images, epochs)
    print(f"{images[0].name}: {len(images[0].train)} images, {epochs} epochs, {seeds} seeds\n")
    print("| adapter | rank of LoRA | trained | rate | accuracy, % | upright, % |")
    print("| --- |" + " ---: |" * 5)
    plain = [study.get("none", 0, 0.0, seed, False) for seed in range(seeds)]
    _row("none", "", plain, "")
    for rank in ranks:
        for method in METHODS:
            rate, found = study.best(method, rank, rates, seeds)
            _row(method, str(rank), found, f"{rate:g}")
    rate, found = study.best("all", 0, rates, seeds)
    _row("all weights", "", found, f"{rate:g}")


def _row(name: str, rank: str, runs: list[Run], rate: str) -> None:
    trained = f"{runs[0]['trained']:,}" if rate else "0"
    both = (_spread([100 * each[key] for each in runs]) for key in ("accuracy", "upright"))
    print(f"| {name} | {rank} | {trained} | {rate} | {' | '.join(both)} |")


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ({min(values):.1f} – {max(values):.1f})"


if __name__ == "__main__":
    main()
