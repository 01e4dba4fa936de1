"""Losses and measures of routing: pure functions of the coefficients."""

from __future__ import annotations

from math import prod

from tensormoe.backend import Array, Backend, backend_of, default_integer, device_of
from tensormoe.errors import GateError


def _matrix(coefficients: Array) -> tuple[Backend, Array]:
    backend = backend_of(coefficients)
    xp = backend.namespace
    if not xp.isdtype(coefficients.dtype, "real floating"):
        raise GateError(
            f"coefficients must be real floating point; got dtype {coefficients.dtype}. Pass what "
            "a gate returned."
        )
    shape = tuple(coefficients.shape)
    if not shape or 0 in shape:
        raise GateError(
            f"coefficients must have at least one token and one expert; got shape {shape}. Skip "
            "empty batches."
        )
    if xp.finfo(coefficients.dtype).bits < 32:
        coefficients = xp.astype(coefficients, xp.float32)
    return backend, backend.reshape(coefficients, (prod(shape[:-1]), shape[-1]))


def _share(backend: Backend, weights: Array) -> Array:
    xp = backend.namespace
    first = xp.argmax(backend.stop_gradient(weights), axis=-1, keepdims=True)
    hits = xp.astype(
        first == xp.arange(weights.shape[-1], device=device_of(weights))[None, :], weights.dtype
    )
    return xp.mean(hits, axis=0)


def load_balance_loss(coefficients: Array) -> Array:
    """Imbalance of the experts' use: N Σₙ fₙ Pₙ (Fedus, Zoph & Shazeer 2022, eq. 4).

    fₙ is the share of tokens whose largest coefficient is expert n's (the first of equals) and Pₙ
    the mean coefficient of expert n. Only P is differentiated. The loss is 1 where both are
    uniform, and N where all tokens use one expert alone.

    Args:
        coefficients: (..., experts) with rows that sum to one, at least one token; as for
            :func:`entropy`.

    Returns:
        A scalar, in float32 at least.

    Raises:
        GateError: no tokens, no experts, or no floating point.

    Example:
        >>> import numpy as np
        >>> float(load_balance_loss(np.array([[1.0, 0.0], [0.0, 1.0]])))
        1.0
        >>> float(load_balance_loss(np.array([[1.0, 0.0], [1.0, 0.0]])))
        2.0
    """
    backend, weights = _matrix(coefficients)
    xp = backend.namespace
    mean = xp.mean(weights, axis=0)
    return xp.sum(_share(backend, weights) * mean) * float(weights.shape[-1])


def load_balance_loss_vjp(coefficients: Array, cotangent: Array | float = 1.0) -> Array:
    """The gradient of :func:`load_balance_loss` times ``cotangent``, of the coefficients' shape.

    >>> import numpy as np
    >>> load_balance_loss_vjp(np.array([[1.0, 0.0], [1.0, 0.0]]))
    array([[1., 0.],
           [1., 0.]])
    """
    backend, weights = _matrix(coefficients)
    tokens, experts = weights.shape
    slope = _share(backend, weights) * (experts / tokens) * cotangent
    row = backend.reshape(slope, (1,) * (coefficients.ndim - 1) + (experts,))
    return row + backend.namespace.zeros_like(backend.reshape(weights, tuple(coefficients.shape)))


def entropy(coefficients: Array) -> Array:
    """The entropy of each token's coefficients in nats, -Σ a log a with 0 log 0 = 0.

    Args:
        coefficients: (..., experts) with rows that sum to one. Divide those of a "relu_top_k"
            gate by their sums first.

    Returns:
        (...), from 0 for one expert alone to log N for all alike.

    Raises:
        GateError: no tokens, no experts, or no floating point.

    Example:
        >>> import numpy as np
        >>> entropy(np.array([[1.0, 0.0], [0.5, 0.5]])).round(4)
        array([0.    , 0.6931])
    """
    backend, weights = _matrix(coefficients)
    xp = backend.namespace
    used = ~(weights <= 0.0)  # NaN as well, which stays NaN
    logs = xp.log(xp.where(used, weights, xp.ones_like(weights)))
    return backend.reshape(-xp.sum(weights * logs, axis=-1) + 0.0, tuple(coefficients.shape[:-1]))


def entropy_loss(coefficients: Array) -> Array:
    """The mean of :func:`entropy` over all tokens: a scalar that is smaller for sparser routing.

    >>> import numpy as np
    >>> round(float(entropy_loss(np.array([[1.0, 0.0], [0.5, 0.5]]))), 4)
    0.3466
    """
    return backend_of(coefficients).namespace.mean(entropy(coefficients))


def entropy_loss_vjp(coefficients: Array, cotangent: Array | float = 1.0) -> Array:
    """The gradient of :func:`entropy_loss` times ``cotangent``, of the coefficients' shape.

    It is -(1 + log a) / tokens where a > 0; unused experts, whose slope is infinite, get 0: they
    can't change under the activations that leave experts unused.
    """
    backend, weights = _matrix(coefficients)
    xp = backend.namespace
    used = ~(weights <= 0.0)  # NaN as well, which stays NaN
    logs = xp.log(xp.where(used, weights, xp.ones_like(weights)))
    slope = xp.where(used, (1.0 + logs) * (-1.0 / weights.shape[0]), xp.zeros_like(logs))
    return backend.reshape(slope * cotangent, tuple(coefficients.shape))


def expert_load(coefficients: Array, threshold: float = 0.5) -> Array:
    """Tokens that give each expert at least ``threshold`` (Oldfield et al. 2024, section 4.1).

    Args:
        coefficients: (..., experts).
        threshold: the smallest coefficient that counts, in (0, 1].

    Returns:
        (experts,) integers.

    Raises:
        GateError: ``threshold`` is out of range, or as in :func:`entropy`.

    Example:
        >>> import numpy as np
        >>> expert_load(np.array([[0.75, 0.25], [0.5, 0.5], [0.4, 0.6]]))
        array([2, 2])
    """
    if (
        isinstance(threshold, bool)
        or not isinstance(threshold, int | float)
        or not (0 < threshold <= 1)
    ):
        raise GateError(f"threshold must be in (0, 1]; got {threshold!r}. Use 0.5.")
    backend, weights = _matrix(coefficients)
    xp = backend.namespace
    return xp.sum(xp.astype(weights >= threshold, default_integer(xp)), axis=0)
