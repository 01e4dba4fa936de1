"""Accuracy against the share of singular values that trained layers keep.

    python benchmarks/study_spectra.py
    python benchmarks/study_spectra.py table
    python benchmarks/study_spectra.py quick

Models are trained on three tasks: a residual block on frozen features of text, a GPT on characters,
and an MLP-Mixer on images. Then every linear layer of their MLP blocks, or every matrix of every
expert, is replaced by its truncated singular value decomposition, all to the same share of their
singular values, and the model is scored on test data again (Oldfield et al. 2024, appendix on
low-rank structure). Blocks are a dense MLP; experts in CP with the MLP's parameters, gate included;
and as wide experts that are not factorized, with eight times the parameters. Three seeds, and one
learning rate per task, that of the examples.

Runs are written to ``out/spectra.jsonl`` as they end, and a second call goes on from there;
``table`` prints what is there and draws ``out/spectra.svg``; ``quick`` trains a few steps. Needs
PyTorch, matplotlib, and the data of ``study_gates.py``, in ``out/gates``. One core is used, for
about a quarter of an hour.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _gates_tasks import load_task
from torch import Tensor, nn

from tensormoe import Gate
from tensormoe.analysis import RankCurve, rank_curve
from tensormoe_torch import MuMoE, MuMoEMLP

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import gpt_on_text as gpt
import mixer_on_images as mixer
from _comparison import images, text, training
from _comparison.variants import CP, DENSE, Variant, make_mlp

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out"
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
SEEDS = (1, 2, 3)
FULL = "dense experts"
# dense experts take the place of a dense model's MLPs
MODELS = {"MLP": DENSE, "μMoE, CP": CP, FULL: DENSE}
# experts that are not factorized: eight MLPs
EXPERTS = 8

Batches = Iterator[tuple[Tensor, Tensor]]


class Residual(nn.Module):
    """Features → features + block → classes.

    Args:
        features: of an input.
        hidden: size between the layers of the block.
        classes: number of classes.
        variant: what the block is.
        experts: their number, where they are factorized.
    """

    def __init__(
        self, features: int, hidden: int, classes: int, variant: Variant, experts: int
    ) -> None:
        super().__init__()
        self.head = nn.Linear(features, classes)
        self.norm = nn.LayerNorm(features)
        self.mlp = make_mlp(variant, features, hidden, experts, Gate())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x + self.mlp(self.norm(x)))
        return logits


@dataclass(frozen=True)
class Task:
    """A model to train.

    Args:
        build: an untrained model.
        batches: training data of a seed, without end or for all steps.
        recipe: of the training.
        score: of a model, on test data.
    """

    build: Callable[[Variant], nn.Module]
    batches: Callable[[int], Batches]
    recipe: training.Recipe
    score: Callable[[nn.Module], training.Score]


def text_task() -> Task:
    """Glosses of WordNet as frozen features: a residual block, and a head."""
    data = load_task("text", OUT / "gates")
    recipe = training.Recipe(data.steps, data.batch, 1e-2, scores=1)
    return Task(
        lambda variant: Residual(data.features, 256, data.classes, variant, 32),
        data.batches,
        recipe,
        lambda model: training.evaluate(model, *data.test, batch=1000),
    )


def image_task() -> Task:
    """The Mixer of the example."""
    found = images.load_images()
    recipe = replace(mixer.RECIPE, scores=1)
    task = mixer.make_task(found, mixer.FULL, recipe)
    return Task(task.build, task.batches, recipe, task.score)


def character_task() -> Task:
    """The GPT of the example, with two layers, a shorter context and fewer steps."""
    found = text.load_text()
    found = replace(found, test=found.test[:20_000])
    recipe = replace(gpt.RECIPE, steps=500, scores=1)
    task = gpt.make_task(found, replace(gpt.FULL, depth=2, context=64), recipe)
    return Task(task.build, task.batches, recipe, task.score)


TASKS: Mapping[str, Callable[[], Task]] = {
    "text": text_task,
    "characters": character_task,
    "images": image_task,
}


def whole(model: nn.Module) -> nn.Module:
    """A copy in which experts are stored as they are, so that each can be truncated."""
    model = deepcopy(model)
    for name, block in [*model.named_modules()]:
        if isinstance(block, MuMoEMLP):
            assert block.gate is not None
            count = block.first.spec.experts[0]
            sizes = block.first.spec.in_features, block.first.spec.out_features
            made = MuMoEMLP(*sizes, experts=count, factorization="dense", gate=block.gate.gate)
            made.gate = block.gate
            with torch.no_grad():
                for old, new in ((block.first, made.first), (block.second, made.second)):
                    weight, bias = old.materialize()
                    new.get_parameter("factors.weight").copy_(weight)
                    assert bias is not None
                    new.get_parameter("factors.bias").copy_(bias)
            model.set_submodule(name, made.train(block.training))
    return model


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The matrices of all MLP blocks by name, views of the model's own."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        # the MLPs are the only sequences in these models
        if isinstance(module, nn.Linear) and isinstance(
            model.get_submodule(name.rpartition(".")[0]), nn.Sequential
        ):
            found[name] = module.weight.detach()
        if isinstance(module, MuMoE):
            stack = module.get_parameter("factors.weight").detach()
            found |= {f"{name}.{expert}": each for expert, each in enumerate(stack)}
    return found


def curve(model: nn.Module, score: Callable[[nn.Module], training.Score]) -> RankCurve:
    """Accuracy of a model against the share of singular values that its blocks keep."""
    copy = whole(model).eval()
    held = matrices(copy)

    def accuracy(changed: Mapping[str, Tensor]) -> float:
        for name, matrix in held.items():
            matrix.copy_(changed[name])
        return score(copy).accuracy

    return rank_curve({name: each.clone() for name, each in held.items()}, accuracy, SHARES)


def run(task: Task, name: str, seed: int) -> dict[str, Any]:
    """Train a model with the blocks of a name, truncate them and score."""
    torch.manual_seed(seed)
    model = task.build(MODELS[name])
    if name == FULL:
        expanded(model)
    training.train(model, task.batches(seed), task.recipe, lambda _: _NONE, lambda _: None)
    untouched = task.score(model.eval()).accuracy
    return {"accuracy": untouched, "scores": curve(model, task.score).scores}


_NONE = training.Score(0.0, 0.0)


def expanded(model: nn.Module) -> None:
    """Put experts of an MLP's size in the place of every MLP of a dense model."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Sequential):
            rows, columns = module[0].in_features, module[0].out_features  # type: ignore[union-attr]
            gate = mixer.GATE if isinstance(model, mixer.Mixer) else Gate()
            block = MuMoEMLP(rows, columns, experts=EXPERTS, factorization="dense", gate=gate)  # type: ignore[arg-type]
            model.set_submodule(name, block)


