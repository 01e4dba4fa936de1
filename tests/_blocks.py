"""What a block is: two mixtures with the coefficients of one gate, a function between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tensormoe.testing import reference_output

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
}


def block_output(
    name: str, layers: Sequence[Any], made: Sequence[np.ndarray], x: np.ndarray
) -> np.ndarray:
    """The output of layers by their weights and biases, ``made`` being the coefficients."""
    first, second = (np.concatenate([w, b[..., None, :]], axis=-2) for w, b in layers)
    middle = reference_output(first, made, x)
    middle = np.vectorize(ACTIVATIONS[name], otypes=[float])(middle)
    return reference_output(second, made, middle)
