"""The run on NumPy alone: the layer's own gradients, and Adam as it comes with the layers."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from _four_libraries.task import DECAY, Result, Task
from tensormoe_numpy import ACTIVATIONS, Adam, MuMoE

__all__ = ["run"]

NDArray = npt.NDArray[Any]
_GELU, _SLOPE = ACTIVATIONS["gelu"]


def run(task: Task) -> Result:
    body = MuMoE.load(task.checkpoint)
    weight, bias = task.weight.copy(), task.bias.copy()
    adam = Adam({**body.parameters, "weight": weight, "bias": bias}, weight_decay=DECAY)
    losses = []
    start = perf_counter()
    for batch in task.batches:
        before, pull = body.vjp(batch.images)
        hidden = _GELU(before)
        loss, cotangent = _cross_entropy(hidden @ weight + bias, batch.labels)
        gradients = pull((cotangent @ weight.T) * _SLOPE(before)).parameters
        gradients |= {"weight": hidden.T @ cotangent, "bias": cotangent.sum(axis=0)}
        adam.lr = batch.rate
        adam.step(gradients)
        losses.append(loss)
    seconds = perf_counter() - start
    logits = _GELU(body(task.test)) @ weight + bias
    return Result(tuple(losses), task.accuracy(logits), seconds)


def _cross_entropy(logits: NDArray, labels: NDArray) -> tuple[float, NDArray]:
    """The mean, and its gradient by the logits."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    gradient = np.exp(logs)
    gradient[rows, labels] -= 1.0
    gradient /= len(labels)
    return float(-logs[rows, labels].mean()), gradient
