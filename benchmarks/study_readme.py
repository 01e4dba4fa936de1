"""Accuracy, parameters, FLOPs and time of one block: the table of README.md.

    python benchmarks/study_readme.py
    python benchmarks/study_readme.py --quick

A small classifier of images has one residual block. The block is an MLP, or something else with at
most the MLP's parameters, the gate included: dense and sparse mixtures of small MLPs, and
factorized experts. All runs share data, batches, optimizer and steps, and what is around the block
starts equal. Each kind of block gets the learning rate that is best for it on held-out training
images, from the same four. Then the test images are looked at once.

Runs are written to ``out/readme.jsonl`` as they end; a second call goes on from there. The images
are Fashion-MNIST (Debian's package dataset-fashion-mnist, or ``--data FOLDER``), else the digits of
scikit-learn. The full study takes about ten minutes on one core, ``--quick`` some seconds.

Needs PyTorch and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from time import process_time

import torch
import torch.nn.functional as F
from _peers_modules import OneDNNLinear
from _shared import interleaved
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tensormoe_torch import MuMoE, MuMoEMLP, parameter_groups

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from _comparison.images import FASHION, Images, batches, load_images
from _comparison.training import evaluate

WIDTH, HIDDEN, EXPERTS, FEW = 64, 256, 64, 8
BUDGET = WIDTH * HIDDEN + HIDDEN + HIDDEN * WIDTH + WIDTH
RATES = (0.001, 0.003, 0.01, 0.03)
BATCH, DECAY, BALANCE = 128, 0.05, 0.01
TUNING = (100,)  # seeds of the runs that choose a rate
INPUTS = 1024


class MoE(nn.Module):
    """Eight small MLPs with a softmax router: all of them run, or each input's best two.

    Args:
        top_k: experts per input; None for all of them.

    Attributes:
        balance: the load-balancing loss of the last call (Fedus et al. 2022), for a sparse one.
    """

    def __init__(self, top_k: int | None = None) -> None:
        super().__init__()
        each = (BUDGET - WIDTH * FEW) // FEW
        hidden = (each - WIDTH) // (2 * WIDTH + 1)
        self.top_k, self.balance = top_k, torch.zeros(())
        self.router = nn.Linear(WIDTH, FEW, bias=False)
        self.experts = nn.ModuleList(mlp(hidden) for _ in range(FEW))

    def forward(self, x: Tensor) -> Tensor:
        chances = self.router(x).softmax(-1)
        if self.top_k is None:
            outputs = torch.stack([expert(x) for expert in self.experts], 1)
            return torch.einsum("bn,bno->bo", chances, outputs)
        weights, chosen = chances.topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        load = F.one_hot(chosen, FEW).sum(1).float().mean(0) / self.top_k
        self.balance = FEW * (load * chances.mean(0)).sum()
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == index)
            share = weights[rows, places].unsqueeze(1)
            result = result.index_add(0, rows, share * expert(x[rows]))
        return result


def mlp(hidden: int, linear: type[nn.Linear] = nn.Linear) -> nn.Module:
    return nn.Sequential(linear(WIDTH, hidden), nn.GELU(), linear(hidden, WIDTH))


def factorized(factorization: str) -> Callable[[], nn.Module]:
    options = {"experts": EXPERTS, "factorization": factorization, "budget": BUDGET}
    return lambda: MuMoEMLP(WIDTH, HIDDEN, **options)


@dataclass(frozen=True)
class Kind:
    """Name of the block, and its number of experts."""

    name: str
    experts: int
    build: Callable[[], nn.Module]


KINDS = (
    Kind("linear layer", 0, lambda: nn.Linear(WIDTH, WIDTH)),
    Kind("MLP", 0, lambda: mlp(HIDDEN)),
    Kind("dense MoE, all run", FEW, MoE),
    Kind("sparse MoE, top 2", FEW, lambda: MoE(2)),
    Kind("`MuMoE`, CP", EXPERTS, lambda: MuMoE(WIDTH, WIDTH, EXPERTS, "cp", budget=BUDGET)),
    Kind("`MuMoEMLP`, CP", EXPERTS, factorized("cp")),
    Kind("`MuMoEMLP`, tensor ring", EXPERTS, factorized("tensor_ring")),
)


class Classifier(nn.Module):
    """Pixels → stem → one residual block → classes."""

    def __init__(self, pixels: int, kind: Kind, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Linear(pixels, WIDTH), nn.Linear(WIDTH, 10)
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        torch.manual_seed(seed)
        self.block = kind.build()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        return self.head(self.after(x + self.block(self.before(x))))


def run(kind: Kind, images: Images, rate: float, seed: int, steps: int) -> float:
    """Train one model; returns its accuracy on ``images.test``."""
    model = Classifier(images.train[0].numel(), kind, seed)
    groups = parameter_groups(model, DECAY)
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    warm = max(steps // 10, 1)

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(steps - warm, 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for _, (x, labels) in zip(range(steps), batches(images, BATCH, seed), strict=False):
        loss = F.cross_entropy(model(x), labels)
        if isinstance(model.block, MoE):
            loss = loss + BALANCE * model.block.balance
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return evaluate(model.eval(), images.test, images.test_labels, 1000).accuracy


class Runs:
    """Finished runs, kept in a file, a line each."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.known = {tuple(key): value for key, value in map(json.loads, lines)}

    def get(
        self, kind: Kind, images: Images, part: str, rate: float, seed: int, steps: int
    ) -> float:
        key = (kind.name, images.name, len(images.train), part, rate, seed, steps)
        if key not in self.known:
            self.known[key] = run(kind, images, rate, seed, steps)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, self.known[key]]) + "\n")
            print(*key, f"{self.known[key]:.4f}", file=sys.stderr, flush=True)
        return self.known[key]


