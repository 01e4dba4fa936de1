"""One training run, the same for every variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import cos, pi
from time import process_time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe_torch import parameter_groups

__all__ = ["Recipe", "Run", "Score", "evaluate", "train"]


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up over a tenth of the steps, then a cosine down to zero.

    Args:
        steps: updates.
        batch: images or windows of text per step.
        rate: the highest learning rate.
        decay: weight decay of those parameters that start around zero.
        scores: how often the model is scored, evenly over the steps, the last one included.
    """

    steps: int
    batch: int
    rate: float
    decay: float = 0.05
    scores: int = 6


@dataclass(frozen=True)
class Score:
    """Mean cross entropy in nats and share of right guesses, on data that is not trained on."""

    loss: float
    accuracy: float


@dataclass
class Run:
    """Results of one run.

    Args:
        losses: of every step's batch.
        places: the steps after which the model was scored.
        scores: one for each place.
        seconds: CPU time of the training steps, over all threads.
    """

    losses: list[float] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    seconds: float = 0.0


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    recipe: Recipe,
    score: Callable[[nn.Module], Score],
    report: Callable[[Run], None],
) -> Run:
    """Train a model in place.

    Args:
        model: inputs → logits (…, classes).
        batches: inputs with labels (…).
        recipe: how.
        score: of the model, in evaluation mode.
        report: called after every step.
    """
    run = Run()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.decay), lr=recipe.rate, betas=(0.9, 0.98)
    )
    warm = max(recipe.steps // 10, 1)
    places = {round(recipe.steps * (k + 1) / recipe.scores) for k in range(recipe.scores)}
    model.train()
    for step in range(recipe.steps):
        start = process_time()
        inputs, labels = next(batches)
        rest = (step - warm) / max(recipe.steps - warm, 1)
        share = (step + 1) / warm if step < warm else 0.5 + 0.5 * cos(pi * rest)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * share
        loss = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.losses.append(loss.item())
        run.seconds += process_time() - start
        if step + 1 in places:
            model.eval()
            run.places.append(step + 1)
            run.scores.append(score(model))
            model.train()
        report(run)
    return run


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, labels: Tensor, batch: int) -> Score:
    """Score a model on all of ``inputs``, a batch at a time."""
    loss, right = 0.0, 0
    for some, wanted in zip(inputs.split(batch), labels.split(batch), strict=True):
        logits, flat = model(some).flatten(0, -2), wanted.flatten()
        loss += F.cross_entropy(logits, flat, reduction="sum").item()
        right += int((logits.argmax(-1) == flat).sum())
    return Score(loss / labels.numel(), right / labels.numel())
