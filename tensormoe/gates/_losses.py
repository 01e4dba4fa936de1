"""Losses of routing: pure functions of coefficients and logits, with their gradients.

Each takes one level's array, or a list or tuple of all levels', over which it sums. Gradients then
are a tuple with one array per level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensormoe.backend import Array, Backend, device_of
from tensormoe.errors import GateError
from tensormoe.gates._top_k import TopK
from tensormoe.gates._weights import (
    Experts,
    Given,
    Weights,
    as_weights,
    counts,
    gradients,
    summed,
)


def _share(weights: Weights, chosen: Array | TopK | None) -> Array:
    """Share of the choices that fall on each expert."""
    backend, experts = weights.backend, weights.matrix.shape[-1]
    xp = backend.namespace
    if chosen is None:
        matrix = backend.stop_gradient(weights.matrix)
        first = xp.argmax(matrix, axis=-1, keepdims=True)
        columns = xp.arange(experts, device=device_of(matrix))[None, :]
        return xp.mean(xp.astype(first == columns, matrix.dtype), axis=0)
    made = as_weights(chosen, experts, "chosen")
    if made.matrix.shape[0] != weights.matrix.shape[0]:
        raise GateError(
            f"chosen must be of the same tokens, {weights.matrix.shape[0]}; got "
            f"{made.matrix.shape[0]}. Pass results of one call."
        )
    each = xp.astype(counts(made), weights.matrix.dtype)
    return each / xp.sum(each)


def load_balance_loss(
    coefficients: Given, chosen: Given | None = None, *, experts: Experts = None
) -> Array:
    """Imbalance of the experts' use: N Σₙ fₙ Pₙ (Fedus, Zoph & Shazeer 2022, eq. 4).

    Pₙ is the mean coefficient of expert n, and fₙ the share of tokens whose largest coefficient is
    expert n's (the first of equals). Only P is differentiated. The loss is 1 where both are
    uniform, and N where all tokens use one expert alone.

    For top-k gates, the papers take P before the cut and f after it (GShard; Switch Transformers):
    pass the router's probabilities, ``activate(gate.uncut, logits).coefficients``, and as
    ``chosen`` the gate's coefficients. fₙ then is the share of all choices that fall on expert n, a
    k-th of the share of tokens that choose it, so that the loss is 1 where all are uniform for any
    k. (Some libraries leave out the division by k, and are k times as large.)

    Args:
        coefficients: (..., experts) with rows that sum to one, at least one token; a ``TopK`` with
            ``experts``; or a list or tuple with one of these per level. Divide those of a
            "relu_top_k" gate by their sums first.
        chosen: coefficients of the same tokens, which are not zero where an expert was chosen.
        experts: number of experts, for a ``TopK``; one per level for a list of them.

    Returns:
        A scalar, in float32 at least; the sum over levels.

    Raises:
        GateError: no tokens, no experts, no floating point, or ``chosen`` of other tokens.

    Example:
        >>> import numpy as np
        >>> float(load_balance_loss(np.array([[1.0, 0.0], [0.0, 1.0]])))
        1.0
        >>> float(load_balance_loss(np.array([[1.0, 0.0], [1.0, 0.0]])))
        2.0
        >>> probabilities = np.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
        >>> chosen = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
        >>> float(load_balance_loss(probabilities, chosen))
        1.5
    """
    return summed(_load_balance, coefficients, chosen, experts)


def load_balance_loss_vjp(
    coefficients: Given,
    cotangent: Array | float = 1.0,
    *,
    chosen: Given | None = None,
    experts: Experts = None,
) -> Any:
    """The gradient of :func:`load_balance_loss` times ``cotangent``, of the coefficients' shape.

    >>> import numpy as np
    >>> load_balance_loss_vjp(np.array([[1.0, 0.0], [1.0, 0.0]]))
    array([[1., 0.],
           [1., 0.]])
    """

    def one(given: Array | TopK, of: Array | TopK | None, number: int | None) -> Array:
        weights = as_weights(given, number)
        tokens, count = weights.matrix.shape
        return _each_token(weights, _share(weights, of) * (count / tokens) * cotangent)

    return gradients(one, coefficients, chosen, experts)


def _load_balance(given: Array | TopK, chosen: Array | TopK | None, experts: int | None) -> Array:
    weights = as_weights(given, experts)
    xp = weights.backend.namespace
    mean = xp.mean(weights.matrix, axis=0)
    return xp.sum(_share(weights, chosen) * mean) * float(weights.matrix.shape[-1])


def importance_loss(coefficients: Given, *, experts: Experts = None) -> Array:
    """Squared coefficient of variation of the experts' importance (Shazeer et al. 2017, eq. 7).

    An expert's importance is the sum of its coefficients over all tokens. The loss is their
    variance over their squared mean: 0 where they are equal, and N - 1 where all tokens use one
    expert alone.

    Args:
        coefficients: as for :func:`load_balance_loss`.
        experts: as for :func:`load_balance_loss`.

    Returns:
        A scalar, in float32 at least; the sum over levels.

    Raises:
        GateError: no tokens, no experts, or no floating point.

    Example:
        >>> import numpy as np
        >>> float(importance_loss(np.array([[1.0, 0.0], [0.0, 1.0]])))
        0.0
        >>> float(importance_loss(np.array([[1.0, 0.0], [1.0, 0.0]])))
        1.0
    """
    return summed(_importance, coefficients, experts)


def _importance(given: Array | TopK, experts: int | None) -> Array:
    weights = as_weights(given, experts)
    xp = weights.backend.namespace
    importance = xp.mean(weights.matrix, axis=0)
    mean = xp.mean(importance)
    away = (importance - mean) / mean
    return xp.mean(away * away)


def importance_loss_vjp(
    coefficients: Given, cotangent: Array | float = 1.0, *, experts: Experts = None
) -> Any:
    """The gradient of :func:`importance_loss` times ``cotangent``, of the coefficients' shape.

    >>> import numpy as np
    >>> importance_loss_vjp(np.array([[1.0, 0.0], [1.0, 0.0]]))
    array([[ 0., -2.],
           [ 0., -2.]])
    """

    def one(given: Array | TopK, number: int | None) -> Array:
        weights = as_weights(given, number)
        xp = weights.backend.namespace
        tokens, count = weights.matrix.shape
        importance = xp.mean(weights.matrix, axis=0)
        mean = xp.mean(importance)
        # the loss is mean(I²) / mean(I)² - 1
        ratio = xp.mean(importance * importance) / mean
        slope = (importance - ratio) / (mean * mean) * (2.0 / (count * tokens)) * cotangent
        return _each_token(weights, slope)

    return gradients(one, coefficients, experts)


def z_loss(logits: Array | Sequence[Array]) -> Array:
    """Size of the logits: the mean over tokens of (log Σₙ exp xₙ)² (Zoph et al. 2022, eq. 5).

    It keeps the logits of a router small, where rounding matters least; 0.001 is the usual weight.
    A gate with normalization rescales its logits anyway.

    Args:
        logits: (..., experts), at least one token; or a list or tuple with one array per level.
            Experts of logit -inf do not count.

    Returns:
        A scalar, in float32 at least; the sum over levels.

    Raises:
        GateError: no tokens, no experts, or no floating point.

    Example:
        >>> import numpy as np
        >>> round(float(z_loss(np.array([[0.0, 0.0], [1.0, 1.0]]))), 4)
        1.6736
    """
    return summed(_z_loss, logits)


def _z_loss(logits: Array) -> Array:
    weights = as_weights(logits, name="logits")
    xp = weights.backend.namespace
    _, total = _log_sum(weights.backend, weights.matrix)
    return xp.mean(total * total)


def z_loss_vjp(logits: Array | Sequence[Array], cotangent: Array | float = 1.0) -> Any:
    """The gradient of :func:`z_loss` times ``cotangent``, of the logits' shape.

    >>> import numpy as np
    >>> z_loss_vjp(np.array([[0.0, 0.0]])).round(4)
    array([[0.6931, 0.6931]])
    """

    def one(given: Array) -> Array:
        weights = as_weights(given, name="logits")
        shares, total = _log_sum(weights.backend, weights.matrix)
        return weights.restore(shares * total * (2.0 / weights.matrix.shape[0]) * cotangent)

    return gradients(one, logits)


def _log_sum(backend: Backend, logits: Array) -> tuple[Array, Array]:
    """The softmax of each row, and (rows, 1) logarithms of the sums of the exponentials."""
    xp = backend.namespace
    top = backend.stop_gradient(xp.max(logits, axis=-1, keepdims=True))
    powers = xp.exp(logits - top)
    total = xp.sum(powers, axis=-1, keepdims=True)
    return powers / total, xp.log(total) + top


def _each_token(weights: Weights, slope: Array) -> Array:
    """A gradient (experts,) that is the same for every token, in the caller's layout."""
    row = weights.backend.reshape(slope, (1, weights.matrix.shape[-1]))
    return weights.restore(row + weights.backend.namespace.zeros_like(weights.matrix))
