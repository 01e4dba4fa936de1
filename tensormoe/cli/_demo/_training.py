"""A small classifier around the layer that is replaced, trained with NumPy alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import cos, pi, sqrt
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from tensormoe.cli._demo._digits import CLASSES, PIXELS, Digits
from tensormoe_numpy import ACTIVATIONS, Adam, Gradients, MuMoE

NDArray = npt.NDArray[Any]
Arrays = dict[str, NDArray]

HIDDEN = 64
# chosen on a part of the training images; the same for every model
_BATCH, _RATE, _DECAY, _NOISE = 64, 3e-3, 0.1, 0.5
_GELU, _GELU_SLOPE = ACTIVATIONS["gelu"]


class Linear:
    """The layer that is replaced; starts like ``torch.nn.Linear``."""

    def __init__(self, in_features: int, out_features: int, rng: np.random.Generator) -> None:
        bound = 1.0 / sqrt(in_features)
        self.parameters: Arrays = {
            "weight": rng.uniform(-bound, bound, (in_features, out_features)).astype("float32"),
            "bias": rng.uniform(-bound, bound, out_features).astype("float32"),
        }

    def __call__(self, x: NDArray) -> NDArray:
        result: NDArray = x @ self.parameters["weight"] + self.parameters["bias"]
        return result

    def vjp(self, x: NDArray) -> tuple[NDArray, Callable[[NDArray], Gradients]]:
        """The output, and the backward pass to input and parameters."""

        def pull(cotangent: NDArray) -> Gradients:
            gradients = {"weight": x.T @ cotangent, "bias": cotangent.sum(axis=0)}
            return Gradients(cotangent @ self.parameters["weight"].T, gradients)

        return self(x), pull


class Classifier:
    """64 pixels → body → GELU → linear head → 10 classes.

    Args:
        body: a mixture of experts, or the linear layer.
        hidden: the size of the body's output.
        rng: draws the head.
    """

    def __init__(self, body: MuMoE | Linear, hidden: int, rng: np.random.Generator) -> None:
        self.body, self.head = body, Linear(hidden, CLASSES, rng)

    @property
    def parameters(self) -> Arrays:
        """Body and head by name, updated in place."""
        named = {f"body.{name}": value for name, value in self.body.parameters.items()}
        return named | {f"head.{name}": value for name, value in self.head.parameters.items()}

    def __call__(self, x: NDArray) -> NDArray:
        """The logits (images, 10)."""
        return self.behind(self.body(x))

    def behind(self, outputs: NDArray) -> NDArray:
        """The logits from the body's outputs."""
        return self.head(_GELU(outputs))

    def accuracy(self, x: NDArray, labels: NDArray) -> float:
        """The share of images whose class is told right."""
        return float(np.mean(self(x).argmax(axis=1) == labels))

    def loss(self, x: NDArray, labels: NDArray) -> tuple[float, Arrays]:
        """Mean cross entropy, and its gradient by every parameter."""
        before, pull_body = self.body.vjp(x)
        logits, pull_head = self.head.vjp(_GELU(before))
        rows = np.arange(len(labels))
        shifted = logits - logits.max(axis=1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        cotangent = np.exp(logs)
        cotangent[rows, labels] -= 1.0
        head = pull_head(cotangent / np.float32(len(labels)))
        assert head.input is not None
        body = pull_body(head.input * _GELU_SLOPE(before))
        named = {f"body.{name}": value for name, value in body.parameters.items()}
        named |= {f"head.{name}": value for name, value in head.parameters.items()}
        return float(-logs[rows, labels].mean()), named


@dataclass
class History:
    """Record of training, epoch by epoch.

    Args:
        losses: mean training loss.
        accuracies: on the test images, for the picture alone: nothing is chosen by them.
        seconds: that training took.
    """

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train(
    model: Classifier,
    digits: Digits,
    epochs: int,
    rng: np.random.Generator,
    report: Callable[[float, float], None],
) -> History:
    """Train with Adam, a cosine schedule and noise on the pixels, the same for every model.

    Args:
        model: updated in place.
        digits: the images.
        epochs: passes over the training images.
        rng: shuffles them.
        report: called after every epoch with loss and test accuracy.
    """
    history = History()
    adam = Adam(model.parameters, weight_decay=_DECAY)
    count = len(digits.train_labels)
    batches = -(-count // _BATCH)
    for epoch in range(epochs):
        start = perf_counter()
        order, losses = rng.permutation(count), []
        for step in range(batches):
            picked = order[step * _BATCH : (step + 1) * _BATCH]
            noise = rng.standard_normal((len(picked), PIXELS), dtype="float32")
            images = digits.train[picked] + np.float32(_NOISE) * noise
            loss, gradients = model.loss(images, digits.train_labels[picked])
            done = (epoch * batches + step) / (epochs * batches)
            adam.lr = _RATE * 0.5 * (1.0 + cos(pi * done))
            adam.step(gradients)
            losses.append(loss)
        history.seconds += perf_counter() - start
        history.losses.append(float(np.mean(losses)))
        history.accuracies.append(model.accuracy(digits.test, digits.test_labels))
        report(history.losses[-1], history.accuracies[-1])
    return history