def times(blocks: list[nn.Module], seconds: float) -> list[tuple[float, float]]:
    """Processor seconds of a forward call and of a training step of every block, in turns."""
    x = torch.randn(INPUTS, WIDTH, generator=torch.Generator().manual_seed(0))
    given = x.clone().requires_grad_()

    def forward(block: nn.Module) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return block(x)

        return call

    def step(block: nn.Module) -> Callable[[], object]:
        return lambda: block(given).square().mean().backward()

    found = [
        interleaved([make(b) for b in blocks], seconds, process_time) for make in (forward, step)
    ]
    return list(zip(*found, strict=True))


def flops(block: nn.Module) -> float:
    """FLOPs of matrix products per input, in a forward call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(torch.randn(INPUTS, WIDTH))
    return counter.get_total_flops() / INPUTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, two seeds, few images")
    parser.add_argument("--seeds", type=int, help="runs of each block on the test images")
    parser.add_argument("--data", type=Path, default=FASHION, help="folder of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the runs")
    words = parser.parse_args()
    torch.set_num_threads(1)
    steps, seeds = (30, words.seeds or 2) if words.quick else (940, words.seeds or 3)
    tuned, tested = (load_images(words.data, holdout=each) for each in (True, False))
    if words.quick:
        tuned, tested = tuned.part(500), tested.part(500)
    runs = Runs(words.out / "readme.jsonl")

    blocks = [kind.build() for kind in KINDS]
    assert all(sum(p.numel() for p in block.parameters()) <= BUDGET for block in blocks)
    with torch.no_grad():  # a trained gate is not uniform
        for block in blocks:
            for name, parameter in block.named_parameters():
                if name.startswith("gate."):
                    nn.init.normal_(parameter, std=WIDTH**-0.5)
    clocks = times([*blocks, mlp(HIDDEN, OneDNNLinear)], 0.1 if words.quick else 20.0)

    print(f"{tested.name}: {len(tested.train)} images, {steps} steps of {BATCH}, {seeds} seeds")
    print(f"processor time: {INPUTS} inputs, float32, one thread, PyTorch {torch.__version__}")
    plain = clocks[[kind.name for kind in KINDS].index("MLP")]
    print(f"an MLP takes {1e3 * plain[0]:.2f} ms forward and {1e3 * plain[1]:.2f} ms for a step\n")
    print(
        "| block | experts | parameters | FLOPs per input | forward, × MLP | step, × MLP |",
        end="",
    )
    print(" test accuracy, % (lowest – highest) | difference to MLP at the same seed | rate |")
    print("| --- |" + " ---: |" * 8)
    base: list[float] = []
    rows = []
    for kind in sorted(KINDS, key=lambda kind: kind.name != "MLP"):
        held = {
            rate: mean(runs.get(kind, tuned, "held out", rate, seed, steps) for seed in TUNING)
            for rate in RATES
        }
        rate = max(held, key=lambda each: held[each])
        found = [100 * runs.get(kind, tested, "test", rate, seed, steps) for seed in range(seeds)]
        base = base or found
        gaps = [mine - other for mine, other in zip(found, base, strict=True)]
        place = KINDS.index(kind)
        block, (forward, step) = blocks[place], clocks[place]
        rows.append(
            (
                place,
                f"| {kind.name} | {kind.experts or '–'} "
                f"| {sum(p.numel() for p in block.parameters()):,} | {flops(block):,.0f} "
                f"| {forward / plain[0]:.1f} | {step / plain[1]:.1f} "
                f"| {mean(found):.2f} ({min(found):.2f} – {max(found):.2f}) "
                f"| {mean(gaps):+.2f} ({min(gaps):+.2f} … {max(gaps):+.2f}) | {rate:g} |",
            )
        )
    print(*(line for _, line in sorted(rows)), sep="\n")
    forward, step = clocks[-1]
    print("\nthe same MLP on our layers' kernels (oneDNN), × MLP:", end=" ")
    print(f"{forward / plain[0]:.1f} forward, {step / plain[1]:.1f} for a step")


if __name__ == "__main__":
    main()
