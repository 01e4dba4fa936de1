"""Gates compared on real tasks: which one should be the default?

    python benchmarks/study_gates.py screen
    python benchmarks/study_gates.py confirm
    python benchmarks/study_gates.py optimizers
    python benchmarks/study_gates.py decays
    python benchmarks/study_gates.py table
    python benchmarks/study_gates.py --quick

Experts take the place of the only layer of a classifier (text, images, characters) or of a residual
block (letters). ``screen`` tries every candidate on two tasks; ``confirm`` runs the best few on all
tasks, for 16 to 1024 experts in one level and 32 × 32 in two, as CP and tensor ring, with the gate
on top of the linear layer's parameters and inside them; ``optimizers`` repeats some with SGD and
Muon; ``decays`` repeats text inside the linear layer's parameters with a weight decay that is tuned
like the rate, by the mean of three seeds. Every row, those of the linear layer, the low-rank layer
and the MLP included, gets the rate that is best for it on held-out data, from the same grid; then
three seeds are scored on the test data.

Runs are written to ``out/gates/runs.jsonl`` as they end; a second call goes on from there, and
``table`` prints what is there; ``screen`` ends with one row per candidate. Needs PyTorch, and the
data that ``benchmarks/_gates_tasks.py`` names, in ``out/gates``. One core is used; the whole takes
some hours, ``--quick`` some seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch
from _gates_candidates import CANDIDATES
from _gates_report import print_screen, print_tables
from _gates_runs import DECAY, Runs, Setting
from _gates_tasks import TASKS, Task, load_task

RATES = {"adamw": (0.003, 0.01, 0.03), "sgd": (0.03, 0.1, 0.3), "muon": (0.003, 0.01, 0.03)}
SEEDS = (1, 2, 3)
TUNED = (0,)  # seeds of runs that choose a rate
DECAYS = (DECAY, 0.1, 1.0)
TUNED_DECAYS = (0, 4, 5)
COUNTS: tuple[tuple[int, ...], ...] = ((16,), (64,), (256,), (1024,), (32, 32))
PAPER, DEFAULT = [*CANDIDATES][:2]
FEW = (PAPER, DEFAULT)
CONTROLS = ("linear", "mlp")


def screen() -> Iterator[Setting]:
    """Every candidate on two tasks."""
    for task in ("text", "images"):
        for model in CONTROLS:
            yield Setting(task, model)
        for name in CANDIDATES:
            for experts in ((16,), (256,)):
                yield Setting(task, name, experts, "cp")


def confirm() -> Iterator[Setting]:
    """The default and the paper's gate on all tasks."""
    for task in TASKS:
        for model in CONTROLS:
            yield Setting(task, model)
        for experts in COUNTS:
            for name in FEW:
                yield Setting(task, name, experts, "cp")
    for task in ("text", "characters", "letters"):  # a gate for images has more than a linear layer
        for experts in ((16,), (8, 8)):
            for name in (*FEW, "low rank"):
                yield Setting(task, name, experts, "cp", total=True)
    for task in ("text", "images"):
        for experts in ((16,), (256,), (32, 32)):
            for name in FEW:
                yield Setting(task, name, experts, "tensor_ring")


def optimizers() -> Iterator[Setting]:
    """SGD and Muon."""
    for optimizer in ("sgd", "muon"):
        for task in ("text", "images"):
            yield Setting(task, "linear", optimizer=optimizer)
            for experts in ((16,), (256,)):
                for name in FEW:
                    yield Setting(task, name, experts, "cp", optimizer=optimizer)


def decays() -> Iterator[Setting]:
    """Text inside the linear layer's parameters."""
    for model in CONTROLS:
        yield Setting("text", model)
    for experts in ((16,), (8, 8)):
        for name in (*FEW, "low rank"):
            yield Setting("text", name, experts, "cp", total=True)


STAGES = {"screen": screen, "confirm": confirm, "optimizers": optimizers, "decays": decays}


def tuned(
    runs: Runs,
    setting: Setting,
    decays: tuple[float, ...] = (DECAY,),
    seeds: tuple[int, ...] = TUNED,
) -> Setting:
    """The setting with the rate and the weight decay that are best on held-out data."""

    def accuracy(tried: Setting) -> float:
        each = [replace(tried, seed=seed) for seed in seeds]
        return mean(runs.get(one, CANDIDATES.get(setting.model))["accuracy"] for one in each)

    grid = [
        replace(setting, rate=rate, decay=decay, held_out=True)
        for decay in decays
        for rate in RATES[setting.optimizer]
    ]
    return replace(max(grid, key=accuracy), held_out=False)


def quick() -> None:
    """Every candidate on scikit-learn's digits, one seed and rate."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
    pixels = ((images - images.mean()) / images.std()).float()
    parts = [(pixels[part], labels[part]) for part in (slice(1200), slice(1200, 1500))]
    digits = Task("digits", "images of 8 × 8", parts[0], parts[1], parts[1], 10, 1, batch=64)
    with TemporaryDirectory() as folder:
        runs = Runs(Path(folder) / "runs.jsonl", lambda name: digits)
        for model in (*CONTROLS, *CANDIDATES):
            experts, kind = ((16,), "cp") if model in CANDIDATES else ((), "")
            setting = Setting("digits", model, experts, kind, rate=0.01, held_out=False)
            runs.get(setting, CANDIDATES.get(model))
        print_tables(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", nargs="?", choices=(*STAGES, "table"), default="table")
    parser.add_argument("--quick", action="store_true", help="one small task, few steps")
    parser.add_argument("--out", type=Path, default=Path("out/gates"), help="data and runs")
    options = parser.parse_args()
    torch.set_num_threads(1)

    @cache
    def task(name: str) -> Task:
        return load_task(name, options.out)

    if options.quick:
        quick()
        return
    runs = Runs(options.out / "runs.jsonl", task)
    if options.stage in STAGES:
        for setting in STAGES[options.stage]():
            grid = (DECAYS, TUNED_DECAYS) if options.stage == "decays" else ((DECAY,), TUNED)
            best = tuned(runs, setting, *grid)
            for seed in SEEDS:
                runs.get(replace(best, seed=seed), CANDIDATES.get(setting.model))
        if options.stage == "screen":
            print_screen(runs, CANDIDATES)
            return
    print_tables(runs)


if __name__ == "__main__":
    main()
