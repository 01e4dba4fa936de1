"""Proof that the factorized layer computes what its unfactorized experts compute."""

from __future__ import annotations

from string import ascii_lowercase
from typing import Any

import numpy as np
import numpy.typing as npt

from tensormoe_numpy import MuMoE

NDArray = npt.NDArray[Any]


def largest_error(layer: MuMoE, x: NDArray) -> float:
    """The largest difference from 𝒲 itself, relative to the largest output, in float64.

    𝒲 is built explicitly and contracted by a plain einsum, with the layer's own coefficients.
    """
    wide = {name: value.astype("float64") for name, value in layer.parameters.items()}
    exact = MuMoE.restore(layer.config, wide)
    images = x.astype("float64")
    weights, biases = exact.materialize()
    coefficients = exact.coefficients(images)
    modes = ascii_lowercase[: len(coefficients)]
    inputs = ",".join(f"z{mode}" for mode in modes)
    expected = np.einsum(
        f"{inputs},{modes}xy,zx->zy", *coefficients, weights, images, optimize=True
    )
    if biases is not None:
        expected += np.einsum(f"{inputs},{modes}y->zy", *coefficients, biases, optimize=True)
    return float(np.abs(exact(images) - expected).max() / np.abs(expected).max())


def routing(layer: MuMoE, x: NDArray, labels: NDArray, classes: int) -> NDArray:
    """The mean coefficient (classes, experts) that images of a class give every expert.

    Experts are sorted by the class that they serve most, and unused ones come last.
    """
    levels = layer.coefficients(x)
    joint = levels[0]
    for level in levels[1:]:
        joint = (joint[:, :, None] * level[:, None, :]).reshape(len(x), -1)
    table = np.stack([joint[labels == each].mean(axis=0) for each in range(classes)])
    peak = table.max(axis=0)
    order = np.lexsort((-peak, np.where(peak > 1e-3, table.argmax(axis=0), classes)))
    result: NDArray = table[:, order]
    return result
