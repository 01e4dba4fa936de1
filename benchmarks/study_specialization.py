"""Specialisation of experts, and the model's need of each, against their number.

    python benchmarks/study_specialization.py
    python benchmarks/study_specialization.py table

A layer of experts is the only layer of a classifier of frozen features of text, of pixels, and of
characters; its factors have the linear layer's parameters, and the gate comes on top. Every row
gets the learning rate of a grid that is best for it on held-out data, and three seeds; accuracy,
specialisation and polysemanticity by interventions, each with what chance gives, are those of test
data. The linear layer is there to compare accuracies with.

Runs are written to ``out/specialization.jsonl`` as they end, and a second call goes on from there;
``table`` prints what is there and draws ``out/specialization.svg``. Needs PyTorch, matplotlib, and
the data of ``study_gates.py``, in ``out/gates``. One core is used, for about a quarter of an hour.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _gates_tasks import Task, load_task
from torch import nn

from tensormoe.analysis import (
    chance_polysemanticity,
    class_histogram,
    expert_load,
    interventions,
    polysemanticity,
    specialization,
)
from tensormoe_torch import MuMoE

OUT = Path(__file__).resolve().parents[1] / "out"
TASKS = ("text", "images", "characters")
COUNTS = (16, 64, 256, 1024)
RATES = (0.003, 0.01, 0.03)
SEEDS = (1, 2, 3)


def train(task: Task, experts: int, rate: float, seed: int) -> nn.Module:
    """A trained layer; the linear one for no experts."""
    torch.manual_seed(seed)
    layer: nn.Module = nn.Linear(task.features, task.classes)
    if experts:
        layer = MuMoE(task.features, task.classes, experts)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=rate, weight_decay=0.01)
    warm = max(task.steps // 20, 1)
    for step, (inputs, labels) in enumerate(task.batches(seed)):
        rest = (step - warm) / max(task.steps - warm, 1)
        share = (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * rest)
        optimizer.param_groups[0]["lr"] = rate * share
        optimizer.zero_grad()
        F.cross_entropy(layer(inputs), labels).backward()
        optimizer.step()
    return layer.eval()


@torch.no_grad()
def measure(task: Task, layer: nn.Module, held_out: bool) -> dict[str, float]:
    """Accuracy, and on test data what experts do."""
    x, labels = task.held_out if held_out else task.test
    found = {"accuracy": float((layer(x).argmax(1) == labels).float().mean())}
    if held_out or not isinstance(layer, MuMoE):
        return found
    (a,) = layer.coefficients(x)
    special = specialization(class_histogram(a, labels, classes=task.classes))
    arrays = dict(layer.named_parameters())
    changed = interventions(layer.config, arrays, x, labels)
    load = expert_load(a, threshold=0.01 / a.shape[1])
    return found | {
        "divergence": float(np.nanmean(special.divergence)),
        "baseline": float(np.nanmean(special.baseline)),
        "polysemanticity": float(np.nanmean(polysemanticity(changed))),
        "chance": float(np.nanmean(chance_polysemanticity(changed))),
        "lost": float(changed.lost.sum(axis=1).mean()),
        "needed": float((changed.lost.sum(axis=1) > 0).mean()),
        "dead": load.dead.size / a.shape[1],
        "active": load.active,
    }


class Runs:
    """Finished runs, a line each."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.known: dict[str, dict[str, float]] = dict(map(json.loads, lines))
        self.task = cache(lambda name: load_task(name, OUT / "gates"))

    def get(
        self, task: str, experts: int, rate: float, seed: int, held_out: bool
    ) -> dict[str, float]:
        """The measurements of a run."""
        key = json.dumps([task, experts, rate, seed, held_out])
        if key not in self.known:
            data = self.task(task)
            self.known[key] = measure(data, train(data, experts, rate, seed), held_out)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, self.known[key]]) + "\n")
            print(key, self.known[key], file=sys.stderr, flush=True)
        return self.known[key]

    def rows(self) -> Iterator[tuple[str, int, list[dict[str, float]]]]:
        """Task, experts and the measurements of all seeds."""
        for task in TASKS:
            for experts in (0, *COUNTS):

                def accuracy(rate: float, task: str = task, experts: int = experts) -> float:
                    return self.get(task, experts, rate, 0, True)["accuracy"]

                best = max(RATES, key=accuracy)
                yield task, experts, [self.get(task, experts, best, each, False) for each in SEEDS]


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def table(rows: list[tuple[str, int, list[dict[str, float]]]]) -> None:
    """Print one row per task and number of experts."""
    print("| task | experts | accuracy, % | JSD, bits | by chance | above chance |", end="")
    print(" polysemanticity | by chance | lost | needed, % |\n| --- |" + " ---: |" * 9)
    for task, experts, seeds in rows:
        cells = [task, str(experts or "linear"), spread([100 * s["accuracy"] for s in seeds], 2)]
        if experts:
            excess = [s["divergence"] - s["baseline"] for s in seeds]
            cells += [spread([s["divergence"] for s in seeds], 3)]
            cells += [spread([s["baseline"] for s in seeds], 3), spread(excess, 3)]
            cells += [spread([s[name] for s in seeds], 3) for name in ("polysemanticity", "chance")]
            cells += [f"{mean(s['lost'] for s in seeds):.1f}"]
            cells += [spread([100 * s["needed"] for s in seeds], 1)]
        print("| " + " | ".join([*cells, *["–"] * (10 - len(cells))]) + " |")


def draw(rows: list[tuple[str, int, list[dict[str, float]]]], path: Path) -> None:
    """Specialisation with its baseline, and polysemanticity, against the number of experts."""
    from tensormoe.plotting import COLOURS, figure, tidy

    with figure(path, width=8.4, height=3.4, transparent=True) as drawn:
        axes = drawn.subplots(1, 2)
        for place, task in enumerate(TASKS):
            seeds = [found for name, experts, found in rows if name == task and experts]
            colour = COLOURS[place]
            for axis, name, style in (
                (axes[0], "divergence", "o-"),
                (axes[0], "baseline", "x--"),
                (axes[1], "polysemanticity", "o-"),
                (axes[1], "chance", "x--"),
            ):
                values = np.array([[each[name] for each in found] for found in seeds])
                label = f"{task}, by chance" if style == "x--" else task
                axis.plot(COUNTS, values.mean(1), style, color=colour, label=label)
                axis.fill_between(COUNTS, values.min(1), values.max(1), color=colour, alpha=0.15)
        for axis, title in zip(axes, ("Specialisation, bits", "Polysemanticity"), strict=True):
            axis.set_xscale("log", base=2)
            axis.set_xticks(COUNTS, COUNTS)
            axis.set_xlabel("experts")
            axis.set_title(title)
            axis.set_ylim(bottom=0)
            axis.legend(fontsize=8)
            tidy(axis)


def main() -> None:
    torch.set_num_threads(1)
    runs = Runs(OUT / "specialization.jsonl")
    rows: list[Any] = []
    for row in runs.rows():
        rows.append(row)
        if "table" not in sys.argv:
            print(row[0], row[1], f"{mean(each['accuracy'] for each in row[2]):.4f}", flush=True)
    table(rows)
    draw(rows, OUT / "specialization.svg")


if __name__ == "__main__":
    main()
