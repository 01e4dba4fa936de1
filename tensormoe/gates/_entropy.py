"""Entropy of routing, as a measure and as a loss."""

from __future__ import annotations

from typing import Any

from tensormoe.backend import Array
from tensormoe.gates._top_k import TopK
from tensormoe.gates._weights import Given, Weights, as_weights, gradients, summed


def _listed(coefficients: Array | TopK) -> Weights:
    """Coefficients as they are: those that a ``TopK`` leaves out have no entropy."""
    return as_weights(coefficients.values if isinstance(coefficients, TopK) else coefficients)


def _logs(weights: Weights) -> tuple[Array, Array]:
    """Places where coefficients are used, and their logarithms there."""
    xp = weights.backend.namespace
    used = ~(weights.matrix <= 0.0)  # NaN as well, which stays NaN
    return used, xp.log(xp.where(used, weights.matrix, xp.ones_like(weights.matrix)))


def entropy(coefficients: Array | TopK) -> Array:
    """The entropy of each token's coefficients in nats, -Σ a log a with 0 log 0 = 0.

    Args:
        coefficients: (..., experts), or a ``TopK``.

    Returns:
        (...), from 0 for one expert alone to log N for all alike.

    Raises:
        GateError: no tokens, no experts, or no floating point.

    Example:
        >>> import numpy as np
        >>> entropy(np.array([[1.0, 0.0], [0.5, 0.5]])).round(4)
        array([0.    , 0.6931])
    """
    weights = _listed(coefficients)
    xp = weights.backend.namespace
    _, logs = _logs(weights)
    total = -xp.sum(weights.matrix * logs, axis=-1) + 0.0
    return weights.backend.reshape(total, weights.shape[:-1])


def entropy_loss(coefficients: Given) -> Array:
    """The mean of :func:`entropy` over all tokens: a scalar that is smaller for sparser routing.

    Of a list or tuple of levels it is the sum over levels.

    >>> import numpy as np
    >>> round(float(entropy_loss(np.array([[1.0, 0.0], [0.5, 0.5]]))), 4)
    0.3466
    """

    def one(given: Array | TopK) -> Array:
        return _listed(given).backend.namespace.mean(entropy(given))

    return summed(one, coefficients)


def entropy_loss_vjp(coefficients: Given, cotangent: Array | float = 1.0) -> Any:
    """The gradient of :func:`entropy_loss` times ``cotangent``, of the coefficients' shape.

    It is -(1 + log a) / tokens where a > 0; unused experts, whose slope is infinite, get 0: they
    can't change under the activations that leave experts unused.
    """

    def one(given: Array | TopK) -> Array:
        weights = _listed(given)
        xp = weights.backend.namespace
        used, logs = _logs(weights)
        slope = (1.0 + logs) * (-1.0 / weights.matrix.shape[0])
        return weights.restore(xp.where(used, slope, xp.zeros_like(logs)) * cotangent)

    return gradients(one, coefficients)
