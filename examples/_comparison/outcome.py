"""Tasks and their results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from _comparison.training import Recipe, Run, Score
from _comparison.variants import Variant, flops, ranks

__all__ = ["Model", "Outcome", "Task", "parameters", "seen"]


class Model(nn.Module, ABC):
    """A model that names its MLP blocks."""

    @abstractmethod
    def mlps(self, batch: int) -> list[tuple[nn.Module, int]]:
        """Every block with the number of inputs that it gets from ``batch`` samples."""


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name: of the files that are written.
        data: the training data, in words.
        figure: the one that counts, a field of :class:`Score`: "accuracy" or "loss".
        tokens: tokens a sample.
        build: an untrained model.
        batches: training data of a seed.
        score: of a model, on data that is not trained on.
        explore: write a page on what the experts of a trained model do.
    """

    name: str
    data: str
    figure: str
    tokens: int
    build: Callable[[Variant], Model]
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]]
    score: Callable[[nn.Module], Score]
    explore: Callable[[nn.Module, Path], object]


@dataclass
class Outcome:
    """A variant, its cost and its results.

    Args:
        name: of the variant.
        parameters: of the whole model.
        mlp_parameters: of its MLP blocks, gates included.
        flops: of the MLP blocks for one token, forward, gates included.
        ranks: of the blocks in words, each once.
        runs: one per seed.
    """

    name: str
    parameters: int
    mlp_parameters: int
    flops: float
    ranks: list[str]
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def of(cls, variant: Variant, task: Task, recipe: Recipe) -> Outcome:
        """A variant before training."""
        model = task.build(variant)
        blocks = model.mlps(recipe.batch)
        work = sum(flops(block, rows) for block, rows in blocks)
        return cls(
            variant.name,
            parameters(model),
            sum(parameters(block) for block, _ in blocks),
            work / (recipe.batch * task.tokens),
            list(dict.fromkeys(filter(None, (ranks(block) for block, _ in blocks)))),
        )

    def finals(self, figure: str) -> list[float]:
        """A figure at the end of training, one per run."""
        return [float(getattr(run.scores[-1], figure)) for run in self.runs]

    @property
    def seconds(self) -> float:
        """CPU seconds of training, mean of the runs."""
        return mean(run.seconds for run in self.runs)


@torch.no_grad()
def seen(model: nn.Module, gate: nn.Module, inputs: Tensor) -> Tensor:
    """Coefficients (..., N) that a gate inside a model makes for the model's inputs."""
    found: list[Tensor] = []
    handle = gate.register_forward_hook(lambda module, given, made: found.append(made[0]))
    model.eval()(inputs)
    handle.remove()
    return found[0]


def parameters(model: nn.Module) -> int:
    """Trainable entries."""
    return sum(parameter.numel() for parameter in model.parameters())
