"""Experts of a soft mixture that are specialised: an eighth of them, chosen image by image.

    python benchmarks/study_soft.py
    python benchmarks/study_soft.py --quick

A soft mixture is the only layer between an image's four patches and a linear read-out of all its
tokens (Chung et al. 2025, their experiment on MNIST): n experts without biases and with one slot
each, of hidden size 4 · pixels of a patch / n, so that the experts have equally many parameters for
every n, but for rounding. It is trained once with all experts. Then a half, a quarter and an eighth
of the experts are kept: those with the largest combine weights for each image
(``SoftMoE.select``), or random ones for each image, in five draws.

Logits of unit vectors of 196 entries spread by 1/14 at first, so that all experts get nearly the
same from every token until the learned scale of the logits has grown. Adam moves it by no more than
its rate per step. So the scale has a rate of its own, a hundred times the others', and the table
has a row with one rate for all parameters as well, where a mixture does not specialise.

Runs are written to ``out/soft.jsonl`` as they end; a second call goes on from there. The images are
Fashion-MNIST (Debian's package dataset-fashion-mnist, or ``--data FOLDER``), else the digits of
scikit-learn. The full study takes about 40 minutes on one core, ``--quick`` some seconds.

Needs PyTorch and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe_torch import SoftMoE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from _comparison.images import FASHION, Images, batches, load_images

EXPERTS = (8, 16, 64, 128)
SHARES = (2, 4, 8)
BATCH, RATE, EPOCHS = 256, 1e-3, 15
SCALE_RATE = 100 * RATE
PLAIN = 64  # experts of the row with one rate for all parameters
DRAWS = 5
CLASSES, PATCHES = 10, 4

Run = dict[str, Any]


class Classifier(nn.Module):
    """Four patches, a soft mixture, and a linear read-out of its outputs."""

    def __init__(self, pixels: int, experts: int) -> None:
        super().__init__()
        width = pixels // PATCHES
        self.experts = SoftMoE(
            width, max(1, PATCHES * width // experts), experts=experts, act_layer="relu"
        )
        self.head = nn.Linear(pixels, CLASSES)

    def forward(self, x: Tensor, mix: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        found: Tensor = self.head((mix or self.experts)(patches(x)).flatten(1))
        return found


def patches(images: Tensor) -> Tensor:
    """Images (batch, height, width) as quarters (batch, 4, pixels)."""
    batch, height, width = images.shape
    parts = images.reshape(batch, 2, height // 2, 2, width // 2)
    return parts.permute(0, 1, 3, 2, 4).reshape(batch, PATCHES, -1)


def trained(images: Images, experts: int, scale_rate: float, seed: int, epochs: int) -> Classifier:
    """A classifier after its training."""
    torch.manual_seed(seed)
    model = Classifier(images.train[0].numel(), experts)
    scale = [model.experts.router.get_parameter("scale")]
    rest = [each for each in model.parameters() if each is not scale[0]]
    groups = [{"params": rest}, {"params": scale, "lr": scale_rate}]
    optimizer = torch.optim.Adam(groups, lr=RATE)
    steps = epochs * max(len(images.train) // BATCH, 1)
    for _, (x, labels) in zip(range(steps), batches(images, BATCH, seed), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(
    model: Classifier, images: Images, mix: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Share of the test images that get their class."""
    right = 0
    for x, labels in zip(images.test.split(500), images.test_labels.split(500), strict=True):
        right += int((model(x, mix).argmax(-1) == labels).sum())
    return right / len(images.test)


def run(images: Images, experts: int, scale_rate: float, seed: int, epochs: int) -> Run:
    """Train once, and test with all experts, with those selected, and with random ones."""
    start = perf_counter()
    model = trained(images, experts, scale_rate, seed, epochs)
    layer = model.experts
    found: Run = {"all": accuracy(model, images), "seconds": perf_counter() - start}
    found["scale"] = layer.router.get_parameter("scale").item()
    for share in SHARES:
        k = experts // share
        found[f"selected {share}"] = accuracy(model, images, partial(layer.select, k=k))
        drawn = partial(layer.select, k=k, random=torch.Generator().manual_seed(seed))
        found[f"random {share}"] = [accuracy(model, images, drawn) for _ in range(DRAWS)]
    return found


class Runs:
    """Finished runs, kept in a file, a line each."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.known: dict[tuple[Any, ...], Run] = {
            tuple(key): value for key, value in map(json.loads, lines)
        }

    def get(self, images: Images, experts: int, scale_rate: float, seed: int, epochs: int) -> Run:
        key = images.name, len(images.train), experts, scale_rate, seed, epochs
        if key not in self.known:
            self.known[key] = run(images, experts, scale_rate, seed, epochs)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, self.known[key]]) + "\n")
            print(*key, self.known[key]["all"], file=sys.stderr, flush=True)
        return self.known[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, one seed, few images")
    parser.add_argument("--epochs", type=int, help=f"of training, {EPOCHS} by default")
    parser.add_argument("--data", type=Path, default=FASHION, help="folder of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the runs")
    words = parser.parse_args()
    torch.set_num_threads(1)
    images = load_images(words.data)
    if words.quick:
        images = images.part(500)
    counts, seeds = (EXPERTS[:2], 1) if words.quick else (EXPERTS, 3)
    epochs = words.epochs or (2 if words.quick else EPOCHS)
    kinds = [(experts, SCALE_RATE) for experts in counts]
    kinds += [] if words.quick else [(PLAIN, RATE)]
    runs = Runs(words.out / "soft.jsonl")
    # seed by seed, so that an interrupted study has rows of every size
    for seed in range(seeds):
        for experts, rate in kinds:
            runs.get(images, experts, rate, seed, epochs)

    print(f"{images.name}: {len(images.train)} images, {epochs} epochs, {seeds} seeds\n")
    print("| experts | hidden | rate of the scale | scale | kept | accuracy of all, % ", end="")
    print("| of those selected, % | share of all, % | of random ones, % | selected − random |")
    print("|" + " ---: |" * 10)
    for experts, rate in kinds:
        found = [runs.get(images, experts, rate, seed, epochs) for seed in range(seeds)]
        everything = [100 * each["all"] for each in found]
        for share in SHARES:
            chosen = [100 * each[f"selected {share}"] for each in found]
            random = [100 * mean(each[f"random {share}"]) for each in found]
            kept = [100 * mine / whole for mine, whole in zip(chosen, everything, strict=True)]
            gaps = [mine - other for mine, other in zip(chosen, random, strict=True)]
            hidden = max(1, images.train[0].numel() // experts)
            print(
                f"| {experts} | {hidden} | {rate:g} | {mean(each['scale'] for each in found):.0f} "
                f"| {experts // share} | {_spread(everything)} "
                f"| {_spread(chosen)} | {_spread(kept)} | {_spread(random)} | {_spread(gaps)} |"
            )


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ({min(values):.1f} – {max(values):.1f})"


if __name__ == "__main__":
    main()