class Runs:
    """Finished runs, a line each."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.known: dict[str, dict[str, Any]] = dict(map(json.loads, lines))

    def rows(self, train: bool) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
        """Task, model and the runs of all seeds; without training, those that are complete."""
        for name, load in TASKS.items():
            keys = {
                (model, seed): json.dumps([name, model, seed], ensure_ascii=False)
                for model in MODELS
                for seed in SEEDS
            }
            missing = [pair for pair, key in keys.items() if train and key not in self.known]
            task = load() if missing else None
            for model, seed in missing:
                assert task is not None
                found = run(task, model, seed)
                self.known[keys[model, seed]] = found
                with self.path.open("a", encoding="utf-8") as file:
                    line = json.dumps([keys[model, seed], found], ensure_ascii=False)
                    file.write(line + "\n")
                print(name, model, seed, found, file=sys.stderr, flush=True)
            for model in MODELS:
                seeds = [keys[model, seed] for seed in SEEDS]
                if all(key in self.known for key in seeds):
                    yield name, model, [self.known[key] for key in seeds]


def enough(scores: list[list[float]], within: float = 0.01) -> float:
    """The smallest share from which on all means are within a point of what all values give."""
    means = [mean(column) for column in zip(*scores, strict=True)]
    worse = [share for share, each in zip(SHARES, means, strict=True) if each < means[-1] - within]
    return min(share for share in SHARES if not worse or share > max(worse))


def table(rows: list[tuple[str, str, list[dict[str, Any]]]]) -> None:
    """Print accuracies, one row per task and model."""
    heads = [f"{100 * share:g} %" for share in SHARES[:-1]]
    print("| task | blocks | all values | " + " | ".join(heads) + " | enough |")
    print("| --- | --- |" + " ---: |" * (len(heads) + 2))
    for task, model, seeds in rows:
        scores = [[100 * score for score in each["scores"]] for each in seeds]
        full = [each[-1] for each in scores]
        cells = [task, model, f"{mean(full):.1f} ± {stdev(full):.1f}"]
        cells += [f"{mean(column):.1f}" for column in [*zip(*scores, strict=True)][:-1]]
        print("| " + " | ".join([*cells, f"{100 * enough(scores, 1.0):g} %"]) + " |")


def draw(rows: list[tuple[str, str, list[dict[str, Any]]]], path: Path) -> None:
    """Accuracy against the share, one chart per task."""
    from tensormoe.plotting import figure, plot_rank_curves

    with figure(path, width=9.4, height=3.2, transparent=True) as drawn:
        tasks = [*dict.fromkeys(task for task, _, _ in rows)]
        for axis, name in zip(drawn.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            curves = {
                model: [RankCurve(SHARES, tuple(100 * s for s in each["scores"])) for each in seeds]
                for task, model, seeds in rows
                if task == name
            }
            plot_rank_curves(axis, curves)
            axis.set_title(name)
            axis.set_ylabel("accuracy, %")
            axis.legend(fontsize=8)


def quick() -> None:
    """A few steps of a small model of each kind, and its curve."""
    found = text.load_text()
    recipe = training.Recipe(steps=8, batch=4, rate=3e-3, scores=1)
    small = replace(text.load_text(), test=found.test[:400])
    task = gpt.make_task(small, gpt.QUICK, recipe)
    made = Task(task.build, task.batches, recipe, task.score)
    for name in MODELS:
        seeds = [run(made, name, seed) for seed in SEEDS[:2]]
        table([("quick", name, seeds)])


def main() -> None:
    torch.set_num_threads(1)
    if "quick" in sys.argv:
        return quick()
    rows = [*Runs(OUT / "spectra.jsonl").rows("table" not in sys.argv)]
    table(rows)
    draw(rows, OUT / "spectra.svg")


if __name__ == "__main__":
    main()
