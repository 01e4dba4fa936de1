"""Parts that all four runs share: images, batches, learning rates and initial values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

__all__ = ["Batch", "Result", "Task", "make_task"]

NDArray = npt.NDArray[Any]

PIXELS, CLASSES = 64, 10
BATCH, RATE, DECAY, NOISE = 64, 3e-3, 0.1, 0.5


@dataclass(frozen=True)
class Batch:
    """One step: images (64, 64), their digits, and the learning rate."""

    images: NDArray
    labels: NDArray
    rate: float


@dataclass(frozen=True)
class Task:
    """A classifier of handwritten digits: a checkpointed mixture, GELU, and a linear head.

    Args:
        checkpoint: of the mixture 64 → 64.
        weight: the head's, (64, 10).
        bias: the head's, (10,).
        batches: in the order of training; every library gets the same.
        test: images that no training sees.
        test_labels: their digits.
    """

    checkpoint: Path
    weight: NDArray
    bias: NDArray
    batches: tuple[Batch, ...]
    test: NDArray
    test_labels: NDArray

    def accuracy(self, logits: Any) -> float:
        """The share of test images whose digit is told right."""
        return float(np.mean(np.asarray(logits).argmax(axis=1) == self.test_labels))


@dataclass(frozen=True)
class Result:
    """Results of a run.

    Args:
        losses: mean cross entropy of every batch, before its step.
        accuracy: on the test images.
        seconds: of training.
    """

    losses: tuple[float, ...]
    accuracy: float
    seconds: float


def make_task(checkpoint: Path, epochs: int, dtype: str) -> Task:
    """The task in a dtype; the same values in every dtype, up to rounding."""
    images, labels = load_digits(return_X_y=True)
    split: Any = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train, test, train_labels, test_labels = split
    mean = train.mean(axis=0)
    # pixels of the margin hardly ever vary: their noise is not blown up
    scale = np.maximum(train.std(axis=0), 1.0)
    train, test = (train - mean) / scale, (test - mean) / scale
    rng = np.random.default_rng(0)
    bound = 1.0 / sqrt(PIXELS)
    return Task(
        checkpoint,
        rng.uniform(-bound, bound, (PIXELS, CLASSES)).astype(dtype),
        rng.uniform(-bound, bound, CLASSES).astype(dtype),
        tuple(_batches(train, train_labels, epochs, dtype)),
        test.astype(dtype),
        test_labels,
    )


def _batches(train: NDArray, labels: NDArray, epochs: int, dtype: str) -> Iterator[Batch]:
    """Whole batches only, so that a compiler sees one shape."""
    rng = np.random.default_rng(1)
    count = len(labels) // BATCH
    for epoch in range(epochs):
        order = rng.permutation(len(labels))
        for step in range(count):
            picked = order[step * BATCH : (step + 1) * BATCH]
            noisy = train[picked] + NOISE * rng.standard_normal((BATCH, PIXELS))
            done = (epoch * count + step) / (epochs * count)
            yield Batch(noisy.astype(dtype), labels[picked], RATE * 0.5 * (1.0 + cos(pi * done)))
