"""The activations as plain functions, on arrays of any library."""

from __future__ import annotations

from math import isfinite

from tensormoe.backend import Array, Backend
from tensormoe.errors import GateError
from tensormoe.gates._normalization import LayerNorm, Shifted, Standardize, keep_nan, shift
from tensormoe.gates._passes import entmax15_of_one_row, entmax15_of_rows
from tensormoe.gates._rows import as_rows, map_rows
from tensormoe.gates._threshold import entmax as _entmax


def check_alpha(alpha: object) -> float:
    """``alpha`` as a float of at least 1."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise GateError(f"alpha must be a number; got {alpha!r}. Use 1.5 for the usual entmax.")
    if not (alpha >= 1 and isfinite(alpha)):
        raise GateError(
            f"alpha must be finite and at least 1; got {alpha}. Use 1 for softmax, 1.5 for the "
            "usual entmax, 2 for sparsemax."
        )
    return float(alpha)


def entmax_block(
    backend: Backend,
    values: Array,
    mask: Array | None,
    first_row: int,
    how: Standardize,
    alpha: float,
) -> Array:
    """Standardize a (rows, experts) block and apply entmax; softmax for ``alpha`` = 1."""
    if values.shape[0] == 0:
        return values
    if isinstance(how, LayerNorm) and alpha == 1.5 and mask is None and backend.eager:
        usual = entmax15_of_one_row(backend, values, how) if values.shape[0] == 1 else None
        if usual is None:
            usual = entmax15_of_rows(backend, values, how)
        if usual is not None:
            return usual
    factor = alpha - 1.0 if alpha > 1.0 else 1.0
    shifted = shift(backend, values, mask, first_row, how, factor)
    if alpha == 1.0:
        return keep_nan(backend, shifted, _softmax(backend, shifted))
    weights = _entmax(backend, shifted.values, alpha)
    if shifted.usable is not None:
        # a row without experts may not have been refused
        xp = backend.namespace
        weights = xp.where(shifted.usable, weights, xp.zeros_like(weights))
    return keep_nan(backend, shifted, weights)


def _softmax(backend: Backend, shifted: Shifted) -> Array:
    xp = backend.namespace
    weights = xp.exp(shifted.values)
    if shifted.usable is not None:
        weights = xp.where(shifted.usable, weights, xp.zeros_like(weights))
    total = backend.row_sums(weights)
    if not backend.checks_values:
        total = xp.where(total > 0.0, total, xp.ones_like(total))
    return weights / total


def entmax(logits: Array, alpha: float = 1.5, axis: int = -1, mask: Array | None = None) -> Array:
    """Sparse coefficients: the α-entmax of Peters, Niculae & Martins 2019, eq. 10.

    The coefficients are [(α-1) x - τ]₊^(1/(α-1)) with the τ at which they sum to one; α = 1 is
    softmax, 2 is sparsemax. μMoE layers use 1.5 (Oldfield et al. 2024, eq. 1). For α = 1.5 they
    are within 1e-6 (float32) and 1e-12 (float64) of the exact ones for up to 100,000 experts. For
    α > 2 a coefficient near the edge of its support has an unbounded slope, and is only as precise
    as its logit.

    Args:
        logits: any shape, real floating point. Narrower types than float32 are computed, and
            returned, in float32. Logits of -inf exclude their expert; of +inf, share all the mass
            equally.
        alpha: at least 1.
        axis: the axis of the experts.
        mask: booleans that broadcast to ``logits``, true where an expert may be used. Masked
            logits are ignored, whatever they hold, and their coefficients are exactly 0.

    Returns:
        Coefficients of the logits' shape, non-negative, summing to one along ``axis``.

    Raises:
        GateError: ``alpha``, ``axis``, ``mask`` or the logits' dtype or shape are unfit; where
            the backend checks values also where logits are NaN or a token has no expert left.
            Elsewhere a NaN makes all coefficients of its token NaN, and a token without an
            expert gets coefficients of zero.

    Example:
        >>> import numpy as np
        >>> entmax(np.array([2.0, 1.0, -1.0, -2.0])).round(4)
        array([0.8307, 0.1693, 0.    , 0.    ])
    """
    alpha = check_alpha(alpha)
    rows = as_rows(logits, axis, mask)
    return rows.restore(
        map_rows(rows, lambda x, m, first: entmax_block(rows.backend, x, m, first, None, alpha))
    )


def sparsemax(logits: Array, axis: int = -1, mask: Array | None = None) -> Array:
    """The projection of logits onto the simplex: :func:`entmax` with α = 2.

    Martins & Astudillo 2016, eq. 2. Arguments, result and errors as in :func:`entmax`.

    Example:
        >>> import numpy as np
        >>> sparsemax(np.array([1.0, 0.5, -1.0]))
        array([0.75, 0.25, 0.  ])
    """
    return entmax(logits, 2.0, axis, mask)


def softmax(logits: Array, axis: int = -1, mask: Array | None = None) -> Array:
    """Dense coefficients exp(x) / Σ exp(x): :func:`entmax` with α = 1.

    Arguments, result and errors as in :func:`entmax`.

    Example:
        >>> import numpy as np
        >>> softmax(np.array([0.0, 0.0]))
        array([0.5, 0.5])
    """
    return entmax(logits, 1.0, axis, mask)


def activation_vjp(backend: Backend, weights: Array, cotangent: Array, alpha: float) -> Array:
    """The transpose of the derivative of :func:`entmax` with respect to its logits.

    With s = a^(2-α) on the support and 0 elsewhere it is s · (g - ⟨s, g⟩ / Σ s) (Peters, Niculae &
    Martins 2019, proposition 2). Softmax over a chosen subset, hence top-k, is the case α = 1.

    Args:
        backend: the adapter of both arrays.
        weights: coefficients a, (rows, experts).
        cotangent: g, (rows, experts).
        alpha: at least 1.
    """
    xp = backend.namespace
    if alpha == 1.0:
        slope = weights
    elif alpha == 1.5:
        slope = xp.sqrt(weights)
    else:
        support = weights > 0.0
        slope = xp.where(support, weights, xp.ones_like(weights)) ** (2.0 - alpha)
        # zero, but where the coefficients are NaN
        slope = xp.where(support, slope, weights * 0.0)
    total = backend.row_sums(slope)
    # a row of zeros, where no error could be raised, has derivative zero
    total = xp.where(total > 0.0, total, xp.ones_like(total))
    gradient = cotangent - xp.vecdot(slope, cotangent)[:, None] / total
    gradient *= slope
    return gradient
